"""The first minutes of a new cluster: what it hits when it was sent the blocks that an older one expects back, and reads others.

A request trace is cut; the cluster is born at that moment with the blocks that were sent to it, and serves what follows with a
cache that never fills. What was sent is chosen by the code that chooses in production: a node's report of what it learnt
(``kvstore.tiers.object.hotness``), packed and unpacked, brought to the moment of birth, and ordered by
``replication.planner``. What was not sent, but is listed, may be read over the WAN when a request asks for it, where the
planner finds that faster than computing (``benchmarks.traces.remote``; the main case is that of the study ``wan``: a 671B MLA
model, 25 Gbit/s, 70 ms).

Contestants have equal bytes: as many blocks as were used at least 5, 3 or 2 times. ``count`` is sent these, the plain
threshold. ``advised`` divides them as docs/regions.md says, which an operator has to do, into what is sent ahead and what is kept
for reads (``benchmarks.traces.budget``, with the reason); the last table compares that rule with fixed shares. Beside them: all
sent ahead; the count with the same reads, which shows what the reads bring and what the choice; nothing; and everything.

Hit ratios are of tokens, and a block counts only when every block before it hits; one that is read in time to be used is a hit.
Saved prefill seconds are less what requests waited for reads, so they can be fewer while hits are more.
``worst_gain_over_count_points`` is the least that this is ahead of the threshold, over those three sizes and the first
1, 5 and 30 minutes, of the trace's birth at half of its requests; ``mean_gain_...`` is over births at several times, because
what one cluster is asked in one minute is luck. Points at which the threshold is within a point of sending everything are
left out: there is nothing to be had.

A cluster is steady from when on its hits are 95% of those of a cluster that has everything.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.study import Study
from benchmarks.traces import FILES, TRACES
from benchmarks.traces.birth import Birth, Served
from benchmarks.traces.budget import (
    ADVISED,
    COUNT,
    COUNT_READING,
    DIVISIONS,
    SENT_AHEAD,
    TIMES,
    Point,
    blocks_ahead,
    division,
    points_of,
)
from benchmarks.traces.remote import GBIT, GQA, MLA, WAN
from benchmarks.traces.replay import keyed
from benchmarks.traces.trace import Trace, load
from benchmarks.traces.variants import halves
from kvstore.policy.planner import WINDOW

WINDOWS = (60.0, 300.0, 1800.0)
BIRTHS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
"""Shares of the trace's requests."""
HALF = 0.5
STEADY = 0.95
HITS = {"": ADVISED, "_sent_ahead": SENT_AHEAD, "_by_count": COUNT, "_by_count_with_reads": COUNT_READING}
CASES = {
    "": (WAN, MLA),
    "_10_gbit": (replace(WAN, bandwidth=10 * GBIT), MLA),
    "_100_gbit": (replace(WAN, bandwidth=100 * GBIT), MLA),
    "_16_together": (replace(WAN, window=WINDOW), MLA),
    "_8b": (WAN, GQA),
}
"""Links and models."""
REPORT_AGES = (15.0, 60.0, 300.0)
"""Seconds: the report that the choice is made from is old."""


@dataclass(frozen=True)
class Row:
    """One choice for one birth, served."""

    choice: str
    blocks: int
    served: list[Served]
    steady: float


def points(trace: Trace, share: float) -> list[Point]:
    return points_of(Birth(keyed(trace), share), WINDOWS)


def rows(birth: Birth) -> list[Row]:
    """All choices for one birth."""

    def row(choice: str, sent: Sequence[int], budget: int = 0) -> Row:
        remote = birth.remote(WAN, budget - len(sent)) if budget else None
        served, steady = birth.serve(sent, WINDOWS, remote), birth.seconds_to_steady(sent, STEADY, remote)
        return Row(choice, len(sent) + served[-1].fetched, served, steady)

    hindsight, divided = birth.by_hindsight(WINDOWS[-1]), division(birth)
    found = [row("cold", ())]
    for times in TIMES:
        often = birth.seen_often(times)
        budget = len(often)
        found += [
            row("count", often),
            row("learnt", birth.learnt[:budget]),
            row("learnt, and reads", birth.learnt[: blocks_ahead(birth, budget, divided)], budget),
            row("hindsight", hindsight[:budget]),
        ]
    return [*found, row("everything", birth.seen)]


