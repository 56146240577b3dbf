"""The node through its socket: lookups, saves and loads of several clients, and the memory of a large index."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.study import Study
from kvstore.identity import NO_PARENT, BlockKey, Namespace, chain_digests
from kvstore.node.api import NewBlock
from kvstore.node.client import Client
from kvstore.testing.node import NodeProcess

CHAIN = 2048
BLOCK_BYTES = 8 << 20
BATCH = 16
ROUNDS = 15
CLIENTS = 16
WARM_UP = 9
"""Rounds until every slot of the arena was used once: a node in service recycles slots."""
HOST_BYTES = 1 << 30
MAPPINGS = 9
BUSY_HOST_BYTES = 3 << 30
BUSY_BLOCKS = 2048
"""Of 8 MiB, saved over and over: more than memory and disk hold."""
BUSY_SECONDS = 20.0
BUSY_SAVES_GBPS = 2.0
BETWEEN_LOOKUPS = 0.002
"""Seconds."""


def run(args: Any) -> Mapping[str, float]:
    figures: dict[str, float] = {"node_heap_mb_1m_blocks": heap_megabytes(1_000_000)}
    with node_process(HOST_BYTES) as socket_path, Client(socket_path) as client:
        figures |= lookup_figures(client)
        figures |= copy_figures(client)
        figures |= mapping_figures(socket_path)
        figures |= crowd_figures(socket_path)
    return figures | busy_figures()


@contextmanager
def node_process(host_bytes: int, *more: str) -> Iterator[Path]:
    """The socket of a node of its own process: host tier only, unless ``more`` settings name others."""
    settings = [f"host.bytes={host_bytes}", "disk.enabled=false", "node.log_level=warning", *more]
    with tempfile.TemporaryDirectory() as directory, NodeProcess(Path(directory), *settings) as node:
        yield node.socket


def namespace(name: str, block_tokens: int = 64) -> Namespace:
    return Namespace(
        model=name, weights="1", dtype="bfloat16", layers=32, kv_heads=8, head_dim=128, attention="gqa", rope="",
        block_tokens=block_tokens, layout="canonical:kv_head_token_layer",
    )  # fmt: skip


def chain(client: Client, space: Namespace, block_bytes: int, blocks: int, seed: int) -> list[NewBlock]:
    keyring = client.open_namespace(space, block_bytes)
    tokens = np.random.default_rng(seed).integers(0, 128_000, blocks * space.block_tokens).astype(np.uint32)
    keys = keyring.block_keys(chain_digests(tokens, space.block_tokens))
    return [NewBlock(key, keys[i - 1] if i else NO_PARENT, i) for i, key in enumerate(keys)]


def lookup_figures(client: Client) -> dict[str, float]:
    space = namespace("lookup")
    blocks = chain(client, space, 1024, CHAIN, seed=1)
    keys = [block.key for block in blocks]
    client.reserve(space, blocks)
    client.commit(keys)
    samples = []
    for _ in range(300):
        started = time.perf_counter()
        found = client.lookup(keys, timeout=5.0)
        samples.append((time.perf_counter() - started) * 1e6)
        assert found.blocks == CHAIN
    client.call("delete", keys=b"".join(keys))
    return {
        "lookup_2048_us": statistics.median(samples),
        "lookup_2048_us_p99": sorted(samples)[int(len(samples) * 0.99)],
    }


def copy_figures(client: Client) -> dict[str, float]:
    """One client moves batches of blocks; beside it, in turn, plain memcpy of the same bytes from and to the same memory."""
    space = namespace("copy")
    engine = np.random.default_rng(2).integers(0, 255, BATCH * BLOCK_BYTES, dtype=np.uint8)
    plain = np.zeros_like(engine)
    client.arena.populate()
    arena = np.frombuffer(client.arena.buffer, dtype=np.uint8)
    pieces = [slice(i * BLOCK_BYTES, (i + 1) * BLOCK_BYTES) for i in range(BATCH)]
    times: dict[str, list[float]] = {name: [] for name in ("memcpy_to", "save", "memcpy_from", "load")}

    def timed(name: str, work: Callable[[], None]) -> None:
        started = time.perf_counter()
        work()
        times[name].append(time.perf_counter() - started)

    before: list[int] = []
    for number in range(WARM_UP + ROUNDS):
        blocks = chain(client, space, BLOCK_BYTES, BATCH, seed=100 + number)
        keys = [block.key for block in blocks]
        offsets: list[int] = []

        def save(blocks: list[NewBlock] = blocks, offsets: list[int] = offsets) -> None:
            reserved = client.reserve(space, blocks)
            for piece, offset in zip(pieces, reserved.offsets, strict=True):
                assert offset is not None
                np.copyto(arena[offset : offset + BLOCK_BYTES], engine[piece])
                offsets.append(offset)

        def memcpy_to(offsets: list[int] = before) -> None:
            for piece, offset in zip(pieces, offsets, strict=False):
                np.copyto(arena[offset : offset + BLOCK_BYTES], engine[piece])

        def memcpy_from(offsets: list[int] = offsets) -> None:
            for piece, offset in zip(pieces, offsets, strict=True):
                np.copyto(plain[piece], arena[offset : offset + BLOCK_BYTES])

        def load(keys: list[BlockKey] = keys) -> None:
            acquired = client.acquire(keys, 5.0)
            assert len(acquired.offsets) == BATCH
            for piece, offset in zip(pieces, acquired.offsets, strict=True):
                np.copyto(plain[piece], arena[offset : offset + BLOCK_BYTES])
            client.release(keys)

        # The checksum is the node's work after the client went on: wait for it, so that it does not fall into the next timing.
        timed("memcpy_to", memcpy_to)  # to the slots of the round before: as long unused as those that the save gets
        timed("save", save)
        before = offsets
        client.commit(keys)
        timed("memcpy_from", memcpy_from)
        timed("load", load)
        assert np.array_equal(plain, engine)
    times = {name: samples[WARM_UP:] for name, samples in times.items()}
    median = {name: statistics.median(samples) for name, samples in times.items()}
    gigabytes = BATCH * BLOCK_BYTES / 1e9
    return {
        "save_gb_s": gigabytes / median["save"],
        "load_gb_s": gigabytes / median["load"],
        "save_ratio_to_memcpy": _ratio(times["memcpy_to"], times["save"]),
        "load_ratio_to_memcpy": _ratio(times["memcpy_from"], times["load"]),
    }


def mapping_figures(socket_path: Path) -> dict[str, float]:
    """How often a thread gets the interpreter while the arena of a node that was restarted is mapped beside it, against alone.

    As an engine's thread does with each of its operators, it gives the interpreter lock away and takes it again.
    """
    shares = []
    for _ in range(MAPPINGS):
        with Client(socket_path) as client:
            beside = _turns_per_second(threading.Thread(target=client.arena.populate))
        shares.append(beside / _turns_per_second(threading.Thread(target=time.sleep, args=(0.3,))))
    return {"turns_while_mapping": statistics.median(shares)}


def _turns_per_second(beside: threading.Thread) -> float:
    started, turns = time.perf_counter(), 0
    beside.start()
    while beside.is_alive():
        time.sleep(0.0002)
        turns += 1
    return turns / (time.perf_counter() - started)


def crowd_figures(socket_path: Path) -> dict[str, float]:
    """Lookups of 16 clients at once, each a process's worth of work in a thread."""
    samples: list[float] = []
    barrier = threading.Barrier(CLIENTS)

    def work(number: int) -> None:
        with Client(socket_path) as client:
            space = namespace(f"crowd{number}")
            keys = [block.key for block in chain(client, space, 1024, 256, seed=1000 + number)]
            barrier.wait()
            for _ in range(50):
                started = time.perf_counter()
                client.lookup(keys, timeout=10.0)
                samples.append((time.perf_counter() - started) * 1e6)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(CLIENTS)]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return {
        "lookups_per_second_16_clients": len(samples) / (time.perf_counter() - started),
        "lookup_256_us_16_clients": statistics.median(samples),
    }


