"""What SGLang's host pool gains when the backend reads the node's disk straight into it, in alternating rounds.

Loads of blocks that are on the node's disk only; node and backend are two processes, as they are for an engine. ``arena``: the
node reads into its memory, the backend copies from there to SGLang's pages, the next blocks being read meanwhile; with
``page_first`` the copy converts. ``straight``: the backend reads into the pages by itself, which SGLang's shared-memory allocator
turns on. ``raw`` is the ceiling: the same bytes read into the pool by as many threads, without asking for them and without
verifying them. ``host`` is a load of blocks that are in the node's memory, whose copy nothing spares. ``busy_`` is the same
beside a process for each core that computes and nothing else.
"""

from __future__ import annotations

import mmap
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
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
from kvstore.identity import Namespace, chain_digests
from kvstore.layout import BlockLayout
from kvstore.node.client import Client
from kvstore.node.protocol import join_keys
from kvstore.node.straight import THREADS, Read, StraightReads
from kvstore.testing.node import NodeProcess, wait_for

LAYOUT = BlockLayout(tokens=64, layers=32, kv_heads=8, head_dim=128, itemsize=2)
"""8 MiB: an 8B model with GQA in bf16, 64 tokens."""
ORDERS = {
    "page_head": ("kv", "page", "head", "token", "layer"),
    "page_first": ("kv", "page", "token", "layer", "head"),
}
FROM_DISK = ("arena", "arena_page_first", "straight", "busy_arena", "busy_straight")
RATIOS = (("arena", "straight"), ("arena_page_first", "straight"), ("busy_arena", "busy_straight"), ("straight", "raw"))


@dataclass(frozen=True)
class Sample:
    """One load of all blocks."""

    seconds: float
    node_cpu: float
    """Seconds."""
    backend_cpu: float


def arguments(parser: Any) -> None:
    parser.add_argument("--directory", type=Path, default=Path(), help="where to put the node's files (default: here)")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--blocks", type=int, default=32, help="blocks of 8 MiB per load")


def run(args: Any) -> Mapping[str, float]:
    with tempfile.TemporaryDirectory(prefix="hostpool-study-", dir=args.directory) as folder:
        return _compare(Path(folder), args.blocks, args.rounds)


def _compare(folder: Path, blocks: int, rounds: int) -> Mapping[str, float]:
    """In each round every contestant reads a prompt of its own: nothing below the node has it at hand."""
    nbytes = blocks * LAYOUT.nbytes
    disk = len(FROM_DISK) * blocks * (LAYOUT.nbytes + HEADER_BYTES)
    sizes = [
        f"host.bytes={2 * nbytes}",
        f"host.extent_bytes={nbytes // 4}",
        f"disk.bytes={2 * disk + (1 << 30)}",
    ]
    samples: dict[str, list[Sample]] = defaultdict(list)
    with NodeProcess(folder, *sizes, "disk.segment_bytes=256MiB", "node.log_level=warning") as node, _burners() as busy:
        pid = node.status()["pid"]
        with (
            _pool(node, "page_head", blocks) as copying,
            _pool(node, "page_first", blocks) as converting,
            _pool(node, "page_head", blocks, straight=True) as straight,
        ):
            pools = dict(zip(FROM_DISK, (copying, converting, straight, copying, straight), strict=True))
            for number in range(rounds + 1):
                # Where on the disk a prompt lies decides how fast it is read: everybody has every place in turn.
                turn = [*FROM_DISK[number % len(FROM_DISK) :], *FROM_DISK[: number % len(FROM_DISK)]]
                prompts = {name: len(FROM_DISK) * number + at for at, name in enumerate(turn)}
                for prompt in prompts.values():
                    _store(node, copying, prompt)
                for name in turn:
                    load = partial(pools[name].load, prompts[name])
                    with busy() if name.startswith("busy_") else nullcontext():
                        measured = {name: _measured(pid, load)}
                    if name == "straight":
                        measured["raw"] = _measured(pid, straight.read_again)
                    elif name == "arena":
                        measured["host"] = _measured(pid, load)
                    _forget(node, copying, prompts[name])
                    for each, sample in measured.items() if number else ():  # the first round maps memory
                        samples[each].append(sample)
                for prompt in prompts.values():
                    copying.client.call("delete", keys=copying.keys(prompt))
    return _figures(samples, nbytes / 1e9)


