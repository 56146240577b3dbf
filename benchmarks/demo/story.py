"""What is asked, restarted and emptied, in which order."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.demo.document import document, prompts
from benchmarks.demo.services import Engine, Node
from kvstore.testing.model import MEDIUM, ModelSize, make_model
from kvstore.testing.servers import ministack

COMPUTED = "computed"


@dataclass(frozen=True)
class Answer:
    """One request."""

    run: str
    question: int
    prompt_tokens: int
    loaded_tokens: int
    source: str
    """The tier that most of the prompt came from, or ``computed``."""
    ttft_s: float
    baseline_s: float
    """Time to first token of the same prompt without the store."""
    identical: bool
    """Whether the tokens are those of the run without the store."""


Say = Callable[[str], None]


def tell(say: Say = lambda _: None, size: ModelSize = MEDIUM) -> list[Answer]:
    """Run the demo with a model of ``size``. ``say`` hears what is going on."""
    with tempfile.TemporaryDirectory(prefix="kvstore-demo-") as name, ministack() as s3:
        folder, asked = Path(name), prompts()

        @contextmanager
        def step(text: str) -> Iterator[None]:
            started = time.perf_counter()
            yield
            say(f"{text} ({time.perf_counter() - started:.0f} s)")

        with step("made a small Llama of random weights, with a tokenizer trained on the document"):
            model = make_model(folder / "model", [document(), *asked], size)
        with step("reference: an engine without the store answered every question"):
            with Engine(folder, "reference", model, None) as engine:
                reference = engine.ask(asked)

        answers: list[Answer] = []
        with Node(folder, s3) as node:
            with step("engine A computed the document and saved it"), Engine(folder, "a", model, node) as engine:
                answers += _answers("engine A", engine.ask(asked), reference)
                node.drain()
            saved = node.blocks()
            say(f"blocks saved: {', '.join(f'{count} in {tier}' for tier, count in saved.items())}; engine A is gone")
            with Engine(folder, "b", model, node) as engine:
                with step("engine B, a new process, asked the same"):
                    answers += _answers("engine B", engine.ask(asked), reference)
                node.restart()
                with step("the node was restarted: host memory is empty"):
                    answers += _answers("node restarted", engine.ask(asked), reference)
                node.restart(lose_disk=True)
                with step("the node was restarted without its disk: only the bucket is left"):
                    answers += _answers("disk lost", engine.ask(asked), reference)
        return answers


def _answers(run: str, given: Sequence[dict[str, Any]], reference: Sequence[dict[str, Any]]) -> list[Answer]:
    return [
        Answer(
            run=run,
            question=number,
            prompt_tokens=answer["prompt_tokens"],
            loaded_tokens=sum(answer["loaded"].values()),
            source=max(answer["loaded"], key=answer["loaded"].get) if any(answer["loaded"].values()) else COMPUTED,
            ttft_s=answer["ttft_s"],
            baseline_s=plain["ttft_s"],
            identical=answer["tokens"] == plain["tokens"],
        )
        for number, (answer, plain) in enumerate(zip(given, reference, strict=True), 1)
    ]


def figures(answers: Sequence[Answer]) -> Mapping[str, float]:
    """Medians by source, and the share of answers that are identical to the reference."""
    by_source = {answer.source: [a for a in answers if a.source == answer.source] for answer in answers}
    out = {
        "identical": sum(answer.identical for answer in answers) / len(answers),
        "prompt_tokens": statistics.median(answer.prompt_tokens for answer in answers),
        "ttft_without_store_s": statistics.median(answer.baseline_s for answer in answers),
    }
    for source, group in by_source.items():
        out[f"ttft_{source}_s"] = statistics.median(answer.ttft_s for answer in group)
        if source != COMPUTED:
            out[f"speedup_{source}"] = statistics.median(answer.baseline_s / answer.ttft_s for answer in group)
    return out