def busy_figures() -> dict[str, float]:
    """Lookups of 512 blocks while another client saves as much as a node can write to its disk and its bucket, or more."""
    stop, samples = threading.Event(), []
    with tempfile.TemporaryDirectory() as bucket:
        more = ("disk.enabled=true", "disk.bytes=6GiB", f"object.url=file://{bucket}")
        with node_process(BUSY_HOST_BYTES, *more) as socket_path, Client(socket_path) as asking:
            keys = [block.key for block in chain(asking, namespace("asked"), BLOCK_BYTES, 512, seed=3)]
            saving = threading.Thread(target=_save_until, args=(socket_path, stop))
            saving.start()
            until = time.perf_counter() + BUSY_SECONDS
            while time.perf_counter() < until:
                started = time.perf_counter()
                asking.lookup(keys, timeout=10.0)
                samples.append((time.perf_counter() - started) * 1e3)
                time.sleep(BETWEEN_LOOKUPS)
            stop.set()
            saving.join()
    return {
        "lookup_512_ms_beside_writes": statistics.median(samples),
        "lookup_512_ms_beside_writes_p99": sorted(samples)[int(len(samples) * 0.99)],
    }


def _save_until(socket_path: Path, stop: threading.Event) -> None:
    space = namespace("saved")
    with Client(socket_path) as client:
        blocks = chain(client, space, BLOCK_BYTES, BUSY_BLOCKS, seed=4)
        started, saved = time.perf_counter(), 0
        while not stop.is_set():
            at = saved % BUSY_BLOCKS
            reserved = client.reserve(space, blocks[at : at + BATCH], timeout=10.0)
            taken = zip(blocks[at : at + BATCH], reserved.offsets, strict=True)
            client.commit([block.key for block, offset in taken if offset is not None], timeout=10.0)
            saved += BATCH
            time.sleep(max(0.0, started + saved * BLOCK_BYTES / (BUSY_SAVES_GBPS * 1e9) - time.perf_counter()))