def aged(birth: Birth) -> dict[str, float]:
    """What is lost when the report is old: hit ratio of the first minute with the blocks seen twice as budget."""
    budget = len(birth.seen_often(TIMES[-1]))
    first = blocks_ahead(birth, budget, division(birth))
    figures = {}
    for age in REPORT_AGES:
        order, remote = birth.by_learning(age), birth.remote(WAN, budget - first, age)
        reading, sent = birth.serve(order[:first], WINDOWS[:1], remote), birth.serve(order[:budget], WINDOWS[:1])
        figures[f"first_minute_hit_report_{age:.0f}s_old"] = reading[0].percent
        figures[f"first_minute_hit_sent_ahead_report_{age:.0f}s_old"] = sent[0].percent
    return figures


def cases(birth: Birth) -> dict[str, float]:
    """The worst gain in hits and the mean gain in prefill seconds, over all links and models."""
    figures = {}
    for case, (link, model) in CASES.items():
        judged = [point for point in points_of(birth, WINDOWS, link, model) if point.counts]
        figures[f"worst_gain_over_count_points{case}"] = min(point.gain() for point in judged)
        for name, choice in {"": ADVISED, "_sent_ahead": SENT_AHEAD}.items():
            seconds = [point.seconds_gained(choice) for point in judged]
            figures[f"seconds_gained_over_count{name}{case}"] = sum(seconds) / len(seconds)
    return figures


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
                gains = [p.gain() for p in found if (p.trace, p.times, p.window) == (name, times, window) and p.counts]
                cells.append(f"{sum(gains) / len(gains):+.1f} ({min(gains):+.1f})" if gains else "")
        table.add_row(name, *cells)
    console.print(table)


def show_divisions(console: Console, found: Sequence[Point]) -> None:
    """How a budget is best divided, over all points."""
    table = Table("of a budget", title="over the count, all traces and births", title_justify="left")
    for heading in ("worst hit points", "mean", "behind %", "worst prefill s", "mean", "behind %"):
        table.add_column(heading, justify="right")
    for name in DIVISIONS:
        gains = np.array([[p.gain(name), p.seconds_gained(name)] for p in found if p.counts])
        cells = zip(gains.min(axis=0), gains.mean(axis=0), 100 * (gains < 0).mean(axis=0), strict=True)
        values = [f"{value:+.1f}" for three in cells for value in three]
        table.add_row(name.replace("_", " "), *values)
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
        more = [pool.submit(one, births[0]) for one in (aged, cases)]
        for birth, found in zip(births, tables, strict=True):
            show(console, birth, found)
    show_gains(console, spread)
    show_divisions(console, spread)
    first = traces[0].name
    figures = reference(births[0], [point for point in spread if (point.trace, point.birth) == (first, HALF)])
    for others in more:
        figures |= others.result()
    return {**figures, **over_births(spread)}


def reference(birth: Birth, found: Sequence[Point]) -> dict[str, float]:
    """The first trace, born at half of its requests."""
    figures = {
        f"worst_gain_over_count_points{name}": min(point.gain(choice) for point in found if point.counts)
        for name, choice in {"_sent_ahead": SENT_AHEAD, "_by_count_with_reads": COUNT_READING}.items()
    }
    figures["first_minute_hit_cold"] = birth.serve((), WINDOWS)[0].percent
    figures["first_minute_hit_everything"] = birth.serve(birth.seen, WINDOWS)[0].percent
    for point in found:
        if point.window == WINDOWS[0]:
            for name, choice in HITS.items():
                figures[f"first_minute_hit{name}_at_{point.blocks}_blocks"] = point.served[choice].percent
    return figures


def over_births(found: Sequence[Point]) -> dict[str, float]:
    """Gains as means over births: of all points, and where that is least, over traces, sizes and windows."""
    groups: dict[tuple[str, int, float], list[float]] = {}
    for point in found:
        if point.counts:
            groups.setdefault((point.trace, point.times, point.window), []).append(point.gain())
    means = [sum(gains) / len(gains) for gains in groups.values()]
    single = [gain for gains in groups.values() for gain in gains]
    figures = {
        "mean_gain_over_births_points": sum(means) / len(means),
        "worst_mean_gain_over_births_points": min(means),
        "worst_gain_of_any_birth_points": min(single),
        "births_behind_count_percent": 100 * sum(gain < 0 for gain in single) / len(single),
    }
    judged = [point for point in found if point.counts]
    for name in DIVISIONS:
        figures[f"worst_gain_of_any_birth_points_{name}"] = min(point.gain(name) for point in judged)
    return figures


STUDY = Study(
    name="warmup",
    summary="A new cluster's first minutes, by what it was sent before and reads then (conversation trace unless said)",
    run=run,
    targets={
        "worst_gain_over_count_points": ">0",
        "first_minute_hit_at_2677_blocks": ">12.5",
        "first_minute_hit_at_23414_blocks": ">19.4",
    },
    arguments=arguments,
)