def _figures(samples: Mapping[str, Sequence[Sample]], gb: float) -> Mapping[str, float]:
    figures = {}
    for name, of in samples.items():
        figures[f"{name}_gb_per_s"] = statistics.median(gb / sample.seconds for sample in of)
        figures[f"{name}_node_cpu_s_per_gb"] = statistics.median(sample.node_cpu / gb for sample in of)
        figures[f"{name}_backend_cpu_s_per_gb"] = statistics.median(sample.backend_cpu / gb for sample in of)
    for one, other in RATIOS:
        for what, value in (("time", _seconds), ("cpu", _cpu)):
            ratios = sorted(value(a) / value(b) for a, b in zip(samples[one], samples[other], strict=True))
            name = f"{one}_{what}_by_{other}"
            figures |= {name: statistics.median(ratios), f"{name}_low": ratios[0], f"{name}_high": ratios[-1]}
    return dict(sorted(figures.items()))


@contextmanager
def _burners() -> Iterator[Callable[[], AbstractContextManager[None]]]:
    """Gives what keeps every core busy with something else, for as long as its context lasts."""
    burn = [sys.executable, "-c", "while True: pass"]
    processes = [subprocess.Popen(burn) for _ in range(os.cpu_count() or 1)]

    def send(number: int) -> None:
        for process in processes:
            process.send_signal(number)

    @contextmanager
    def busy() -> Iterator[None]:
        send(signal.SIGCONT)
        try:
            yield
        finally:
            send(signal.SIGSTOP)

    send(signal.SIGSTOP)
    try:
        yield busy
    finally:
        for process in processes:
            process.kill()
            process.wait()


def _seconds(sample: Sample) -> float:
    return sample.seconds


def _cpu(sample: Sample) -> float:
    return sample.node_cpu + sample.backend_cpu


def _measured(node: int, load: Callable[[], None]) -> Sample:
    node_before, own_before, started = _cpu_of(node), time.process_time(), time.perf_counter()
    load()
    seconds = time.perf_counter() - started
    return Sample(seconds, _cpu_of(node) - node_before, time.process_time() - own_before)


def _cpu_of(pid: int) -> float:
    """Seconds of CPU of another process: its clock, numbered as clock_getcpuclockid(3) does."""
    return time.clock_gettime(~pid << 3 | 2)


