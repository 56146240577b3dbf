"""The first minutes of a new cluster: what it hits when it was sent the blocks that an older one expects back.

A request trace is cut; the cluster is born at that moment with the blocks that were sent to it, and serves what follows with a
cache that never fills. What was sent is chosen by the code that chooses in production: a node's report of what it learnt
(``kvstore.tiers.object.hotness``), packed and unpacked, brought to the moment of birth, and ordered by
``replication.planner``. Beside it, at equal bytes: blocks used at least 5, 3 or 2 times; and nothing, and everything.

Hit ratios are of tokens, and a block counts only when every block before it hits. ``worst_gain_over_count_points`` is the least
that the choice is ahead of the threshold, over those three sizes and the first 1, 5 and 30 minutes, of the trace's birth at
half of its requests; ``mean_gain_...`` is over births at several times, because what one cluster is asked in one minute is
luck. Points at which the threshold is within a point of sending everything are left out: there is nothing to be had.

A cluster is steady from when on its hits are 95% of those of a cluster that has everything.
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
from benchmarks.traces import FILES, TRACES
from benchmarks.traces.birth import Birth, Served
from benchmarks.traces.replay import keyed
from benchmarks.traces.trace import Trace, load
from benchmarks.traces.variants import halves

WINDOWS = (60.0, 300.0, 1800.0)
TIMES = (5, 3, 2)
"""Thresholds of the count."""
BIRTHS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
"""Shares of the trace's requests."""
HALF = 0.5
STEADY = 0.95
HEADROOM_POINTS = 1.0
REPORT_AGES = (15.0, 60.0, 300.0)
"""Seconds: the report that the choice is made from is old."""


@dataclass(frozen=True)
class Row:
    """One choice for one birth, served."""

    choice: str
    blocks: int
    served: list[Served]
    steady: float


@dataclass(frozen=True)
class Point:
    """Learnt choice and threshold at equal bytes, in percent of tokens, at the end of one window."""

    trace: str
    birth: float
    times: int
    blocks: int
    window: float
    learnt: float
    count: float
    everything: float

    @property
    def gain(self) -> float:
        return self.learnt - self.count

    @property
    def counts(self) -> bool:
        return self.everything - self.count > HEADROOM_POINTS


def points_of(birth: Birth) -> list[Point]:
    learnt = birth.by_learning()
    everything = birth.serve(birth.seen, WINDOWS)
    points = []
    for times in TIMES:
        often = birth.seen_often(times)
        mine, theirs = birth.serve(learnt[: len(often)], WINDOWS), birth.serve(often, WINDOWS)
        points += [
            Point(birth.source.trace.name, birth.share, times, len(often), window, a.percent, b.percent, c.percent)
            for window, a, b, c in zip(WINDOWS, mine, theirs, everything, strict=True)
        ]
    return points


def points(trace: Trace, share: float) -> list[Point]:
    return points_of(Birth(keyed(trace), share))


def rows(birth: Birth) -> list[Row]:
    """All choices for one birth."""

    def row(choice: str, sent: Sequence[int]) -> Row:
        return Row(choice, len(sent), birth.serve(sent, WINDOWS), birth.seconds_to_steady(sent, STEADY))

    learnt, hindsight = birth.by_learning(), birth.by_hindsight(WINDOWS[-1])
    found = [row("cold", ())]
    for times in TIMES:
        often = birth.seen_often(times)
        found += [row("count", often), row("learnt", learnt[: len(often)]), row("hindsight", hindsight[: len(often)])]
    return [*found, row("everything", birth.seen)]


def aged(birth: Birth) -> dict[str, float]:
    """What the choice loses when the report is old: hit ratio of the first minute with the blocks seen twice as budget."""
    budget = len(birth.seen_often(TIMES[-1]))
    return {
        f"first_minute_hit_report_{age:.0f}s_old": birth.serve(birth.by_learning(age)[:budget], WINDOWS[:1])[0].percent
        for age in REPORT_AGES
    }


