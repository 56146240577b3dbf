"""Engines of small hybrid models on a CPU, and one node: what is the same whatever the layers are."""

from __future__ import annotations

import importlib
import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from connectors.vllm.process import Answer, EngineProcess
from connectors.vllm.testing import cpu_engine
from kvstore.testing.model import make_model
from kvstore.testing.node import NodeProcess, wait_for

OUTPUT = 12
WORDS = ["river", "stone", "lamp", "quiet", "engine", "morning", "letter", "seven", "harbour", "yellow"]
NODE = [
    "host.bytes=96MiB", "host.extent_bytes=8MiB", "disk.bytes=128MiB", "disk.segment_bytes=32MiB",
    "policy.planner=off", "policy.prefetch=wait_complete",
]  # fmt: skip


def prose(seed: int, words: int) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=words)) + ". "


SYSTEM = prose(0, 500)
PROMPTS = [SYSTEM + prose(seed, 120) for seed in (1, 2)] + [prose(5, 140), SYSTEM]
"""Several chunks of a prefill, all but the third."""


def make_hybrid(folder: Path, architecture: str, **config: Any) -> Path:
    """The small Llama's folder and tokenizer, with an untrained model of ``transformers`` in its place, in float32."""
    import torch

    make_model(folder, PROMPTS)
    transformers: Any = importlib.import_module("transformers")
    torch.manual_seed(7)
    settings = getattr(transformers, f"{architecture}Config")(
        vocab_size=512, hidden_size=256, intermediate_size=512, max_position_embeddings=4096, tie_word_embeddings=False,
        bos_token_id=0, eos_token_id=1, pad_token_id=2, initializer_range=0.3, **config,
    )  # fmt: skip
    name = architecture.removesuffix("Text")
    model = getattr(transformers, f"{name}ForCausalLM")(settings).to(torch.float32)
    if name.startswith("Gemma"):  # it scales its embeddings up: layers, and with them the context, would hardly matter
        with torch.no_grad():
            model.model.embed_tokens.weight /= settings.hidden_size**0.5
    model.save_pretrained(folder, safe_serialization=True)
    return folder


@dataclass
class Engines:
    node: NodeProcess
    plain: EngineProcess
    """Without store and prefix cache."""
    saver: EngineProcess
    loader: EngineProcess

    def restart_node(self) -> None:
        """And wait for its engines to be back."""
        self.node.start()
        wait_for(lambda: self.node.clients() == 4 and self.loads())

    def loads(self) -> bool:
        """Whether the loader finds the first prompt."""
        self.loader.forget()
        return self.loader.generate(PROMPTS[:1], OUTPUT)[0].cached_tokens > 0


@contextmanager
def serving(folder: Path, model: Path, **arguments: Any) -> Iterator[Engines]:
    """Three engines of one model; ``arguments`` go to ``vllm.LLM``."""
    node = NodeProcess(folder, *NODE)
    with ExitStack() as stack:
        stack.enter_context(node)

        def engine(socket: Path | None, **more: Any) -> EngineProcess:
            log = folder / "engines.log"
            return stack.enter_context(cpu_engine(model, log, socket, threads=1, **{**arguments, **more}))

        plain = engine(None, enable_prefix_caching=False, prefix_cache_retention_interval=0)
        saver, loader = engine(node.socket), engine(node.socket)
        for each in (plain, saver, loader):
            each.ready()
        wait_for(lambda: node.clients() == 4)
        yield Engines(node, plain, saver, loader)


def one_by_one(engine: EngineProcess) -> list[Answer]:
    return [engine.generate([prompt], OUTPUT)[0] for prompt in PROMPTS]


def tokens(answers: list[Answer]) -> list[list[int]]:
    return [answer.tokens for answer in answers]
