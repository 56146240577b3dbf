"""Hit ratio over capacity as an SVG file: three curves a trace, so no plotting package is needed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol
from xml.sax.saxutils import escape

WIDTH, HEIGHT, LEFT, TOP = 270, 190, 44, 30


class Curves(Protocol):
    """What is drawn of a point: hit ratios in percent."""

    trace: str
    share: float
    online: dict[str, float]
    belady: float
    reuse: float


def draw(path: Path, points: Sequence[Curves]) -> None:
    names = list(dict.fromkeys(point.trace for point in points))
    panels = [
        _panel(number, name, [point for point in points if point.trace == name]) for number, name in enumerate(names)
    ]
    width = len(names) * (WIDTH + LEFT + 16)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {HEIGHT + TOP + 44}" '
        f'font-family="sans-serif" font-size="11">\n<rect width="100%" height="100%" fill="#fff"/>\n'
        + "\n".join(panels)
        + "\n</svg>\n"
    )


def _panel(number: int, name: str, points: Sequence[Curves]) -> str:
    left = number * (WIDTH + LEFT + 16) + LEFT
    top = max(max(p.belady for p in points) * 1.1, 1.0)
    step = WIDTH / max(1, len(points) - 1)

    def line(values: Sequence[float], colour: str) -> str:
        corners = " ".join(
            f"{left + i * step:.0f},{TOP + HEIGHT * (1 - value / top):.1f}" for i, value in enumerate(values)
        )
        return f'<polyline points="{corners}" fill="none" stroke="{colour}" stroke-width="2"/>'

    curves = {
        "LRU": ([p.online["lru"] for p in points], "#999"),
        "best other online": ([max(p.online.values()) for p in points], "#e80"),
        "reuse": ([p.reuse for p in points], "#06c"),
        "Belady": ([p.belady for p in points], "#2a2"),
    }
    parts = [
        f'<text x="{left}" y="{TOP - 14}" font-weight="bold">{escape(name)}: hit ratio, %, over capacity</text>',
        f'<path d="M{left} {TOP}V{TOP + HEIGHT}H{left + WIDTH}" fill="none" stroke="#333"/>',
    ]
    for tick in range(5):
        y = TOP + HEIGHT * (1 - tick / 4)
        parts.append(f'<text x="{left - 6}" y="{y + 4:.0f}" text-anchor="end">{top * tick / 4:.0f}</text>')
    for place, point in enumerate(points):
        x = left + place * step
        parts.append(f'<text x="{x:.0f}" y="{TOP + HEIGHT + 15}" text-anchor="middle">{point.share:.0%}</text>')
    for place, (label, (values, colour)) in enumerate(curves.items()):
        parts.append(line(values, colour))
        x = left + place * WIDTH / 3.4
        parts.append(f'<text x="{x:.0f}" y="{TOP + HEIGHT + 34}" fill="{colour}">{label}</text>')
    return "\n".join(parts)