def show(console: Console, birth: Birth, found: Sequence[Row]) -> None:
    name = birth.source.trace.name
    table = Table("sent", title=f"{name}: born after {birth.share:.0%} of the requests", title_justify="left")
    for heading in ("blocks", "hit % 1 min", "5 min", "30 min", "prefill s saved 1 min", "5 min", "30 min", "steady s"):
        table.add_column(heading, justify="right")
    for row in found:
        ratios = (f"{served.percent:.1f}" for served in row.served)
        seconds = (f"{served.seconds:,.0f}" for served in row.served)
        table.add_row(row.choice, f"{row.blocks:,}", *ratios, *seconds, f"{row.steady:,.0f}")
    console.print(table)


def show_gains(console: Console, found: Sequence[Point]) -> None:
    table = Table("trace", title="gain over the count in points: mean over births (worst)", title_justify="left")
    for times in TIMES:
        for window in WINDOWS:
            table.add_column(f"≥{times}, {window / 60:.0f} min", justify="right")
    for name in dict.fromkeys(point.trace for point in found):
        cells = []
        for times in TIMES:
            for window in WINDOWS:
                gains = [p.gain for p in found if (p.trace, p.times, p.window) == (name, times, window) and p.counts]
                cells.append(f"{sum(gains) / len(gains):+.1f} ({min(gains):+.1f})" if gains else "")
        table.add_row(name, *cells)
    console.print(table)


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--traces", type=Path, default=TRACES, help="folder of the traces (default: %(default)s)")
    parser.add_argument("--trace", type=Path, action="append", help="another trace, in place of the known ones")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes (default: %(default)s)")
    parser.add_argument("--variants", action="store_true", help="judge also the halves of each trace")


def run(args: Any) -> Mapping[str, float]:
    console = Console(stderr=True, width=140)
    paths = args.trace or [args.traces / file for file in FILES]
    for path in paths:
        if not path.exists():
            raise SystemExit(f"no trace at {path}: name the folder with --traces, or a file with --trace")
    traces = [load(path) for path in paths]
    births = [Birth(keyed(trace), HALF) for trace in traces]
    judged = [*traces, *(half for trace in traces for half in halves(trace))] if args.variants else traces
    with ProcessPoolExecutor(args.jobs) as pool:
        tables = pool.map(rows, births)
        grid = [(trace, share) for trace in judged for share in BIRTHS]
        spread = [point for found in pool.map(points, *zip(*grid, strict=True)) for point in found]
        for birth, found in zip(births, tables, strict=True):
            show(console, birth, found)
    show_gains(console, spread)
    first = traces[0].name
    return {
        **reference(births[0], [point for point in spread if (point.trace, point.birth) == (first, HALF)]),
        **aged(births[0]),
        **over_births(spread),
    }


def reference(birth: Birth, found: Sequence[Point]) -> dict[str, float]:
    """The first trace, born at half of its requests."""
    figures = {
        "worst_gain_over_count_points": min(point.gain for point in found if point.counts),
        "first_minute_hit_cold": birth.serve((), WINDOWS)[0].percent,
        "first_minute_hit_everything": birth.serve(birth.seen, WINDOWS)[0].percent,
    }
    for point in found:
        if point.window == WINDOWS[0]:
            figures[f"first_minute_hit_at_{point.blocks}_blocks"] = point.learnt
            figures[f"first_minute_hit_by_count_at_{point.blocks}_blocks"] = point.count
    return figures


def over_births(found: Sequence[Point]) -> dict[str, float]:
    """Gains as means over births: of all points, and where that is least, over traces, sizes and windows."""
    groups: dict[tuple[str, int, float], list[float]] = {}
    for point in found:
        if point.counts:
            groups.setdefault((point.trace, point.times, point.window), []).append(point.gain)
    means = [sum(gains) / len(gains) for gains in groups.values()]
    single = [gain for gains in groups.values() for gain in gains]
    return {
        "mean_gain_over_births_points": sum(means) / len(means),
        "worst_mean_gain_over_births_points": min(means),
        "worst_gain_of_any_birth_points": min(single),
        "births_behind_count_percent": 100 * sum(gain < 0 for gain in single) / len(single),
    }


STUDY = Study(
    name="warmup",
    summary="A new cluster's first minutes, by what it was sent before (conversation trace unless said)",
    run=run,
    targets={
        "worst_gain_over_count_points": ">0",
        "first_minute_hit_at_2677_blocks": ">12.5",
        "first_minute_hit_at_23414_blocks": ">19.4",
    },
    arguments=arguments,
)
