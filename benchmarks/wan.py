"""Bytes on the WAN for the prefill seconds that they save in a new region: blocks sent ahead, and blocks read on demand.

A request trace is cut. A region is born at that moment with the blocks that were sent to it, and serves the rest with a cache
that never fills (``benchmarks.traces.birth``). What it was not sent, but the older region has listed, its requests may read over
the WAN when the product's planner finds that faster than computing (``benchmarks.traces.remote``). Contestants:

* as the product does it: sent ahead as nodes report what they expect back and ``replication.planner`` sends it, and reads
* sent ahead: the same without reads
* rehearsed: the same without reads, by nodes that have served all of the trace once before, the rest included: how far better
  estimates lead
* count: blocks used most often are sent, the plain threshold
* hindsight: those that will be asked for, which nobody can know; no choice of what to send does better

The benefit is the prefill time that the new region saves in its first five minutes (or first minute) beyond what an empty one
saves, less what its requests waited for reads. Enough is sent ahead to reach 80% of the benefit of sending everything; the
gain is how many times fewer bytes were sent and read than 80% of everything; 0 if no number brings that much. The trace is cut
at half of its time; ``_over_births`` is the median over other moments, since one moment's gain depends on which conversations
happen to go on.

The trace is of an MLA model, so that is the main case: 671B at TP 8, 36 MiB and some 55 ms of prefill for a block of 512 tokens,
over 25 Gbit/s, which take 12 ms to bring it, with a round trip of 70 ms. What reads bring depends on all of these, so the other
figures show where they do little or nothing: over 10 Gbit/s (29 ms a block, and a queue), and for an 8B model with grouped
queries, whose 64 MiB are computed in 16 ms, which is faster than 25 Gbit/s brings them. And it depends on how often the round
trip is paid: a node asks for 128 blocks of 64 tokens at a time, which are 16 of the trace. ``_16_together`` is with the 16, two
of the trace, that an engine asks for: then the round trips take longer than the bytes.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.planner import Model
from benchmarks.study import Study
from benchmarks.traces import TRACES
from benchmarks.traces.birth import Birth, Served
from benchmarks.traces.remote import GBIT, GQA, MLA, WAN, Link
from benchmarks.traces.replay import keyed
from benchmarks.traces.trace import Trace, load
from kvstore.policy.planner import WINDOW

FILE = "mooncake-fast25/conversation_trace.jsonl"
SHARE = 0.8
WINDOWS = {"": 300.0, "_first_minute": 60.0}
BIRTHS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
"""Shares of the trace's requests."""
CASES = {
    "": (MLA, WAN),
    "_10_gbit": (MLA, replace(WAN, bandwidth=10 * GBIT)),
    "_100_gbit": (MLA, replace(WAN, bandwidth=100 * GBIT)),
    "_16_together": (MLA, replace(WAN, window=WINDOW)),
    "_8b": (GQA, WAN),
    "_8b_100_gbit": (GQA, replace(WAN, bandwidth=100 * GBIT)),
}
"""Models, and links for reads on demand."""


@dataclass(frozen=True)
class Contest:
    """What is compared: one birth's benefits in one window, for one model."""

    birth: Birth
    window: float
    model: Model = MLA

    def served(self, sent: Sequence[int], link: Link | None = None) -> Served:
        remote = self.birth.remote(link) if link else None
        return self.birth.serve(sent, (self.window,), remote, self.model)[0]

    @cached_property
    def nothing(self) -> float:
        return self.served(()).seconds

    @cached_property
    def everything(self) -> float:
        return self.served(self.birth.seen).seconds

    def benefit(self, served: Served) -> float:
        """As a share of that of everything."""
        return (served.seconds - self.nothing) / (self.everything - self.nothing)

    def gain(self, order: Sequence[int], link: Link | None = None) -> float:
        """See the module's text. ``link``: for reads on demand."""
        if self.benefit(self.served(order, link)) < SHARE:
            return 0.0
        low, high = 0, len(order)
        while low < high:
            middle = (low + high) // 2
            if self.benefit(self.served(order[:middle], link)) < SHARE:
                low = middle + 1
            else:
                high = middle
        moved = low + self.served(order[:low], link).fetched
        return SHARE * len(self.birth.seen) / max(moved, 1)


