"""The secondary tier under vLLM's own offloading, beside vLLM's own ``fs`` tier: both driven as vLLM's scheduler drives them.

Rows of vLLM's CPU tier are stored and loaded in jobs, and every byte is compared. ``fs`` writes files by direct I/O, without
checksum, ``fsync`` or cap, and reads them from the disk. The node publishes rows in host memory and writes them to its disk in
the background, within the same time; they are loaded from there, and once more, verified, from the disk of a node that was
restarted. A copy of the same rows in one thread is the yardstick for what the second copy under vLLM's CPU tier costs. No GPU is
involved.
"""

from __future__ import annotations

import mmap
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.study import Study
from kvstore.testing.node import NodeProcess

ROW_BYTES = 2 << 20
"""16 tokens of an 8B model with grouped queries, in 16 bits."""
ROWS, ROWS_PER_JOB = 128, 32
NODE = ("host.bytes=1GiB", "disk.bytes=1GiB", "disk.segment_bytes=256MiB")
COPY, THEIRS, OURS, DISK = "memcpy", "fs", "host", "disk"


def arguments(parser: Any) -> None:
    parser.add_argument("--rounds", type=int, default=5, help="rounds, each with all of them")


def run(args: Any) -> Mapping[str, float]:
    console = Console(stderr=True)
    pages = mmap.mmap(-1, ROWS * ROW_BYTES)
    memory = np.frombuffer(pages, np.uint8).reshape(ROWS, ROW_BYTES)
    primary = memoryview(pages).cast("B", (ROWS, ROW_BYTES))
    rows = np.random.default_rng(0).integers(0, 256, (ROWS, ROW_BYTES), dtype=np.uint8)
    memory[:] = rows
    speeds: dict[tuple[str, str], list[float]] = defaultdict(list)
    for number in range(args.rounds):
        speeds["load", COPY].append(_copied(memory, rows))
        with tempfile.TemporaryDirectory(prefix="kvstore-tier-") as folder:
            _theirs(Path(folder), primary, memory, rows, speeds)
        with tempfile.TemporaryDirectory(prefix="kvstore-tier-") as folder:
            _ours(Path(folder), primary, memory, rows, speeds)
        console.print(f"round {number + 1} of {args.rounds}")

    table = Table("GB/s, median (lowest to highest)", "store", "load")
    for name in (COPY, THEIRS, OURS, DISK):
        cells = [speeds.get((way, name), []) for way in ("store", "load")]
        table.add_row(name, *(f"{statistics.median(c):.2f} ({min(c):.2f} to {max(c):.2f})" if c else "" for c in cells))
    console.print(table)

    def ratio(ours: tuple[str, str], theirs: tuple[str, str]) -> float:
        return statistics.median(a / b for a, b in zip(speeds[ours], speeds[theirs], strict=True))

    return {
        "store_ratio_to_vllm_fs": ratio(("store", OURS), ("store", THEIRS)),
        "load_ratio_to_vllm_fs": ratio(("load", OURS), ("load", THEIRS)),
        "disk_load_ratio_to_vllm_fs": ratio(("load", DISK), ("load", THEIRS)),
        "load_ratio_to_memcpy": ratio(("load", OURS), ("load", COPY)),
        **{f"{way}_{name}_gbps": statistics.median(values) for (way, name), values in speeds.items()},
    }


Memory = np.ndarray[Any, np.dtype[np.uint8]]
Speeds = dict[tuple[str, str], list[float]]


def _copied(memory: Memory, rows: Memory) -> float:
    started = time.perf_counter()
    np.copyto(memory, rows)
    return _gbps(started)


def _theirs(folder: Path, primary: memoryview, memory: Memory, rows: Memory, speeds: Speeds) -> None:
    from vllm.v1.kv_offload.tiering.fs.manager import FileSystemTierManager

    tier = FileSystemTierManager(_spec(), primary, THEIRS, str(folder))
    speeds["store", THEIRS].append(_moved(tier, memory, rows, load=False))
    speeds["load", THEIRS].append(_moved(tier, memory, rows, load=True))
    tier.shutdown()


