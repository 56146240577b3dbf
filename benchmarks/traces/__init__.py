"""Eviction policies over real request traces, against the best online policies and the best possible one."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.study import Study
from benchmarks.traces.baselines import ONLINE
from benchmarks.traces.belady import belady_hits
from benchmarks.traces.replay import baseline_hits
from benchmarks.traces.trace import load

TRACES = Path(__file__).parents[3] / "shared" / "traces"
FILES = (
    "mooncake-fast25/conversation_trace.jsonl",
    "mooncake-fast25/synthetic_trace.jsonl",
    "ragpulse/0_trace.jsonl",
)
CAPACITIES = (0.02, 0.05, 0.10, 0.25, 0.50)


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--traces", type=Path, default=TRACES, help="folder of the traces (default: %(default)s)")


def run(args: Any) -> Mapping[str, float]:
    console = Console(stderr=True)
    figures: dict[str, float] = {}
    for file in FILES:
        path = args.traces / file
        if not path.exists():
            raise SystemExit(f"no trace at {path}: name the folder that holds {file} with --traces")
        trace = load(path)
        table = Table("capacity", *(policy.name for policy in ONLINE), "belady", title=f"{trace.name}: hit ratio, %")
        for share in CAPACITIES:
            capacity = int(trace.unique * share)
            hits = [baseline_hits(trace, policy(capacity)) for policy in ONLINE] + [belady_hits(trace, capacity)]
            table.add_row(f"{share:.0%}", *(f"{100 * count / trace.references:.1f}" for count in hits))
        console.print(table)
    return figures


STUDY = Study(name="traces", summary="Eviction policies over request traces", run=run, arguments=arguments)
