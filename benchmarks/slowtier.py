"""A tier that is slower than computing, under a real vLLM engine on the CPU: what the planner makes of prompts that are on it.

A node keeps prompts on a disk, is started again without its memory, and then finds that every read of the disk takes seconds.
The engine answers, in turn, a prompt that nobody stored and one that is on the slow disk, of one length; the ratio of their
times to first token is what the store costs it. The first stored prompt is the trial by which the tier becomes known.
"""

from __future__ import annotations

import itertools
import random
import statistics
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest import mock

from rich.console import Console

import kvstore.assembly
from benchmarks.study import Study
from connectors.vllm.process import EngineProcess
from connectors.vllm.testing import cpu_engine
from kvstore.node.client import Client
from kvstore.testing.model import MEDIUM, make_model
from kvstore.testing.node import RunningNode, wait_for
from kvstore.tiers.base import Tier
from kvstore.tiers.wrappers import Faults, Faulty

SIZES = ["host.bytes=256MiB", "host.extent_bytes=64MiB", "disk.bytes=1GiB", "disk.segment_bytes=128MiB"]
WORDS = ["river", "stone", "lamp", "quiet", "engine", "morning", "letter", "seven", "harbour", "yellow", "window"]


def arguments(parser: Any) -> None:
    parser.add_argument("--rounds", type=int, default=12, help="pairs of prompts")
    parser.add_argument("--tokens", type=int, default=768, help="length of a prompt")
    parser.add_argument("--delay", type=float, default=5.0, help="seconds that every read of the disk takes")


def run(args: Any) -> Mapping[str, float]:
    console = Console(stderr=True)

    def prompt(seed: int) -> str:
        return " ".join(random.Random(seed).choices(WORDS, k=args.tokens))

    def ttft(engine: EngineProcess, text: str) -> float:
        engine.forget()
        (answer,) = engine.generate([text], 2)
        return answer.ttft_seconds

    slow = Faults()
    opened = kvstore.assembly.open_disk

    async def open_disk(*given: Any) -> Tier:
        return Faulty(await opened(*given), slow)

    stored = [prompt(seed) for seed in range(args.rounds + 1)]
    with tempfile.TemporaryDirectory() as name, mock.patch("kvstore.assembly.open_disk", open_disk):
        folder = Path(name)
        model = make_model(folder / "model", stored, MEDIUM)
        socket = folder / "node" / "node.sock"
        socket.parent.mkdir()
        with cpu_engine(model, folder / "engine.log", socket, threads=1, max_model_len=2048) as engine:
            with RunningNode(socket.parent, *SIZES, "node.drain_seconds=60") as node:
                engine.ready()
                wait_for(lambda: _engines(node))
                for text in stored:
                    ttft(engine, text)
                with Client(node.socket, name="study") as client:
                    if not client.call("drain", 65, timeout=60.0)["drained"]:
                        raise RuntimeError("the disk is too slow for what was stored")
            slow = Faults(delay=args.delay)
            with RunningNode(socket.parent, *SIZES) as node:
                wait_for(lambda: _engines(node))
                new = itertools.count(1000)
                wait_for(lambda: ttft(engine, prompt(next(new))) and _steps(node) >= 3)
                ratios = []
                for number, text in enumerate(stored):
                    computed = ttft(engine, prompt(2000 + number))
                    offered = ttft(engine, text)
                    ratios.append(offered / computed)
                    console.print(f"round {number}: {computed:.3f} s new, {offered:.3f} s on the slow disk")
                counters = _call(node, "status")["counters"]
    return {
        "ratio_to_recompute": statistics.median(ratios[1:]),
        "ratio_worst": max(ratios[1:]),
        "ratio_trial": ratios[0],
        "recomputed": counters.get("kvstore_planned_requests_total{reason=recompute}", 0.0),
    }


def _call(node: RunningNode, verb: str) -> Any:
    with Client(node.socket, name="study") as client:
        return client.call(verb)


def _engines(node: RunningNode) -> bool:
    """The engine's scheduler and its worker are connected."""
    return sum(client["name"] == "vLLM" for client in _call(node, "status")["clients"]) == 2


def _steps(node: RunningNode) -> float:
    """Engine steps that the planner has learnt from."""
    return sum(engine["prefill"]["steps"] for engine in _call(node, "planner")["engines"])


STUDY = Study(
    name="slowtier",
    summary="vLLM (70M parameters, CPU) over a disk slower than computing: time to first token over that of a new prompt",
    run=run,
    targets={"ratio_to_recompute": "<=1.1", "recomputed": ">=1"},
    arguments=arguments,
)