def _ours(folder: Path, primary: memoryview, memory: Memory, rows: Memory, speeds: Speeds) -> None:
    from connectors.vllm.tier import KVStoreTier

    settings = {"socket": str(folder / "node.sock"), "autostart": False, "weights": "1"}
    with NodeProcess(folder, *NODE) as node:
        tier = KVStoreTier(_spec(), primary, "KVStoreTier", **settings)
        _moved(tier, memory, rows, load=False, job=1, name=b"warm")  # arena mapped, namespace open
        node.drain()
        speeds["store", OURS].append(_moved(tier, memory, rows, load=False))
        node.drain()
        speeds["load", OURS].append(_moved(tier, memory, rows, load=True))
        tier.shutdown()
        node.stop()
        node.start()
        tier = KVStoreTier(_spec(), primary, "KVStoreTier", **settings)
        _moved(tier, memory, rows, load=True, job=1, name=b"warm")
        speeds["load", DISK].append(_moved(tier, memory, rows, load=True))
        tier.shutdown()


def _moved(tier: Any, memory: Memory, rows: Memory, load: bool, job: int = ROWS_PER_JOB, name: bytes = b"") -> float:
    """GB/s of all rows in jobs of ``ROWS_PER_JOB``, or of one row. Raises RuntimeError when a row is lost or wrong."""
    from vllm.v1.kv_offload.base import ReqContext, make_offload_key
    from vllm.v1.kv_offload.tiering.base import TransferJob

    places: Sequence[int] = range(1 if name else ROWS)
    memory[: len(places)] = 0 if load else rows[: len(places)]
    keys = [make_offload_key((name + place.to_bytes(4, "big")).ljust(32, b"."), 0) for place in places]
    started = time.perf_counter()
    for at in range(0, len(places), job):
        moved = TransferJob(at, keys[at : at + job], np.array(places[at : at + job]), load, ReqContext("r"))
        (tier.submit_load if load else tier.submit_store)(moved)
    tier.drain_jobs()
    speed = _gbps(started)
    if not all(result.success for result in tier.get_finished_jobs()):
        raise RuntimeError(f"{type(tier).__name__}: not every row was {'loaded' if load else 'stored'}")
    if not np.array_equal(memory[: len(places)], rows[: len(places)]):
        raise RuntimeError(f"{type(tier).__name__}: rows came back altered")
    return speed


def _gbps(started: float) -> float:
    return ROWS * ROW_BYTES / (time.perf_counter() - started) / 1e9


def _spec() -> Any:
    """What vLLM tells a tier of an engine with two layers, as far as tiers ask."""
    from vllm.v1.kv_offload.config import (
        OffloadingCacheConfig,
        OffloadingConfig,
        OffloadingGroupConfig,
        OffloadingModelConfig,
        OffloadingParallelConfig,
    )

    config = OffloadingConfig(
        groups=(OffloadingGroupConfig(16, ("layer.0", "layer.1"), 0),),
        worker_kv_bytes_per_block=ROW_BYTES,
        enable_kv_cache_events=False,
        extra_config={},
        engine_id="engine",
        model=OffloadingModelConfig("model", "bfloat16"),
        cache=OffloadingCacheConfig(16, 1),
        parallel=OffloadingParallelConfig(0, 1, 1, 1, 1, 1, 0, 1, None, True),
    )
    return SimpleNamespace(config=config, blocks_per_chunk=1, tokens_per_block=(16,), tokens_per_hash=16)


STUDY = Study(
    "vllmtier",
    "The secondary tier of vLLM's own offloading beside vLLM's own file tier",
    run,
    {"load_ratio_to_vllm_fs": ">=1"},
    arguments,
)
