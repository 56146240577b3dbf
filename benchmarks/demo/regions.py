"""``python -m benchmarks.demo.regions [--json]``: a region is born, and its engine skips prefill from the first request.

Two regions on this machine, each with an S3 server, a node and an engine, and a link of a WAN's latency and bandwidth between
them. Status 1 when a promise was not kept.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.demo import services
from benchmarks.demo.document import manuals
from benchmarks.demo.services import NODE, Say, engine
from connectors.vllm.testing import Reply, ask
from kvstore.testing.model import MEDIUM, ModelSize, make_model
from kvstore.testing.servers import ministack
from kvstore.testing.shaping import Shape
from kvstore.units import human_bytes
from replication.testing import LocalRegion, LocalRegions

NEW_TOKENS = 8
ROUND_TRIP, BYTES_PER_SECOND = 0.05, 25e6


@dataclass(frozen=True)
class Answer:
    """One prompt, computed in na and asked first thing in eu."""

    prompt: str
    prompt_tokens: int
    loaded_tokens: int
    """In eu; nothing was loaded in na."""
    cold_s: float
    """Time to first token in na."""
    warm_s: float
    """Time to first token in eu."""
    identical: bool


@dataclass(frozen=True)
class Birth:
    """What it took to warm eu, and what that was good for."""

    blocks: int
    wan_bytes: int
    """Over the link, everything included."""
    replicate_s: float
    warm_s: float
    answers: tuple[Answer, ...]

    @property
    def kept(self) -> bool:
        """Same answers, and nothing but the last tokens of a prompt computed."""
        return all(a.identical and a.loaded_tokens > 0.9 * a.prompt_tokens for a in self.answers)


def tell(say: Say = lambda _: None, size: ModelSize = MEDIUM) -> Birth:
    """Run the demo with a model of ``size``."""
    asked = manuals()
    step = partial(services.step, say)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kvs-")))
        regions = stack.enter_context(LocalRegions(folder))
        secret = f"identity.secret={os.urandom(32).hex()}"
        for name in ("na", "eu"):
            catalog = f"catalog.url=sqlite://{folder}/{name}.db"
            stack.enter_context(regions.add(name, stack.enter_context(ministack()), *NODE, secret, catalog).node)
        link = regions.flow("na", "eu", Shape(ROUND_TRIP / 2, BYTES_PER_SECOND))
        na, eu = regions.regions["na"], regions.regions["eu"]
        with step("made a small Llama of random weights, with a tokenizer trained on the prompts"):
            model = make_model(folder / "model", asked.values(), size)
        with step("na: an engine computed every prompt and saved it; na published what is hot"):
            computed = _ask_all(folder, model, na, list(asked.values()))
            na.node.drain()
            na.publish()
        with step("eu, an empty region, pulled it over the WAN"):
            started = time.perf_counter()
            replicated = eu.replicate()["flows"][0]["copied"]
            replicate_s = time.perf_counter() - started
        with step("eu's node was warmed, before any engine ran there"):
            started = time.perf_counter()
            eu.warm()
            warm_s = time.perf_counter() - started
        with step("eu: an engine was started and asked the same"):
            loaded = _ask_all(folder, model, eu, list(asked.values()))
        answers = tuple(map(_compare, asked, computed, loaded))
        return Birth(replicated["copied"], link.bytes_down + link.bytes_up, replicate_s, warm_s, answers)


def _ask_all(folder: Path, model: Path, region: LocalRegion, prompts: list[str]) -> list[Reply]:
    """What a new engine of the region answers."""
    with engine(folder, region.name, model, region.node) as process:
        return [ask(process, prompt, NEW_TOKENS) for prompt in prompts]


def _compare(name: str, cold: Reply, warm: Reply) -> Answer:
    if cold.loaded:
        raise RuntimeError(f"na did not compute {name}: it loaded {cold.loaded}")
    return Answer(
        prompt=name,
        prompt_tokens=warm.prompt_tokens,
        loaded_tokens=sum(warm.loaded.values()),
        cold_s=cold.ttft_seconds,
        warm_s=warm.ttft_seconds,
        identical=warm.tokens == cold.tokens,
    )


def show(birth: Birth) -> None:
    table = Table(
        "first requests", box=box.SIMPLE_HEAD, pad_edge=False, title_justify="left",
        title="Time to first token (TTFT) in a region that has just been born",
    )  # fmt: skip
    for column in ("tokens", "loaded in eu", "TTFT computed in na", "TTFT in eu", "faster", "same answer"):
        table.add_column(column, justify="right", no_wrap=True)
    for answer in birth.answers:
        table.add_row(
            answer.prompt,
            f"{answer.prompt_tokens:,}",
            f"{answer.loaded_tokens:,}",
            f"{answer.cold_s:.2f} s",
            f"{answer.warm_s:.2f} s",
            f"{answer.cold_s / answer.warm_s:.1f}x",
            "yes" if answer.identical else "NO",
        )
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)
    console.print(table)


def sentence(birth: Birth) -> str:
    """What the table comes to."""
    cold, warm = (sum(times) for times in zip(*((a.cold_s, a.warm_s) for a in birth.answers), strict=True))
    same = sum(answer.identical for answer in birth.answers)
    return (
        f"{birth.blocks:,} blocks crossed a link of {ROUND_TRIP * 1000:.0f} ms and {BYTES_PER_SECOND * 8 / 1e6:.0f} Mbit/s: "
        f"{human_bytes(birth.wan_bytes)} in {birth.replicate_s:.1f} s, and {birth.warm_s:.1f} s more to have them in memory and "
        f"on disk. The new region's first {len(birth.answers)} requests waited {warm:.1f} s for their first tokens instead of "
        f"{cold:.1f} s; {same} of {len(birth.answers)} answers are token for token those that na computed."
    )


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.demo.regions", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON line in place of the table")
    args = parser.parse_args()
    os.environ.setdefault("TQDM_DISABLE", "1")  # libraries' own progress bars
    progress = Console(stderr=True, soft_wrap=True)
    with progress.status("working: about two minutes on two cores"):
        birth = tell(lambda text: progress.print(f"[dim]·[/] {text}", highlight=False))
    if args.json:
        print(json.dumps(asdict(birth)))
    else:
        show(birth)
        print(sentence(birth))
    return 0 if birth.kept else 1


if __name__ == "__main__":
    sys.exit(main())