_HEAP = """
import json, os, sys
from kvstore.envelope import Header
from kvstore.identity import BlockKey, NO_PARENT
import kvstore.node.server  # what a node has loaded
import obstore
from kvstore.index import BlockIndex
index = BlockIndex()
parent = NO_PARENT
for number in range(int(sys.argv[1])):
    key = BlockKey(os.urandom(16))
    index.add(Header(key=key, namespace=b"n" * 16, parent=parent, index=number % 2048, tokens=64, length=8 << 20, crc=0),
              number << 23, 0.0)
    parent = key if number % 2048 < 2047 else NO_PARENT
rss = int(next(line for line in open("/proc/self/status") if line.startswith("VmRSS")).split()[1])
print(json.dumps(rss / 1000))
"""


def heap_megabytes(blocks: int) -> float:
    """Resident memory of a process with a node's code and this many blocks in a tier's index."""
    done = subprocess.run(
        [sys.executable, "-c", _HEAP, str(blocks)], check=True, capture_output=True, text=True, env=os.environ
    )
    megabytes: float = json.loads(done.stdout)
    return megabytes


def _ratio(ceiling: list[float], ours: list[float]) -> float:
    """Median of the per-round ratios: rounds are interleaved, so a slow moment of the machine slows both."""
    return statistics.median(theirs / mine for theirs, mine in zip(ceiling, ours, strict=True))


STUDY = Study(
    name="node",
    summary="The node through its socket: 2,048-block lookups, 8 MiB blocks against memcpy, memory of 1M blocks",
    run=run,
    targets={
        "lookup_2048_us": "<1000",
        "save_ratio_to_memcpy": ">=0.9",
        "load_ratio_to_memcpy": ">=0.9",
        "turns_while_mapping": ">=0.8",
        "node_heap_mb_1m_blocks": "<300",
    },
)
