"""A real vLLM engine over a disk that is slower than computing: the planner learns it, and the engine computes instead."""

from __future__ import annotations

import itertools
import random
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

import kvstore.assembly
from connectors.vllm.process import EngineProcess
from connectors.vllm.testing import cpu_engine
from kvstore.testing.model import make_model
from kvstore.testing.node import PatientClient, RunningNode, wait_for
from kvstore.tiers.base import Tier
from kvstore.tiers.wrappers import Faults, Faulty

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

WORDS = ["river", "stone", "lamp", "quiet", "engine", "morning", "letter", "seven", "harbour", "yellow"]
SIZES = ["host.bytes=96MiB", "host.extent_bytes=8MiB", "disk.bytes=128MiB", "disk.segment_bytes=32MiB"]
OUTPUT = 8


def prompt(seed: int) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=500))


STORED = [prompt(seed) for seed in range(4)]


def call(node: RunningNode, verb: str) -> Any:
    with PatientClient(node.socket, name="test") as client:
        return client.call(verb)


def tokens(engine: EngineProcess, text: str) -> list[int]:
    """Each prompt by itself, and nothing from the engine's own cache."""
    engine.forget()
    (answer,) = engine.generate([text], OUTPUT)
    return answer.tokens


def test_what_is_slower_to_load_is_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = kvstore.assembly.open_disk
    delay = 0.0

    async def open_disk(*arguments: Any) -> Tier:
        return Faulty(await opened(*arguments), Faults(delay=delay))

    monkeypatch.setattr(kvstore.assembly, "open_disk", open_disk)
    model = make_model(tmp_path / "model", STORED)
    (tmp_path / "node").mkdir()
    socket = tmp_path / "node" / "node.sock"
    with cpu_engine(model, tmp_path / "engine.log", socket, threads=1, max_model_len=2048) as engine:
        with RunningNode(tmp_path / "node", *SIZES) as node:
            engine.ready()
            wait_for(lambda: engines(node))
            expected = {text: tokens(engine, text) for text in STORED}
            wait_for(lambda: blocks(node, "disk") >= 4 * 5)
        delay = 3.0
        with RunningNode(tmp_path / "node", *SIZES) as node:
            wait_for(lambda: engines(node))
            assert blocks(node, "host") == 0
            new = itertools.count(100)
            wait_for(lambda: tokens(engine, prompt(next(new))) and steps(node) >= 3)
            assert tokens(engine, STORED[0]) == expected[STORED[0]], "the first load from a tier is a trial"
            wait_for(lambda: "disk" in call(node, "planner")["tiers"])  # when what was late has come
            for text in STORED[1:]:
                assert tokens(engine, text) == expected[text]
            counters = call(node, "status")["counters"]
            assert counters["kvstore_planned_requests_total{reason=unmeasured}"] == 1
            assert counters["kvstore_planned_requests_total{reason=recompute}"] == 3
            assert counters["kvstore_planned_blocks_total{plan=recompute,reason=recompute}"] >= 15
            tokens(engine, prompt(20))  # vLLM reports the counts of a step with the next
            assert engine.counters()["vllm:kvstore_blocks_recomputed{recompute}"] >= 15


def blocks(node: RunningNode, medium: str) -> int:
    return next(int(tier["blocks"]) for tier in call(node, "status")["tiers"] if tier["medium"] == medium)


def engines(node: RunningNode) -> bool:
    """The engine's scheduler and its worker are connected."""
    return sum(client["namespace"] is not None for client in call(node, "status")["clients"]) == 2


def steps(node: RunningNode) -> float:
    """Engine steps that the planner has learnt from."""
    return sum(float(engine["prefill"]["steps"]) for engine in call(node, "planner")["engines"])
