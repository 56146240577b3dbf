"""What the connector costs an engine that never hits: vLLM with it against vLLM without it, on one CPU thread each.

Two engines on the same machine answer the same prompts in turn, each prompt new to both, so that everything is computed and,
by the one with the connector, looked up and saved. Which engine goes first alternates. ``cpu_ratio`` compares the processor
time of the engines' processes (saving threads included), which a busy machine does not blur.
"""

from __future__ import annotations

import random
import statistics
import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.study import Study
from connectors.vllm.testing import cpu_engine
from kvstore.testing.model import MEDIUM, make_model
from kvstore.testing.node import NodeProcess

ENGINE = {"max_model_len": 4096, "num_gpu_blocks_override": 512}
WORDS = [
    "river",
    "stone",
    "lamp",
    "quiet",
    "engine",
    "morning",
    "letter",
    "seven",
    "harbour",
    "yellow",
    "window",
    "garden",
]


def arguments(parser: Any) -> None:
    parser.add_argument("--rounds", type=int, default=40, help="pairs of requests")
    parser.add_argument("--tokens", type=int, default=512, help="prompt length")
    parser.add_argument("--output", type=int, default=16, help="tokens generated for each prompt")


def run(args: Any) -> Mapping[str, float]:
    console = Console(stderr=True)
    rng = random.Random(1)

    def prompt() -> str:
        return " ".join(rng.choices(WORDS, k=args.tokens))

    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        model = make_model(folder / "model", [prompt()], MEDIUM)
        node = stack.enter_context(NodeProcess(folder, "host.bytes=512MiB", "disk.enabled=false"))
        log = folder / "engines.log"
        plain = stack.enter_context(cpu_engine(model, log, threads=1, **ENGINE))
        connected = stack.enter_context(cpu_engine(model, log, node.socket, threads=1, **ENGINE))
        for engine in (plain, connected):
            engine.ready()
            for _ in range(2):
                engine.generate([prompt()], args.output)

        ratios: dict[str, list[float]] = {"slowdown": [], "slowdown_ttft": [], "cpu_ratio": []}
        for number in range(args.rounds):
            text = prompt()
            order = (plain, connected) if number % 2 else (connected, plain)
            wall, ttft, cpu = {}, {}, {}
            for engine in order:
                started, used = time.perf_counter(), engine.cpu_seconds
                (answer,) = engine.generate([text], args.output)
                wall[engine] = time.perf_counter() - started
                cpu[engine] = engine.cpu_seconds - used
                ttft[engine] = answer.ttft_seconds
            for name, figure in (("slowdown", wall), ("slowdown_ttft", ttft), ("cpu_ratio", cpu)):
                ratios[name].append(figure[connected] / figure[plain])
            console.print(f"round {number}: {wall[plain]:.3f} s without, {wall[connected]:.3f} s with")
        counters = connected.counters()
    saved = counters["vllm:kvstore_tokens_saved"]
    if counters.get("vllm:kvstore_tokens_loaded{host}") or saved < args.rounds * (args.tokens - 64):
        raise RuntimeError(f"the connector did not do the work that is measured: {counters}")
    return {**{name: statistics.median(values) for name, values in ratios.items()}, "tokens_saved": saved}


STUDY = Study(
    name="overhead",
    summary="vLLM with the connector at no hits against vLLM without it (70M-parameter model, CPU)",
    run=run,
    targets={"slowdown": "<1.02"},
    arguments=arguments,
)
