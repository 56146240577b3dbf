"""What to send to a region that is about to start: prefill seconds saved there for each byte on the WAN.

A request trace is cut. A region is born at that moment with the blocks that were sent to it, and serves the rest with a cache
that never fills (``benchmarks.traces.birth``). Which blocks were sent, and in which order:

* learnt: as nodes report what they expect back and ``replication.planner`` sends it
* rehearsed: the same, by nodes that have served all of the trace once before, the rest included: how far better estimates lead
* count: blocks used most often, the plain threshold
* hindsight: those that will be asked for, which nobody can know; no choice does better

The benefit of a set is the prefill time that the new region saves in its first five minutes (or first minute) beyond what an
empty one saves. The gain is benefit per byte over that of sending everything, with as many bytes as bring 80% of the benefit of
everything; 0 if none do. The trace is cut at half of its time; ``_over_births`` is the median over other moments, since one
moment's gain depends on which conversations happen to go on.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.study import Study
from benchmarks.traces import TRACES
from benchmarks.traces.birth import Birth
from benchmarks.traces.replay import keyed
from benchmarks.traces.trace import Trace, load

FILE = "mooncake-fast25/conversation_trace.jsonl"
SHARE = 0.8
WINDOWS = {"": 300.0, "_first_minute": 60.0}
BIRTHS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
"""Shares of the trace's requests."""


def gain(birth: Birth, order: Sequence[int], window: float) -> float:
    """See the module's text."""

    def saved(sent: Sequence[int]) -> float:
        return birth.serve(sent, (window,))[0].seconds

    nothing, everything = saved(()), saved(birth.seen)
    goal = nothing + SHARE * (everything - nothing)
    if saved(order) < goal:
        return 0.0
    low, high = 0, len(order)
    while low < high:
        middle = (low + high) // 2
        if saved(order[:middle]) < goal:
            low = middle + 1
        else:
            high = middle
    return SHARE * len(birth.seen) / max(low, 1)


def gains(trace: Trace, share: float) -> dict[str, float]:
    """By choice and window, for a region born when this share of the requests is over."""
    birth = Birth(keyed(trace), share)
    learnt, rehearsed, count = birth.by_learning(), birth.by_learning(rehearsed=True), birth.by_count()
    found = {}
    for name, window in WINDOWS.items():
        found[name] = gain(birth, learnt, window)
        found[f"_rehearsed{name}"] = gain(birth, rehearsed, window)
        found[f"_by_count{name}"] = gain(birth, count, window)
        found[f"_by_hindsight{name}"] = gain(birth, birth.by_hindsight(window), window)
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
    shares = [half_time(trace), *BIRTHS]
    with ProcessPoolExecutor(args.jobs) as pool:
        found = list(pool.map(gains, [trace] * len(shares), shares))
    table = Table("born after", *(f"gain{name.replace('_', ' ')}" for name in found[0]))
    for share, one in zip(shares, found, strict=True):
        table.add_row(f"{share:.0%} of requests", *(f"{value:.2f}" for value in one.values()))
    Console(stderr=True).print(table)
    figures = {f"wan_efficiency_gain{name}": value for name, value in found[0].items()}
    for name in found[0]:
        figures[f"wan_efficiency_gain{name}_over_births"] = float(np.median([one[name] for one in found[1:]]))
    return figures


STUDY = Study(
    name="wan",
    summary="Prefill seconds saved per byte sent to a new region, against sending everything (conversation trace)",
    run=run,
    targets={"wan_efficiency_gain": ">=5"},
    arguments=arguments,
)
