"""Eviction and admission over real request traces, by the code that the tiers run.

Hit ratios are in blocks (a hit counts only when every block before it in the chain hits), one cache, capacities in shares of the
trace's unique blocks. ``worst_deficit_points``: how far the product's policy is behind the best online policy where it is
furthest behind. ``mean_belady_gap_closed``: how much of the way from LRU to Belady it goes, over the points where that
is more than 2 points long. The baselines are small caches of this package, which agree with libCacheSim where that
implements the same algorithm (LRU, LFU, ARC and SIEVE to two decimals of a percent, on the synthetic trace).
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.study import Study
from benchmarks.traces.baselines import ONLINE
from benchmarks.traces.belady import belady_hits
from benchmarks.traces.plot import draw
from benchmarks.traces.replay import Cache, baseline_hits, keyed, policy_hits
from benchmarks.traces.tiers import Tally, run_tiers
from benchmarks.traces.trace import Trace, load
from kvstore.policy.admission import Mode
from kvstore.policy.reuse import Reuse, Traffic

TRACES = Path(__file__).parents[3] / "shared" / "traces"
FILES = (
    "mooncake-fast25/conversation_trace.jsonl",
    "mooncake-fast25/synthetic_trace.jsonl",
    "ragpulse/0_trace.jsonl",
)
CAPACITIES = (0.02, 0.05, 0.10, 0.25, 0.50)
GAP_POINTS = 2.0
"""A gap from LRU to Belady below this says nothing about a policy."""


@dataclass(frozen=True)
class Point:
    """Hit ratios in percent at one capacity of one trace."""

    trace: str
    share: float
    online: dict[str, float]
    belady: float
    reuse: float
    reuse_without_answers: float

    @property
    def deficit(self) -> float:
        return max(self.online.values()) - self.reuse

    def gap_closed(self, reached: float) -> float | None:
        gap = self.belady - self.online["lru"]
        return (reached - self.online["lru"]) / gap if gap > GAP_POINTS else None


def measure(trace: Trace, share: float) -> Point:
    capacity = max(2, int(trace.unique * share))
    percent = 100 / trace.references
    source = keyed(trace)

    def reuse(answers: bool) -> float:
        traffic = Traffic()
        return percent * policy_hits(source, Cache(capacity, Reuse(traffic)), traffic, answers)

    return Point(
        trace.name,
        share,
        {policy.name: percent * baseline_hits(trace, policy(capacity)) for policy in ONLINE},
        percent * belady_hits(trace, capacity),
        reuse(True),
        reuse(False),
    )


def _admission(trace: Trace) -> tuple[Tally, Tally]:
    source = keyed(trace)
    return run_tiers(source, Mode.OFF), run_tiers(source, Mode.ENFORCE)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else float("nan")


def figures_of(points: Sequence[Point]) -> dict[str, float]:
    closed = [value for p in points if (value := p.gap_closed(p.reuse)) is not None]
    without = [value for p in points if (value := p.gap_closed(p.reuse_without_answers)) is not None]
    return {
        "worst_deficit_points": max(p.deficit for p in points),
        "mean_belady_gap_closed": _mean(closed),
        "mean_belady_gap_closed_without_answers": _mean(without),
        "worst_deficit_points_without_answers": max(max(p.online.values()) - p.reuse_without_answers for p in points),
    }


def _admission_figures(tallies: Sequence[tuple[Tally, Tally]]) -> dict[str, float]:
    """Over all traces together, and the worst of them."""
    written = [(everything.disk_writes, enforced.disk_writes) for everything, enforced in tallies]
    hits = [(everything.hits, enforced.hits) for everything, enforced in tallies]
    return {
        "disk_write_ratio": sum(after for _, after in written) / sum(before for before, _ in written),
        "hits_lost_percent": 100 * (1 - sum(after for _, after in hits) / sum(before for before, _ in hits)),
        "worst_disk_write_ratio": max(after / before for before, after in written),
        "worst_hits_lost_percent": max(100 * (1 - after / before) for before, after in hits),
    }


def show(console: Console, points: Sequence[Point]) -> None:
    for name in dict.fromkeys(point.trace for point in points):
        rows = [point for point in points if point.trace == name]
        table = Table("capacity", title=f"{name}: hit ratio, %", title_justify="left")
        for heading in (*rows[0].online, "reuse", "no answers", "belady", "closed"):
            table.add_column(heading, justify="right")
        for p in rows:
            closed = p.gap_closed(p.reuse)
            ratios = (*p.online.values(), p.reuse, p.reuse_without_answers, p.belady)
            table.add_row(
                f"{p.share:.0%}", *(f"{ratio:.1f}" for ratio in ratios), "" if closed is None else f"{closed:.2f}"
            )
        console.print(table)


def _show_admission(console: Console, traces: Sequence[Trace], tallies: Sequence[tuple[Tally, Tally]]) -> None:
    table = Table("trace", "rule", title="host 5%, disk 50%: admission to disk", title_justify="left")
    for heading in ("host hits %", "disk hits %", "written to host", "to disk", "prefill s saved"):
        table.add_column(heading, justify="right")
    for trace, pair in zip(traces, tallies, strict=True):
        for rule, tally in zip(("everything", "enforce"), pair, strict=True):
            ratios = (f"{100 * hits / trace.references:.1f}" for hits in (tally.host_hits, tally.disk_hits))
            saved = tally.prefill_seconds_saved(trace.block_tokens)
            table.add_row(trace.name, rule, *ratios, str(tally.host_writes), str(tally.disk_writes), f"{saved:.0f}")
    console.print(table)


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--traces", type=Path, default=TRACES, help="folder of the traces (default: %(default)s)")
    parser.add_argument(
        "--trace", type=Path, action="append", help="another trace in the Mooncake format, in place of the known ones"
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes (default: %(default)s)")
    parser.add_argument("--plot", type=Path, help="draw hit ratio over capacity into this SVG file")


def load_all(paths: Sequence[Path]) -> list[Trace]:
    """The traces in these files. Exits with what to do where one is missing."""
    for path in paths:
        if not path.exists():
            raise SystemExit(
                f"no trace at {path}: name the folder that holds {FILES} with --traces, or a file with --trace"
            )
    return [load(path) for path in paths]


def run(args: Any) -> Mapping[str, float]:
    console = Console(stderr=True, width=140)
    traces = load_all(args.trace or [args.traces / file for file in FILES])
    grid = [(trace, share) for trace in traces for share in CAPACITIES]
    with ProcessPoolExecutor(args.jobs) as pool:
        tallies = list(pool.map(_admission, traces))
        points = list(pool.map(measure, *zip(*grid, strict=True)))
    show(console, points)
    _show_admission(console, traces, tallies)
    saved = (tally.prefill_seconds_saved(trace.block_tokens) for trace, (_, tally) in zip(traces, tallies, strict=True))
    figures = figures_of(points) | _admission_figures(tallies) | {"prefill_seconds_saved": sum(saved)}
    if args.plot:
        draw(args.plot, points)
    return figures


STUDY = Study(
    name="traces",
    summary="Eviction and admission over request traces, against the best online policies and Belady",
    run=run,
    targets={
        "worst_deficit_points": "<=0.5",
        "mean_belady_gap_closed": ">=0.2",
        "disk_write_ratio": "<=0.6",
        "hits_lost_percent": "<=5",
    },
    arguments=arguments,
)
