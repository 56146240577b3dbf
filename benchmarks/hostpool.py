"""What SGLang's host pool would gain if the node read from disk straight into it, in alternating rounds.

``arena`` is what the backend does: the node reads a window of blocks into its arena while the backend copies the one before from
there to SGLang's pages. ``direct`` is the most that a node could do which maps the pool (SGLang's shared-memory allocator): the
same tier verifies the same blocks straight into memory that is the pool's, without socket, lease or copy. ``host`` is a load of
blocks that are in the arena already, where a copy cannot be saved: it is how they get to the pool.

Node and backend share a process here, and so an interpreter, which slows ``arena`` down and not ``direct``: what is shown to be
gained is an upper bound.
"""

from __future__ import annotations

import asyncio
import resource
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from benchmarks.study import Study
from connectors.link import Link
from connectors.sglang.options import Options
from connectors.sglang.pages import CanonicalPages
from connectors.sglang.transfers import PoolTransfers
from kvstore.envelope import HEADER_BYTES
from kvstore.identity import BlockKey, Namespace, chain_digests
from kvstore.layout import BlockLayout
from kvstore.node.client import Client
from kvstore.testing.blocks import aligned_buffer
from kvstore.testing.node import RunningNode, wait_for

LAYOUT = BlockLayout(tokens=64, layers=32, kv_heads=8, head_dim=128, itemsize=2)
"""8 MiB: an 8B model with GQA in bf16, 64 tokens."""
ORDERS = {
    "page_head": ("kv", "page", "head", "token", "layer"),
    "page_first": ("kv", "page", "token", "layer", "head"),
}
AT_ONCE = 16
"""Blocks read at a time: as many as the backend has on their way, two chunks."""
SWITCH_INTERVAL_SECONDS = 0.0002
"""What a node sets; see its server."""


@dataclass(frozen=True)
class Sample:
    """One load of all blocks."""

    seconds: float
    cpu_seconds: float


def arguments(parser: Any) -> None:
    parser.add_argument("--directory", type=Path, default=Path(), help="where to put the node's files (default: here)")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--blocks", type=int, default=48, help="blocks of 8 MiB per load")


def run(args: Any) -> Mapping[str, float]:
    previous = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH_INTERVAL_SECONDS)
    try:
        with tempfile.TemporaryDirectory(prefix="hostpool-study-", dir=args.directory) as folder:
            return _compare(Path(folder), args.blocks, args.rounds)
    finally:
        sys.setswitchinterval(previous)


def _compare(folder: Path, blocks: int, rounds: int) -> Mapping[str, float]:
    nbytes = blocks * LAYOUT.nbytes
    sizes = [f"host.bytes={2 * nbytes}", f"host.extent_bytes={nbytes // 4}", f"disk.bytes={2 * nbytes + (256 << 20)}"]
    samples: dict[str, list[Sample]] = defaultdict(list)
    with RunningNode(folder, *sizes, "disk.segment_bytes=256MiB", "node.log_level=warning") as node:
        with _pool(node, "page_head", blocks) as page_head, _pool(node, "page_first", blocks) as page_first:
            page_head.save()
            while (
                len(node.node.store.tiers[1].keys()) < blocks
            ):  # what a full queue kept from the disk gets there when used
                _in_node(node, node.node.store.drain(60.0))
                page_head.load()
            slot = LAYOUT.nbytes + HEADER_BYTES
            mapping = aligned_buffer(blocks * slot)
            into = [mapping[at : at + slot] for at in range(0, len(mapping), slot)]
            contestants: dict[str, Callable[[], None]] = {
                "arena": lambda: page_head.load_from_disk(node),
                "arena_page_first": lambda: page_first.load_from_disk(node),
                "direct": lambda: _direct(node, page_head.keys, into),
                "host": page_head.load,
                "host_page_first": page_first.load,
            }
            for number in range(rounds + 1):
                for name in contestants if number % 2 else [*contestants][::-1]:
                    if name in ("arena", "arena_page_first"):
                        _forget(node, page_head.keys)
                    else:
                        page_head.load()
                    sample = _measured(contestants[name])
                    if number:  # the first round maps memory
                        samples[name].append(sample)
    gb = nbytes / 1e9
    figures = {}
    for name, of in samples.items():
        figures[f"{name}_gb_per_s"] = statistics.median(gb / sample.seconds for sample in of)
        figures[f"{name}_cpu_s_per_gb"] = statistics.median(sample.cpu_seconds / gb for sample in of)
    for name in ("arena", "arena_page_first"):
        ratios = sorted(a.seconds / d.seconds for a, d in zip(samples[name], samples["direct"], strict=True))
        figures[f"{name}_time_by_direct"] = statistics.median(ratios)
        figures[f"{name}_time_by_direct_low"], figures[f"{name}_time_by_direct_high"] = ratios[0], ratios[-1]
    return dict(sorted(figures.items()))


