"""``kvstore top``."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict
from itertools import islice
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvstore.cli import options
from kvstore.cli.groups import grouped
from kvstore.cli.output import ago, number, print_json
from kvstore.cli.overhttp import Api
from kvstore.cli.replication import state_of
from kvstore.errors import NodeUnavailable

if TYPE_CHECKING:
    from rich.console import Group, RenderableType
    from rich.table import Table

    from kvstore.admin.client import AdminClient
    from kvstore.cli.figures import Figures, Tier

AGAIN_SECONDS = 2.0
"""After which an API that went away is asked again."""
WIDE = 110
"""Columns of a terminal from which everything is shown."""
BAR = 20
SHOWN = 10
LATE_SECONDS = 900.0
"""A source that is further behind is told in colour."""


@grouped
def run(
    once: Annotated[
        bool, typer.Option("--once", help="Look twice within a second, for the rates, print that, and end.")
    ] = False,
    *,
    api: Api,
    json: options.Json = False,
) -> None:
    """Watch a node or region: fill and bandwidth of its tiers, hit ratio, prefill saved, hot prompts, jobs, lag. Ctrl-C ends it.

    With --json one line a second, or a single document with --once. Without a terminal it looks once.
    """
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDE)
    with api.connect() as client:
        if once or not (json or console.is_terminal):
            last = list(islice(_looks(client), 2))[-1]
            if json:
                print_json(asdict(last))
            else:
                console.print(draw(last, console.width))
        elif json:
            for figures in _looks(client):
                _print_line(figures)
        else:
            _watch(client, console)


def _looks(client: AdminClient) -> Iterator[Figures]:
    """What is there each second. Raises NodeUnavailable."""
    from kvstore.cli.figures import Observer

    observer = Observer()
    for snapshot in client.events():
        yield observer.look(snapshot)


def _print_line(figures: Figures) -> None:
    import json

    typer.echo(json.dumps(asdict(figures)))


def _watch(client: AdminClient, console: Any) -> None:
    """Until Ctrl-C. An API that goes away after the first look may come back."""
    from rich.console import Group
    from rich.live import Live
    from rich.text import Text

    shown: Group | None = None
    with Live(console=console, screen=True, auto_refresh=False) as live:
        try:
            while True:
                problem = "the API ended the stream"
                try:
                    for figures in _looks(client):
                        shown = draw(figures, console.width)
                        live.update(shown, refresh=True)
                except NodeUnavailable as error:
                    if shown is None:
                        raise
                    problem = str(error)
                told = Text(f"{problem}; asking again. Below is what was last seen.", "bold red")
                live.update(Group(told, *([shown] if shown else [])), refresh=True)
                time.sleep(AGAIN_SECONDS)
        except KeyboardInterrupt:
            pass


def draw(figures: Figures, width: int) -> Group:
    """For a terminal of so many columns."""
    from rich.console import Group
    from rich.text import Text

    wide = width >= WIDE
    parts: list[RenderableType] = [_headline(figures)]
    parts += [Text(f"{part}: {problem}", "bold red") for part, problem in figures.problems.items()]
    if figures.tiers:
        parts.append(_tiers(figures.tiers, wide))
    if figures.replication is not None:
        parts.append(_sources(figures.replication))
    if figures.uptime_seconds is not None:
        parts.append(_hot(figures, wide))
    if figures.jobs:
        parts.append(_jobs(figures))
    return Group(*parts)


def _headline(figures: Figures) -> Any:
    from rich.text import Text

    if figures.uptime_seconds is None:
        mode = figures.replication["mode"] if figures.replication else "no node"
        region = figures.replication["region"] if figures.replication else ""
        return Text.assemble((f"region {region}".strip(), "bold"), f"  {mode}")
    state = "draining" if figures.draining else "up"
    lately = "idle" if figures.hit_ratio is None else f"{figures.hit_ratio:.0%}"
    ever = "-" if figures.hit_ratio_ever is None else f"{figures.hit_ratio_ever:.0%}"
    saving = figures.prefill_saved_per_second or 0.0
    line = Text.assemble(
        ("node ", "bold"),
        f"{state} for {ago(figures.uptime_seconds)}   ",
        ("hit ratio ", "bold"),
        f"{lately} (ever {ever})   ",
        ("prefill saved ", "bold"),
        f"{_duration(figures.prefill_seconds_saved)} (+{saving:.1f} s/s)   ",
        ("requests ", "bold"),
        f"{figures.requests_per_second or 0.0:.1f}/s   ",
        ("clients ", "bold"),
        str(figures.clients),
    )
    if figures.warmth:
        line.append("   warm ", "bold").append(f"{figures.warmth['share']:.0%} ({figures.warmth['state']})")
    return line


def _table(title: str, *columns: str) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, title_style="bold")
    for column in columns:
        right = column.startswith(">")
        table.add_column(column.removeprefix(">"), justify="right" if right else "left", no_wrap=True)
    return table


def _tiers(tiers: list[Tier], wide: bool) -> Table:
    from rich.progress_bar import ProgressBar

    from kvstore.units import human_bytes

    bar = ("",) if wide else ()
    table = _table(
        "Tiers", "tier", *bar, ">full", ">used", ">blocks", ">hits", ">read/s", ">write/s", ">queued", "state"
    )
    for tier in tiers:
        share = tier.used_bytes / tier.capacity_bytes if tier.capacity_bytes else None
        state = "[bold red]silent" if tier.breaker != "closed" else "well"
        if tier.quarantined:
            state += f" [yellow]{number(tier.quarantined)} bad"
        table.add_row(
            tier.name,
            *([ProgressBar(total=1.0, completed=share or 0.0, width=BAR) if share is not None else ""] if wide else []),
            f"{share:.0%}" if share is not None else "-",
            human_bytes(tier.used_bytes),
            number(tier.blocks),
            "-" if tier.hit_ratio is None else f"{tier.hit_ratio:.0%}",
            _bytes(tier.read),
            _bytes(tier.written),
            human_bytes(tier.queued_bytes) if tier.queued_bytes else "-",
            state,
        )
    return table


def _sources(replication: dict[str, Any]) -> Table:
    from rich.text import Text

    table = _table(f"Into {replication['region']} ({replication['mode']})", "source", ">behind", ">blocks", "state")
    for name, row in replication["sources"].items():
        lag = row["lag_seconds"]
        late = lag is None or lag > LATE_SECONDS
        behind = Text("never level" if lag is None else _duration(lag), "yellow" if late else "green")
        state = state_of(row["paused"], row["problem"])
        table.add_row(name, behind, number(row["blocks"]), Text(state, "" if state == "copies" else "bold yellow"))
    return table


def _hot(figures: Figures, wide: bool) -> Table:
    from rich.text import Text

    from kvstore.units import human_bytes

    more = (">size", ">hits", ">last used") if wide else ()
    table = _table("Hot prompts", "prompt", "model", ">tokens", *more, ">saved", "where")
    for prompt in figures.hot[:SHOWN]:
        used = f"{ago(max(figures.time - prompt['last_used'], 0))} ago"
        table.add_row(
            prompt["key"] if wide else prompt["key"][:8],
            Text(prompt["model"] or "?"),
            number(prompt["tokens"]),
            *([human_bytes(prompt["bytes"]), f"{prompt['hits']:.1f}", used] if wide else []),
            _duration(prompt["hits"] * prompt["seconds_saved"]),
            ", ".join(prompt["media"]) or "nowhere",
        )
    if not figures.hot:
        table.add_row(Text("none was asked for twice yet", "dim"))
    return table


def _jobs(figures: Figures) -> Table:
    from rich.text import Text

    table = _table("Jobs", "job", "kind", "state", ">done", "problem")
    for job in sorted(figures.jobs, key=lambda job: job["state"] != "running")[:5]:
        progress = job["progress"]
        share = f"{progress['done'] / progress['total']:.0%}" if progress["total"] else number(progress["done"])
        table.add_row(job["id"], job["kind"], job["state"], share, Text(job["problem"] or progress["note"]))
    return table


def _bytes(rate: float | None) -> str:
    from kvstore.units import human_bytes

    return "-" if rate is None else human_bytes(int(rate)) if rate else "0"


def _duration(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds < 10 else ago(seconds)
