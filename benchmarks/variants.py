"""Eviction over traces that no constant was chosen on: parts and distortions of real ones, and made ones.

What the study ``traces`` asks, of samples of whole sessions: halves of each trace, all times a tenth and ten times as long,
sessions in another order, and four made shapes (``benchmarks.traces.variants``). ``behind_share``: in how many points the
product's policy is more than half a point behind the best other one.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.study import Study
from benchmarks.traces import FILES, TRACES, figures_of, load_all, measure, show
from benchmarks.traces.variants import all_of, made, sampled

CAPACITIES = (0.02, 0.10, 0.25)
BEHIND = 0.5
"""Points."""


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--traces", type=Path, default=TRACES, help="folder of the traces (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=1, help="processes (default: %(default)s)")
    parser.add_argument(
        "--requests", type=int, default=2000, help="of each trace, in whole sessions (default: %(default)s)"
    )


def run(args: Any) -> Mapping[str, float]:
    real = [sampled(trace, args.requests) for trace in load_all([args.traces / file for file in FILES])]
    traces = [variant for trace in real for variant in all_of(trace)] + made(args.requests)
    grid = [(trace, share) for trace in traces for share in CAPACITIES]
    with ProcessPoolExecutor(args.jobs) as pool:
        points = list(pool.map(measure, *zip(*grid, strict=True)))
    show(Console(stderr=True, width=140), points)
    behind = [point for point in points if point.deficit > BEHIND]
    return {**figures_of(points), "behind_share": len(behind) / len(points), "points": float(len(points))}


STUDY = Study(
    name="variants",
    summary="Eviction over distorted and made traces, against the best online policies and Belady",
    run=run,
    targets={"mean_belady_gap_closed": ">=0.2"},
    arguments=arguments,
)
