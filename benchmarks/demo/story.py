"""What is asked, restarted and emptied, in which order."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benchmarks.demo import services
from benchmarks.demo.document import document, prompts
from benchmarks.demo.services import Say, engine, node_on, restart
from connectors.vllm.process import EngineProcess
from connectors.vllm.testing import Reply, ask
from kvstore.testing.model import MEDIUM, ModelSize, make_model
from kvstore.testing.servers import ministack

COMPUTED = "computed"
NEW_TOKENS = 8


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


def tell(say: Say = lambda _: None, size: ModelSize = MEDIUM) -> list[Answer]:
    """Run the demo with a model of ``size``. ``say`` hears what is going on."""
    with tempfile.TemporaryDirectory(prefix="kvstore-demo-") as name, ministack() as s3:
        folder, asked = Path(name), prompts()
        step = partial(services.step, say)
        with step("made a small Llama of random weights, with a tokenizer trained on the document"):
            model = make_model(folder / "model", [document(), *asked], size)
        with step("reference: an engine without the store answered every question"):
            with engine(folder, "reference", model, None) as plain:
                reference = [ask(plain, prompt, NEW_TOKENS) for prompt in asked]

        answers: list[Answer] = []

        def ask_all(run: str, process: EngineProcess) -> None:
            for number, (prompt, expected) in enumerate(zip(asked, reference, strict=True), 1):
                answers.append(_compare(run, number, ask(process, prompt, NEW_TOKENS), expected))

        with node_on(folder, s3) as node:
            with step("engine A computed the document and saved it"), engine(folder, "a", model, node) as a:
                ask_all("engine A", a)
                node.drain()
            saved = ", ".join(f"{count} in {tier}" for tier, count in node.blocks().items())
            say(f"blocks saved: {saved}; engine A is gone")
            with engine(folder, "b", model, node) as b:
                with step("engine B, a new process, was asked the same"):
                    ask_all("engine B", b)
                with step("the node was restarted: host memory is empty, and engine B asked again"):
                    restart(node)
                    ask_all("node restarted", b)
                with step("the node was restarted without its disk: only the bucket is left, and engine B asked again"):
                    restart(node, lose_disk=True)
                    ask_all("disk lost", b)
        return answers


def _compare(run: str, number: int, reply: Reply, expected: Reply) -> Answer:
    return Answer(
        run=run,
        question=number,
        prompt_tokens=reply.prompt_tokens,
        loaded_tokens=sum(reply.loaded.values()),
        source=max(reply.loaded, key=lambda tier: reply.loaded[tier]) if reply.loaded else COMPUTED,
        ttft_s=reply.ttft_seconds,
        baseline_s=expected.ttft_seconds,
        identical=reply.tokens == expected.tokens,
    )


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