def gains(trace: Trace, share: float) -> dict[str, float]:
    """By choice and window, for a region born when this share of the requests is over."""
    birth = Birth(keyed(trace), share)
    rehearsed, count = birth.by_learning(rehearsed=True), birth.by_count()
    found = {}
    for name, window in WINDOWS.items():
        contest = Contest(birth, window)
        found[name] = contest.gain(birth.learnt, WAN)
        found[f"_sent_ahead{name}"] = contest.gain(birth.learnt)
        found[f"_rehearsed{name}"] = contest.gain(rehearsed)
        found[f"_by_count{name}"] = contest.gain(count)
        found[f"_by_hindsight{name}"] = contest.gain(birth.by_hindsight(window))
    return found


@dataclass(frozen=True)
class Row:
    """Reads on demand for one model over one link, in the first five minutes."""

    case: str
    sent_ahead: float
    """Gain without reads."""
    gain: float
    alone: float
    """Share of the benefit of everything that reads bring when nothing is sent ahead."""
    fetched: int
    """Blocks that they then read."""


def rows(trace: Trace, share: float) -> list[Row]:
    """All cases, for a region born when this share of the requests is over."""
    birth = Birth(keyed(trace), share)
    found = []
    for case, (model, link) in CASES.items():
        contest = Contest(birth, WINDOWS[""], model)
        alone = contest.served((), link)
        gain = contest.gain(birth.learnt, link)
        found.append(Row(case, contest.gain(birth.learnt), gain, contest.benefit(alone), alone.fetched))
    return found


def half_time(trace: Trace) -> float:
    """The share of the requests that is over at half of the trace's time."""
    times = [request.time for request in trace.requests]
    return float(np.searchsorted(times, times[-1] / 2) / len(times))


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--traces", type=Path, default=TRACES, help="folder of the traces (default: %(default)s)")
    parser.add_argument("--trace", type=Path, help="another trace in the Mooncake format, in place of the known one")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes (default: %(default)s)")


def run(args: Any) -> Mapping[str, float]:
    path = args.trace or args.traces / FILE
    if not path.exists():
        raise SystemExit(f"no trace at {path}: name the folder that holds {FILE} with --traces, or a file with --trace")
    trace = load(path)
    born = half_time(trace)
    shares = [born, *BIRTHS]
    with ProcessPoolExecutor(args.jobs) as pool:
        read = pool.submit(rows, trace, born)
        found = list(pool.map(gains, [trace] * len(shares), shares))
    console = Console(stderr=True, width=160)
    show(console, shares, found)
    show_rows(console, read.result())
    figures = {f"wan_efficiency_gain{name}": value for name, value in found[0].items()}
    for name in found[0]:
        figures[f"wan_efficiency_gain{name}_over_births"] = float(np.median([one[name] for one in found[1:]]))
    for row in read.result():
        figures[f"wan_efficiency_gain{row.case}"] = row.gain
        figures[f"reads_alone_percent{row.case}"] = 100 * row.alone
    return figures


def show(console: Console, shares: Sequence[float], found: Sequence[Mapping[str, float]]) -> None:
    table = Table("born after", *(f"gain{name.replace('_', ' ')}" for name in found[0]))
    for share, one in zip(shares, found, strict=True):
        table.add_row(f"{share:.0%} of requests", *(f"{value:.2f}" for value in one.values()))
    console.print(table)


def show_rows(console: Console, found: Sequence[Row]) -> None:
    table = Table(
        "model", "Gbit/s", "asked together", title="reads on demand, first five minutes", title_justify="left"
    )
    for heading in ("gain sent ahead", "gain with reads", "benefit of reads alone %", "blocks read"):
        table.add_column(heading, justify="right")
    for row in found:
        model, link = CASES[row.case]
        values = f"{row.sent_ahead:.2f}", f"{row.gain:.2f}", f"{100 * row.alone:.1f}", f"{row.fetched:,}"
        table.add_row(model.name, f"{link.bandwidth / GBIT:.0f}", f"{link.window}", *values)
    console.print(table)


STUDY = Study(
    name="wan",
    summary="Prefill seconds saved per byte on the WAN to a new region, against sending everything (conversation trace)",
    run=run,
    targets={"wan_efficiency_gain": ">=5"},
    arguments=arguments,
)
