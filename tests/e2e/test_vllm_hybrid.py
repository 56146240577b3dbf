"""A real vLLM engine of a hybrid model on a CPU: two kinds of attention, three KV cache groups, one chain of blocks.

Gemma 3's architecture with made-up weights: two layers attend to every token, four to the last 128. float32 throughout.
"""

from __future__ import annotations

import importlib
import random
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

from connectors.vllm.process import Answer, EngineProcess
from connectors.vllm.testing import cpu_engine
from kvstore.testing.model import make_model
from kvstore.testing.node import NodeProcess, alter_host_blocks, wait_for

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

WINDOW, OUTPUT = 128, 12
TOKEN_BYTES = 6 * 2 * 4 * 64 * 4
"""Of KV: layers, K and V, heads, dimensions, float32."""
WORDS = ["river", "stone", "lamp", "quiet", "engine", "morning", "letter", "seven", "harbour", "yellow"]
NODE = [
    "host.bytes=96MiB", "host.extent_bytes=8MiB", "disk.bytes=128MiB", "disk.segment_bytes=32MiB",
    "policy.planner=off", "policy.prefetch=wait_complete",
]  # fmt: skip
ENGINE = {"max_model_len": 2048, "num_gpu_blocks_override": 200, "max_num_batched_tokens": 256}


def prose(seed: int, words: int) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=words)) + ". "


SYSTEM = prose(0, 500)
PROMPTS = [SYSTEM + prose(seed, 120) for seed in (1, 2)] + [prose(5, 140), SYSTEM]
"""Several windows long, and several chunks of a prefill, all but the third."""


def make_hybrid(folder: Path) -> Path:
    """The small Llama's folder and tokenizer, with a Gemma 3 in its place."""
    import torch

    make_model(folder, PROMPTS)
    transformers: Any = importlib.import_module("transformers")
    torch.manual_seed(7)
    config = transformers.Gemma3TextConfig(
        vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=6, num_attention_heads=8,
        num_key_value_heads=4, head_dim=64, max_position_embeddings=4096, sliding_window=WINDOW,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"] * 2,
        query_pre_attn_scalar=4, tie_word_embeddings=False, bos_token_id=0, eos_token_id=1, pad_token_id=2, initializer_range=0.3,
    )  # fmt: skip
    gemma = transformers.Gemma3ForCausalLM(config).to(torch.float32)
    with torch.no_grad():  # Gemma scales its embeddings up: layers, and with them the context, would hardly matter
        gemma.model.embed_tokens.weight /= config.hidden_size**0.5
    gemma.save_pretrained(folder, safe_serialization=True)
    return folder


@dataclass
class Engines:
    node: NodeProcess
    plain: EngineProcess
    saver: EngineProcess
    loader: EngineProcess


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engines]:
    folder = tmp_path_factory.mktemp("hybrid")
    model, node = make_hybrid(folder / "model"), NodeProcess(folder, *NODE)
    with ExitStack() as stack:
        stack.enter_context(node)

        def engine(socket: Path | None, **arguments: Any) -> EngineProcess:
            log = folder / "engines.log"
            return stack.enter_context(cpu_engine(model, log, socket, threads=1, **{**ENGINE, **arguments}))

        plain = engine(None, enable_prefix_caching=False)
        saver, loader = engine(node.socket), engine(node.socket)
        for each in (plain, saver, loader):
            each.ready()
        wait_for(lambda: node.clients() == 4)
        yield Engines(node, plain, saver, loader)


def one_by_one(engine: EngineProcess) -> list[Answer]:
    return [engine.generate([prompt], OUTPUT)[0] for prompt in PROMPTS]


def tokens(answers: list[Answer]) -> list[list[int]]:
    return [answer.tokens for answer in answers]


def test_a_hybrid_model_loads_what_another_engine_saved(engines: Engines) -> None:
    node, loader = engines.node, engines.loader
    expected = tokens(one_by_one(engines.plain))
    assert len({tuple(answer) for answer in expected}) == len(PROMPTS), "the model must tell the prompts apart"
    assert tokens(one_by_one(engines.saver)) == expected
    wait_for(lambda: node.blocks()["disk"] == node.blocks()["host"] >= 12)

    wait_for(lambda: loads(loader))
    loader.forget()
    answers = one_by_one(loader)
    assert tokens(answers) == expected
    assert sum(answer.cached_tokens for answer in answers) > sum(answer.prompt_tokens for answer in answers) / 2
    counters = loader.counters()
    bytes_of_tokens = counters["vllm:kvstore_tokens_loaded{host}"] * TOKEN_BYTES
    assert counters["vllm:kvstore_bytes_loaded"] < 0.7 * bytes_of_tokens, (
        "of window layers only the last window is loaded"
    )
    loader.forget()
    assert tokens(loader.generate(PROMPTS, OUTPUT)) == expected

    # A load that fails half way is computed again, all of it: its windows are not there.
    node.stop()
    assert sum(flip_every_fifth_block(file) for file in node.data.rglob("*") if file.is_file())
    node.start()
    wait_for(lambda: node.clients() == 4 and loads(loader))
    loader.forget()
    assert tokens(one_by_one(loader)) == expected
    assert loader.counters()["vllm:kvstore_blocks_missed{corrupt}"] > 0

    # The control: were wrong KV loaded, this test would see it.
    with node.client() as client:
        assert alter_host_blocks(client)
    loader.forget()
    altered = tokens(one_by_one(loader))
    assert sum(answer == right for answer, right in zip(altered, expected, strict=True)) <= 1


def loads(engine: EngineProcess) -> bool:
    engine.forget()
    return engine.generate(PROMPTS[:1], OUTPUT)[0].cached_tokens > 0


def flip_every_fifth_block(segment: Path) -> int:
    """Flip a bit in the payloads of every fifth block of a segment file."""
    with open(segment, "r+b") as file:
        blocks = []
        while page := file.read(4096):
            if page.startswith(b"KVBLOCK\x00"):
                blocks.append(file.tell())
        for payload in blocks[3::5]:
            file.seek(payload + 1000)
            (byte,) = file.read(1)
            file.seek(payload + 1000)
            file.write(bytes([byte ^ 1]))
    return len(blocks[3::5])
