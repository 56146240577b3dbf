"""The connector in real vLLM engines on a GPU: every token as if nothing had been cached.

float32, which of vLLM's attention backends Triton's computes: bfloat16 is not reproducible between chunk sizes.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

import torch

from connectors.vllm.process import Answer, EngineProcess
from kvstore.testing.model import make_model
from kvstore.testing.node import NodeProcess, alter_host_blocks, flip_every_fifth_block, wait_for
from kvstore.testing.reference import ReferenceModel

pytestmark = [
    pytest.mark.engine,
    pytest.mark.gpu,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]

OUTPUT = 24
ENGINE = {
    "dtype": "float32", "max_model_len": 2048, "enforce_eager": True, "seed": 0, "max_num_seqs": 8, "block_size": 16,
    "kv_cache_memory_bytes": 128 << 20, "gpu_memory_utilization": 0.1, "attention_config": {"backend": "TRITON_ATTN"},
    "compilation_config": {"custom_ops": ["none"]},
}  # fmt: skip
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "TRITON_F32_DEFAULT": "ieee", "NVIDIA_TF32_OVERRIDE": "0",
}  # fmt: skip
"""Nothing in TF32: its rounding makes tokens of what two ranks sum up in another order than one."""
NODE = [
    "host.bytes=256MiB", "host.extent_bytes=8MiB", "disk.bytes=512MiB", "disk.segment_bytes=32MiB",
    "policy.planner=off",
]  # fmt: skip
"""Without the planner, which knows that computing this small model is as fast as loading."""

WORDS = ["river", "stone", "lamp", "quiet", "engine", "morning", "letter", "seven", "harbour", "yellow"]


def prose(seed: int, words: int) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=words)) + ". "


SYSTEM = prose(0, 700)
PROMPTS = [SYSTEM + prose(seed, 150) for seed in range(1, 5)] + [prose(5, 900), prose(6, 50), SYSTEM]


class Site:
    """A node, a model, and engines one after the other."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.node = NodeProcess(directory, *NODE)
        self.model = make_model(directory / "model", PROMPTS)
        self.log = os.open(directory / "engines.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def engine(self, environment: Mapping[str, str] | None = None, **arguments: Any) -> EngineProcess:
        store = {"socket": str(self.node.socket), "autostart": False}
        environment = {**ENVIRONMENT, **(environment or {})}
        return EngineProcess(str(self.model), store, {**ENGINE, **arguments}, environment, self.log)

    def plain_engine(self) -> EngineProcess:
        arguments = {**ENGINE, "enable_prefix_caching": False}
        return EngineProcess(str(self.model), None, arguments, ENVIRONMENT, self.log)

    def linked(self) -> bool:
        """Whether both sides of an engine have found the node."""
        return self.node.clients() == 2


def one_by_one(engine: EngineProcess) -> list[Answer]:
    return [engine.generate([prompt], OUTPUT)[0] for prompt in PROMPTS]


def tokens(answers: Sequence[Answer]) -> list[list[int]]:
    return [answer.tokens for answer in answers]


def check_loaded(answers: Sequence[Answer]) -> None:
    """All but the last block of each prompt was not computed. The connector's own counters would say less: vLLM 0.26 drops
    what an offline engine counts in steps that answer nothing."""
    for answer in answers:
        assert answer.cached_tokens >= answer.prompt_tokens // 64 * 64 - 64


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    site = Site(tmp_path_factory.mktemp("site"))
    with site.node:
        yield site


@pytest.fixture(scope="module")
def reference(site: Site) -> list[list[int]]:
    """What computing gives; a first engine with the store, which saves it all, gives the same."""
    with site.plain_engine() as plain, site.engine() as first:
        expected = tokens(one_by_one(plain))
        assert len({tuple(answer) for answer in expected}) == len(PROMPTS), "the model must tell the prompts apart"
        first.ready()
        wait_for(site.linked)
        assert tokens(one_by_one(first)) == expected
        wait_for(lambda: 30 <= site.node.blocks()["host"] == site.node.blocks()["disk"])
    return expected


@pytest.fixture(scope="module")
def engine(site: Site, reference: list[list[int]]) -> Iterator[EngineProcess]:
    """An engine started after the one that saved has ended."""
    with site.engine() as engine:
        engine.ready()
        wait_for(site.linked)
        yield engine


def test_an_engine_loads_what_one_before_it_saved(engine: EngineProcess, reference: list[list[int]]) -> None:
    answers = one_by_one(engine)
    assert tokens(answers) == reference
    check_loaded(answers)
    engine.forget()
    assert tokens(engine.generate(PROMPTS, OUTPUT)) == reference


def test_altered_kv_alters_the_answers(site: Site, engine: EngineProcess, reference: list[list[int]]) -> None:
    """The control: were wrong KV loaded, these tests would see it."""
    with site.node.client() as client:
        assert alter_host_blocks(client)
    engine.forget()
    same = sum(answer == expected for answer, expected in zip(tokens(one_by_one(engine)), reference, strict=True))
    assert same < len(PROMPTS) // 2


def test_blocks_come_from_disk_when_the_node_was_restarted(
    site: Site, engine: EngineProcess, reference: list[list[int]]
) -> None:
    site.node.stop()
    site.node.start()
    wait_for(site.linked)
    assert site.node.blocks()["host"] == 0
    engine.forget()
    answers = one_by_one(engine)
    assert tokens(answers) == reference
    check_loaded(answers)


def test_a_load_that_fails_half_way_is_computed_from_there(
    site: Site, engine: EngineProcess, reference: list[list[int]]
) -> None:
    stored = site.node.blocks()["disk"]
    site.node.stop()
    assert flip_every_fifth_block(site.node)
    site.node.start()
    wait_for(site.linked)
    engine.forget()
    answers = one_by_one(engine)
    assert tokens(answers) == reference
    assert sum(tier["quarantined"] for tier in site.node.status()["tiers"])
    wait_for(lambda: site.node.blocks()["disk"] == stored)  # what was computed took their place


def test_transformers_reads_what_vllm_saved(site: Site, reference: list[list[int]]) -> None:
    """Another implementation of the model goes on from vLLM's blocks, and finds the same tokens."""
    from transformers import AutoTokenizer

    encode = AutoTokenizer.from_pretrained(site.model).encode
    other = ReferenceModel(site.model, site.node.status(), "cuda")
    prompts = [encode(prompt) for prompt in PROMPTS]
    with site.node.client() as client:
        assert [other.resume(client, prompt, OUTPUT) for prompt in prompts] == reference
        assert alter_host_blocks(client)  # the control: what is read is what counts
        same = [other.resume(client, p, OUTPUT) == expected for p, expected in zip(prompts, reference, strict=True)]
        assert alter_host_blocks(client)  # back
    assert sum(same) < len(PROMPTS) // 2


GRAPHS = {
    "enforce_eager": False,
    "compilation_config": {
        "custom_ops": ["none"], "mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": [1, 2, 4, 8],
    },
}  # fmt: skip


@pytest.mark.parametrize("runner", ["0", "1"], ids=["model runner V1", "model runner V2"])
def test_an_engine_with_cuda_graphs_saves_and_loads(site: Site, reference: list[list[int]], runner: str) -> None:
    """With a salt of its own, so that it computes and saves first; vLLM changes its stream when it captures graphs."""
    salts = [f"runner {runner}"]
    others, stored = site.node.clients(), site.node.blocks()["disk"]
    with site.engine({"VLLM_USE_V2_MODEL_RUNNER": runner}, **GRAPHS) as engine:
        engine.ready()
        wait_for(lambda: site.node.clients() == others + 2)
        computed = [engine.generate([prompt], OUTPUT, salts)[0] for prompt in PROMPTS]
        assert tokens(computed) == reference
        wait_for(lambda: site.node.blocks()["disk"] >= stored + 30)
        engine.forget()
        loaded = [engine.generate([prompt], OUTPUT, salts)[0] for prompt in PROMPTS]
    assert tokens(loaded) == reference
    check_loaded(loaded)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_one_rank_loads_what_two_saved(tmp_path: Path) -> None:
    """Two ranks write their own heads of the same slots of one node; an engine without tensor parallelism reads them."""
    site = Site(tmp_path)
    parallel = {"tensor_parallel_size": 2, "disable_custom_all_reduce": True}
    with site.node, site.plain_engine() as plain, site.engine(**parallel) as two:
        expected = tokens(one_by_one(plain))
        two.ready()
        wait_for(lambda: site.node.clients() == 3)
        computed = tokens(one_by_one(two))
        wait_for(lambda: 30 <= site.node.blocks()["host"] == site.node.blocks()["disk"])
        two.forget()
        by_two = one_by_one(two)
        two.close()
        with site.engine() as one:
            one.ready()
            wait_for(site.linked)
            by_one = one_by_one(one)
            with site.node.client() as client:
                assert alter_host_blocks(client)
            one.forget()
            altered = tokens(one_by_one(one))
    check_loaded(by_two)
    check_loaded(by_one)
    assert tokens(by_two) == computed
    assert tokens(by_one) == computed == expected
    assert sum(answer == right for answer, right in zip(altered, expected, strict=True)) < len(PROMPTS) // 2
