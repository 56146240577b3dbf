"""``python -m benchmarks.demo [--json]``: progress, then a table and one sentence. Status 1 when a promise was not kept."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.demo import STUDY
from benchmarks.demo.story import COMPUTED, Answer, figures, tell
from benchmarks.study import judge

TIERS = {"host": "host memory", "disk": "disk", "object": "S3"}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.demo", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON line in place of the table")
    args = parser.parse_args()
    os.environ.setdefault("TQDM_DISABLE", "1")  # libraries' own progress bars
    progress = Console(stderr=True, soft_wrap=True)
    with progress.status("working: about three minutes on two cores"):
        answers = tell(lambda text: progress.print(f"[dim]·[/] {text}", highlight=False))
    summary = figures(answers)
    if args.json:
        print(json.dumps({"answers": [asdict(answer) for answer in answers], "figures": summary}))
    else:
        show(answers)
        print(sentence(answers))
    return 0 if all(judge(summary, STUDY.targets).values()) else 1


def show(answers: Sequence[Answer]) -> None:
    table = Table(
        "", "", "prompt from", box=box.SIMPLE_HEAD, pad_edge=False,
        title="Time to first token (TTFT)", title_justify="left",
    )  # fmt: skip
    for column in ("tokens", "loaded", "TTFT without store", "TTFT", "faster", "same answer"):
        table.add_column(column, justify="right", no_wrap=True)
    for before, answer in zip([None, *answers], answers, strict=False):
        new = before is None or before.run != answer.run
        table.add_row(
            answer.run if new else "",
            f"question {answer.question}",
            TIERS.get(answer.source, answer.source),
            f"{answer.prompt_tokens:,}",
            f"{answer.loaded_tokens:,}",
            f"{answer.baseline_s:.2f} s",
            f"{answer.ttft_s:.2f} s",
            f"{answer.baseline_s / answer.ttft_s:.1f}x",
            "yes" if answer.identical else "NO",
        )
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)
    console.print(table)


def sentence(answers: Sequence[Answer]) -> str:
    """What the table comes to."""
    known = figures(answers)
    loads = [
        f"{known[f'ttft_{source}_s']:.2f} s from {name}"
        for source, name in TIERS.items()
        if f"ttft_{source}_s" in known
    ]
    same = sum(answer.identical for answer in answers)
    computed = sum(answer.source == COMPUTED for answer in answers)
    return (
        f"The first token of a {known['prompt_tokens']:,.0f}-token prompt takes {known['ttft_without_store_s']:.1f} s "
        f"to compute, {', '.join(loads)}; {computed} of {len(answers)} prompts had to be computed, and {same} of "
        f"{len(answers)} answers are token for token those of an engine without the store."
    )


if __name__ == "__main__":
    sys.exit(main())