class _Pool:
    """A host pool of one rank as SGLang's shared-memory allocator lays it out, and our backend's transfers over it."""

    def __init__(self, node: NodeProcess, layout: str, blocks: int, straight: bool) -> None:
        axes = {"kv": 2, "page": blocks, "head": LAYOUT.kv_heads, "token": LAYOUT.tokens, "layer": LAYOUT.layers}
        shape = [axes[axis] for axis in ORDERS[layout]]
        memory = mmap.mmap(-1, blocks * LAYOUT.nbytes)
        buffer = torch.frombuffer(memory, dtype=torch.bfloat16).view(*shape, LAYOUT.head_dim)
        buffer.view(torch.uint8).random_(0, 256)
        pool = SimpleNamespace(
            layout=layout, kv_buffer=buffer, size=blocks * LAYOUT.tokens, page_size=LAYOUT.tokens, head_num=LAYOUT.kv_heads,
            layer_num=LAYOUT.layers,
        )  # fmt: skip
        self.client = Client(node.socket)
        namespace = Namespace(
            model="study", weights="1", dtype="bfloat16", layers=LAYOUT.layers, kv_heads=LAYOUT.kv_heads,
            head_dim=LAYOUT.head_dim, attention="gqa", rope="", block_tokens=LAYOUT.tokens, layout=LAYOUT.name,
        )  # fmt: skip
        self._link = Link(self.client, namespace, LAYOUT.nbytes)
        pages = CanonicalPages(pool, LAYOUT, (0, LAYOUT.kv_heads))
        binding: Any = SimpleNamespace(namespace=namespace, pages=pages, part=0, parts=1)
        recorder: Any = SimpleNamespace(count=_ignore, loaded=_ignore, saved=_ignore)
        options = Options(load_timeout_s=600.0, save_timeout_s=600.0)
        self._reads = _Remembering(self.client) if straight else None
        self._transfers = PoolTransfers("kv", binding, self.client, self._link, options, recorder, straight=self._reads)
        wait_for(lambda: self._link.keyring is not None)
        self.blocks = blocks
        self._slots = torch.arange(blocks * LAYOUT.tokens)
        self._again = ThreadPoolExecutor(THREADS)

    def save(self, prompt: int) -> None:
        assert all(self._transfers.save(self._hashes(prompt), self._slots, []))

    def load(self, prompt: int) -> None:
        assert all(self._transfers.load(self._hashes(prompt), self._slots))

    def read_again(self) -> None:
        """What was read straight last, as it comes."""
        assert self._reads is not None
        assert len(self._reads.last) == self.blocks, "not all was read straight"
        files = {
            path: os.open(path, os.O_RDONLY | os.O_DIRECT) for path in {read.slot.path for read in self._reads.last}
        }
        head = mmap.mmap(-1, HEADER_BYTES)

        def one(read: Read) -> int:
            return os.preadv(files[read.slot.path], [head, *read.pieces], read.slot.offset)

        assert sum(self._again.map(one, self._reads.last)) == self.blocks * (LAYOUT.nbytes + HEADER_BYTES)
        for fd in files.values():
            os.close(fd)

    def keys(self, prompt: int) -> bytes:
        assert self._link.keyring is not None
        return join_keys(self._link.keyring.block_keys(map(bytes.fromhex, self._hashes(prompt))))

    def close(self) -> None:
        self._transfers.close()
        self._again.shutdown()

    def _hashes(self, prompt: int) -> list[str]:
        tokens = [prompt, *range(1, self.blocks * LAYOUT.tokens)]
        return [digest.hex() for digest in chain_digests(tokens, LAYOUT.tokens)]


class _Remembering(StraightReads):
    last: Sequence[Read] = ()

    def read(self, reads: Sequence[Read], deadline: float) -> int:
        self.last = reads or self.last
        return super().read(reads, deadline)


@contextmanager
def _pool(node: NodeProcess, layout: str, blocks: int, straight: bool = False) -> Iterator[_Pool]:
    pool = _Pool(node, layout, blocks, straight)
    try:
        yield pool
    finally:
        pool.close()


def _store(node: NodeProcess, pool: _Pool, prompt: int) -> None:
    """Have a prompt on the disk and nowhere else."""
    wanted = node.blocks()["disk"] + pool.blocks
    pool.save(prompt)
    node.drain()
    while node.blocks()["disk"] < wanted:
        pool.load(prompt)  # what a full queue kept from the disk gets there when used
        node.drain()
    _forget(node, pool, prompt)


def _forget(node: NodeProcess, pool: _Pool, prompt: int) -> None:
    """Empty the host tier of the prompt in it, whose leases the node takes back in its own time."""
    while node.blocks()["host"]:
        pool.client.call("evict", medium="host", keys=pool.keys(prompt))


def _ignore(*_: object) -> None:
    pass


STUDY = Study(
    name="hostpool",
    summary="SGLang's host pool: loads from disk through the node's memory, and straight into the pool",
    run=run,
    targets={"arena_cpu_by_straight": ">=1.5"},
    arguments=arguments,
)
