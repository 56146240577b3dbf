"""Several GPUs of one host save and load at once, into the same slots of one arena, against pinned memcpy on all at once.

One process a GPU, as the ranks of an engine with tensor parallelism are: each moves its own heads of every block of an 8B
model. A round's rate is the bytes of all ranks over the time of the slowest.
"""

from __future__ import annotations

import multiprocessing
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from multiprocessing.synchronize import Barrier
from typing import Any

from benchmarks.gpu import ARENA_BYTES, GEOMETRIES, ROUND_BYTES, ROUNDS, Memcpy, Rig
from benchmarks.study import Study
from kvstore.node.arena import Arena

START_SECONDS = 300.0
"""That a rank waits for the others: they compile, pin and allocate first."""


def measure(rank: int, ranks: int, arena: Arena, barrier: Barrier, results: Any) -> None:
    """A rank's process: seconds of every run of every round, and its bytes."""
    import torch

    torch.cuda.set_device(rank)
    block = GEOMETRIES[0].block
    heads = block.kv_heads // ranks
    rig = Rig(replace(GEOMETRIES[0], heads=(rank * heads, (rank + 1) * heads)), arena)
    rig.check()
    memcpy = Memcpy(min(rig.bytes, ROUND_BYTES))
    runs: dict[str, Callable[[], object]] = {
        "memcpy_out": lambda: memcpy.out(rig.bytes),
        "offload": lambda: rig.save().wait(),
        "memcpy_back": lambda: memcpy.back(rig.bytes),
        "reload": lambda: rig.load().wait(),
        "memcpy_both": lambda: memcpy.both(rig.bytes),
        "both": rig.both,
    }
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(ROUNDS):
        for name, work in runs.items():
            torch.cuda.synchronize()
            barrier.wait(START_SECONDS)
            started = time.perf_counter()
            work()
            seconds[name].append(time.perf_counter() - started)
    barrier.wait(START_SECONDS)
    rig.check()
    results.put((rig.bytes, seconds))
    rig.close()


def rates(results: list[tuple[int, Mapping[str, list[float]]]]) -> dict[str, float]:
    """Medians over the rounds of GB/s of all ranks together; the first round warms up."""
    nbytes = sum(of_rank for of_rank, _ in results)
    return {
        name: statistics.median(
            nbytes / max(times) / 1e9
            for times in list(zip(*(seconds[name] for _, seconds in results), strict=True))[1:]
        )
        for name in results[0][1]
    }


def run(args: Any) -> Mapping[str, float]:
    arena = Arena.create(ARENA_BYTES, epoch=1)
    processes = multiprocessing.get_context("fork")  # before CUDA is initialised; the arena's mapping is inherited
    barrier, results = processes.Barrier(args.gpus), processes.Queue()
    ranks = [
        processes.Process(target=measure, args=(rank, args.gpus, arena, barrier, results), daemon=True)
        for rank in range(args.gpus)
    ]
    for rank in ranks:
        rank.start()
    gbps = rates([results.get(timeout=START_SECONDS) for _ in ranks])
    for rank in ranks:
        rank.join()
    return {
        "offload_ratio_to_memcpy": gbps["offload"] / gbps["memcpy_out"],
        "reload_ratio_to_memcpy": gbps["reload"] / gbps["memcpy_back"],
        "both_ratio_to_memcpy": gbps["both"] / gbps["memcpy_both"],
        "gpus": args.gpus,
        **{f"{name}_gbps": value for name, value in gbps.items()},
    }


def arguments(parser: Any) -> None:
    parser.add_argument("--gpus", type=int, default=2, help="how many, of one host; a divisor of 8")


STUDY = Study(
    name="gpus",
    summary="Several GPUs of one host into one arena and back at once, against pinned memcpy on all of them at once",
    run=run,
    targets={"offload_ratio_to_memcpy": ">=0.97", "reload_ratio_to_memcpy": ">=0.97"},
    arguments=arguments,
)