def _measured(load: Callable[[], None]) -> Sample:
    before, started = _cpu_seconds(), time.perf_counter()
    load()
    return Sample(time.perf_counter() - started, _cpu_seconds() - before)


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


class _Pool:
    """A host pool of one rank as SGLang lays it out, and our backend's transfers over it."""

    def __init__(self, node: RunningNode, layout: str, blocks: int) -> None:
        axes = {"kv": 2, "page": blocks, "head": LAYOUT.kv_heads, "token": LAYOUT.tokens, "layer": LAYOUT.layers}
        shape = [axes[axis] for axis in ORDERS[layout]]
        buffer = torch.empty(*shape, LAYOUT.head_dim, dtype=torch.bfloat16).share_memory_()
        buffer.view(torch.uint8).random_(0, 256)
        pool = SimpleNamespace(
            layout=layout, kv_buffer=buffer, size=blocks * LAYOUT.tokens, page_size=LAYOUT.tokens, head_num=LAYOUT.kv_heads,
            layer_num=LAYOUT.layers,
        )  # fmt: skip
        self._client = Client(node.socket)
        namespace = Namespace(
            model="study", weights="1", dtype="bfloat16", layers=LAYOUT.layers, kv_heads=LAYOUT.kv_heads,
            head_dim=LAYOUT.head_dim, attention="gqa", rope="", block_tokens=LAYOUT.tokens, layout=LAYOUT.name,
        )  # fmt: skip
        link = Link(self._client, namespace, LAYOUT.nbytes)
        pages = CanonicalPages(pool, LAYOUT, (0, LAYOUT.kv_heads))
        binding: Any = SimpleNamespace(namespace=namespace, pages=pages, part=0, parts=1)
        recorder: Any = SimpleNamespace(count=_ignore, loaded=_ignore, saved=_ignore)
        self._transfers = PoolTransfers("kv", binding, self._client, link, Options(load_timeout_s=600.0), recorder)
        wait_for(lambda: link.keyring is not None)
        assert link.keyring is not None
        digests = chain_digests(list(range(blocks * LAYOUT.tokens)), LAYOUT.tokens)
        self._hashes = [digest.hex() for digest in digests]
        self._slots = torch.arange(blocks * LAYOUT.tokens)
        self.keys: Sequence[BlockKey] = link.keyring.block_keys(digests)

    def save(self) -> None:
        assert all(self._transfers.save(self._hashes, self._slots, []))

    def load(self) -> None:
        assert all(self._transfers.load(self._hashes, self._slots))

    def load_from_disk(self, node: RunningNode) -> None:
        assert not node.node.store.host.keys()
        self.load()

    def close(self) -> None:
        self._transfers.close()


@contextmanager
def _pool(node: RunningNode, layout: str, blocks: int) -> Iterator[_Pool]:
    pool = _Pool(node, layout, blocks)
    try:
        yield pool
    finally:
        pool.close()


def _forget(node: RunningNode, keys: Sequence[BlockKey]) -> None:
    """Empty the host tier, whose leases the node takes back in its own time."""
    store = node.node.store
    wait_for(lambda: not store.host.keys() or not _in_node(node, store.drop(store.host, keys)))


def _direct(node: RunningNode, keys: Sequence[BlockKey], into: Sequence[memoryview]) -> None:
    async def read() -> None:
        window = asyncio.Semaphore(AT_ONCE)

        async def one(key: BlockKey, buffer: memoryview) -> None:
            async with window:
                await node.node.store.tiers[1].get(key, buffer)

        await asyncio.gather(*map(one, keys, into))

    _in_node(node, read())


def _in_node(node: RunningNode, work: Any) -> Any:
    return asyncio.run_coroutine_threadsafe(work, node._loop).result()


def _ignore(*_: object) -> None:
    pass


STUDY = Study(
    name="hostpool",
    summary="SGLang's host pool: loads from disk through the node's arena, and straight into the pool",
    run=run,
    arguments=arguments,
)
