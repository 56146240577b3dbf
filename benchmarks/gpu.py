"""Paging between GPU and arena against pinned memcpy of the same bytes, and what it costs an engine that computes.

Everything is measured in interleaved rounds on one GPU: each round times the ceiling and the pager, for every geometry. Blocks
are gathered from and scattered to random 16-token pages of vLLM's NHD layout; the arena is a real one, in ``/dev/shm``.
"""

from __future__ import annotations

import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

from benchmarks.gpuloops import Countdown, Decode, Loop, Prefill
from benchmarks.gpupeers import PAGE_TOKENS, offloads
from benchmarks.study import Study
from kvstore.layout import BlockLayout
from kvstore.node.arena import Arena

HEADER_BYTES = 4096
ARENA_BYTES = 18 << 30
"""Room for a round of blocks of which only a rank's share is moved."""
ROUND_BYTES = 2 << 30
ROUNDS = 15
PEERS_EVERY = 5
"""Rounds from one measurement of the others to the next: torch takes seconds."""
CEILINGS = {"offload": "memcpy_out", "reload": "memcpy_back", "both": "memcpy_both"}
"""What each way of the pager is compared with."""
LOOP_ROUNDS = 5
ROUNDS_BESIDE = 4
"""Of bytes, that move while a loop is timed."""
QUIET_SECONDS = 0.3
PREFILL_GBPS = 4.0
"""What a prefill of an 8B model makes at 30,000 tokens a second and 128 KiB a token."""


@dataclass(frozen=True)
class Geometry:
    name: str
    block: BlockLayout
    heads: tuple[int, int]

    @property
    def share(self) -> int:
        first, stop = self.heads
        return self.block.nbytes // self.block.kv_heads * (stop - first)

    @property
    def slot(self) -> int:
        return self.block.nbytes + HEADER_BYTES

    @property
    def blocks(self) -> int:
        """Of one round: as many as the round's bytes or the arena take."""
        return min(ROUND_BYTES // self.share, ARENA_BYTES // self.slot)


GEOMETRIES = (
    Geometry("llama_3_8b", BlockLayout(64, 32, 8, 128, 2), (0, 8)),
    Geometry("llama_3_70b_tp8", BlockLayout(64, 80, 8, 128, 2), (3, 4)),
    Geometry("qwen3_32b", BlockLayout(64, 64, 8, 128, 2), (0, 8)),
    Geometry("deepseek_v3", BlockLayout(64, 61, 1, 576, 2, kv=1, order="token_layer"), (0, 1)),
)
BESIDE_LOOPS = GEOMETRIES[:2]
"""Copies of whole blocks, and short ones."""


class Rig:
    """A geometry's pages on the GPU, its pager, and two batches of copies of disjoint blocks."""

    def __init__(self, geometry: Geometry, arena: Arena) -> None:
        import torch

        from connectors.paging.cuda import CudaPager
        from connectors.paging.geometry import vllm_pages

        block, per_block = geometry.block, geometry.block.tokens // PAGE_TOKENS
        heads = geometry.heads[1] - geometry.heads[0]
        count = 2 * geometry.blocks * per_block
        shape = (count, PAGE_TOKENS, heads, block.kv * block.head_dim)
        self.caches = [torch.randn(shape, dtype=torch.bfloat16, device="cuda") for _ in range(block.layers)]
        self.pages = vllm_pages([cache.transpose(1, 2) for cache in self.caches], block, PAGE_TOKENS)
        self.pager = CudaPager(self.pages, block, geometry.heads)
        self.geometry, self.arena = geometry, arena
        self.bytes = geometry.blocks * geometry.share
        order = random.Random(1).sample(range(count), count)
        self.batches = [self._copies(order[half::2], per_block) for half in range(2)]
        middle = geometry.blocks // 2
        self.halves = self.batches[0][:middle], self.batches[1][middle : 2 * middle]

    def _copies(self, pages: Sequence[int], per_block: int) -> list[Any]:
        from connectors.paging.base import BlockCopy

        slot = self.geometry.slot
        return [
            BlockCopy(tuple(pages[i * per_block : (i + 1) * per_block]), i * slot + HEADER_BYTES)
            for i in range(self.geometry.blocks)
        ]

    def save(self, copies: Sequence[Any] = ()) -> Any:
        """These, or the whole first batch."""
        return self.pager.save(self.arena, copies or self.batches[0])

    def load(self, copies: Sequence[Any] = ()) -> Any:
        """These, or the whole second batch: into other pages than were saved."""
        return self.pager.load(self.arena, copies or self.batches[1])

    def both(self) -> None:
        """Half of the blocks out while the other half comes in."""
        out, back = self.halves
        for transfer in [self.save(out), self.load(back)]:
            transfer.wait()

    def check(self) -> None:
        """What the last save and load moved is what was there; raises if not."""
        import torch

        self.save().wait()
        self.load().wait()
        for cache in self.caches:
            ours = [page for copy in self.batches[0] for page in copy.pages]
            theirs = [page for copy in self.batches[1] for page in copy.pages]
            if not torch.equal(cache[ours], cache[theirs]):
                raise RuntimeError(f"{self.geometry.name}: pages came back different")

    def close(self) -> None:
        import torch

        self.pager.close()
        del self.caches, self.pages
        torch.cuda.empty_cache()


class Memcpy:
    """The ceiling: one pinned copy a direction."""

    def __init__(self, nbytes: int) -> None:
        import torch

        self.host = [torch.empty(nbytes, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
        self.device = [torch.empty(nbytes, dtype=torch.uint8, device="cuda") for _ in range(2)]
        self.streams = [torch.cuda.Stream() for _ in range(2)]

    def out(self, nbytes: int) -> None:
        self._run([(self.host[0], self.device[0])], nbytes)

    def start_out(self, nbytes: int) -> Any:
        import torch

        with torch.cuda.stream(self.streams[0]):
            self.host[0][:nbytes].copy_(self.device[0][:nbytes], non_blocking=True)
        return CopyTransfer(self.streams[0].record_event())

    def back(self, nbytes: int) -> None:
        self._run([(self.device[0], self.host[0])], nbytes)

    def both(self, nbytes: int) -> None:
        self._run([(self.host[0], self.device[0]), (self.device[1], self.host[1])], nbytes // 2)

    def _run(self, copies: Sequence[tuple[Any, Any]], nbytes: int) -> None:
        import torch

        for stream, (target, source) in zip(self.streams, copies, strict=False):
            with torch.cuda.stream(stream):
                target[:nbytes].copy_(source[:nbytes], non_blocking=True)
        torch.cuda.synchronize()


@dataclass(frozen=True)
class CopyTransfer:
    event: Any

    def done(self) -> bool:
        return bool(self.event.query())


def timed(work: Callable[[], object], nbytes: int) -> float:
    """GB/s of one run."""
    import torch

    torch.cuda.synchronize()
    started = time.perf_counter()
    work()
    return nbytes / (time.perf_counter() - started) / 1e9


def bandwidth(rig: Rig, memcpy: Memcpy) -> dict[str, float]:
    """Medians over interleaved rounds: GB/s; the pager's share of the ceiling in the same round, with its quartiles."""
    nbytes = rig.bytes
    runs: dict[str, Callable[[], object]] = {
        "memcpy_out": lambda: memcpy.out(nbytes),
        "offload": lambda: rig.save().wait(),
        "memcpy_back": lambda: memcpy.back(nbytes),
        "reload": lambda: rig.load().wait(),
        "memcpy_both": lambda: memcpy.both(nbytes),
        "both": rig.both,
    }
    peers = offloads(rig, memcpy.host[0])
    samples: dict[str, list[float]] = {name: [] for name in (*runs, *peers)}
    for work in (*runs.values(), *peers.values()):
        work()
    for turn in range(ROUNDS):
        for name, work in (runs | peers if turn % PEERS_EVERY == 0 else runs).items():
            samples[name].append(timed(work, nbytes))
    figures = {f"{name}_gbps": statistics.median(values) for name, values in samples.items()}
    for name, ceiling in CEILINGS.items():
        ratios = [ours / most for ours, most in zip(samples[name], samples[ceiling], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        figures |= {f"{name}_ratio": middle, f"{name}_ratio_low": low, f"{name}_ratio_high": high}
    return figures


def slowdowns(rig: Rig, memcpy: Memcpy) -> dict[str, float]:
    """Of loops beside traffic: decoding by CUDA graphs, as vLLM's, and eager, which needs the interpreter more; and prefill."""
    loops = {"decode": Decode().captured(), "decode_eager": Decode(), "prefill": Prefill()}
    figures = {}
    for name, loop in loops.items():
        measured = beside(rig, loop, memcpy)
        figures |= {f"{name}_slowdown{traffic}": value for traffic, value in measured.items()}
    return figures


def beside(rig: Rig, loop: Loop, memcpy: Memcpy) -> dict[str, float]:
    """Medians of a loop's slowdown by traffic, each against the loop alone just before; and GB/s of saves.

    Saves as fast as the pager lets them beside an engine; without its rests; plain memcpy, as the least that any offloading
    costs; saves at the rate at which a prefill of an 8B model makes new KV.
    """
    samples: dict[str, list[float]] = {}

    def saves() -> Underway:
        return Underway(rig.save(rig.batches[0] * ROUNDS_BESIDE))

    traffics: dict[str, Callable[[], Callable[[], bool]]] = {
        "": saves,
        "_without_rests": saves,
        "_of_memcpy": lambda: Underway([memcpy.start_out(rig.bytes) for _ in range(ROUNDS_BESIDE)][-1]),
        "_at_prefill_rate": lambda: Paced(rig, QUIET_SECONDS),
    }
    for _ in range(LOOP_ROUNDS):
        quiet = loop.seconds(Countdown(QUIET_SECONDS))
        for name, traffic in traffics.items():
            with without_rests() if name == "_without_rests" else nullcontext():
                started = time.perf_counter()
                samples.setdefault(name, []).append(loop.seconds(traffic()) / quiet)
                seconds = time.perf_counter() - started
            if traffic is saves:
                samples.setdefault(f"{name}_gbps", []).append(ROUNDS_BESIDE * rig.bytes / seconds / 1e9)
    return {name: statistics.median(values) for name, values in samples.items()}


@contextmanager
def without_rests() -> Iterator[None]:
    """Pagers save beside an engine that computes as if it did not."""
    from connectors.paging import cuda

    share = cuda.SAVING_SHARE
    cuda.SAVING_SHARE = 1.0
    try:
        yield
    finally:
        cuda.SAVING_SHARE = share


class Underway:
    """True until a transfer has arrived."""

    def __init__(self, transfer: Any) -> None:
        self.transfer = transfer

    def __call__(self) -> bool:
        return not self.transfer.done()


class Paced:
    """True for ``seconds``, and saves at PREFILL_GBPS meanwhile."""

    def __init__(self, rig: Rig, seconds: float) -> None:
        self.rig, self.running, self.started, self.moved = rig, Countdown(seconds), time.perf_counter(), 0

    def __call__(self) -> bool:
        if self.moved < (time.perf_counter() - self.started) * PREFILL_GBPS * 1e9:
            self.rig.save(self.rig.batches[0][:4])
            self.moved += 4 * self.rig.geometry.share
        return self.running()


def run(args: Any) -> Mapping[str, float]:
    import torch

    figures: dict[str, float] = {}
    arena = Arena.create(ARENA_BYTES, epoch=1)
    memcpy = Memcpy(ROUND_BYTES)
    for geometry in GEOMETRIES:
        rig = Rig(geometry, arena)
        started = time.perf_counter()
        rig.save().wait()
        print(f"{geometry.name}: pinning and first save {time.perf_counter() - started:.2f} s", file=sys.stderr)
        rig.check()
        measured = bandwidth(rig, memcpy)
        if geometry in BESIDE_LOOPS:
            measured |= slowdowns(rig, memcpy)
            torch.cuda.empty_cache()
        print(geometry.name, {name: round(value, 3) for name, value in measured.items()}, file=sys.stderr)
        figures |= {f"{name}_{geometry.name}": value for name, value in measured.items()}
        rig.close()
    worst = {name: min(figures[f"{name}_ratio_{g.name}"] for g in GEOMETRIES) for name in CEILINGS}
    return {
        **{f"{name}_ratio_to_memcpy": value for name, value in worst.items()},
        **{
            f"{name}_slowdown": max(figures[f"{name}_slowdown_{g.name}"] for g in BESIDE_LOOPS)
            for name in ("decode", "decode_eager", "prefill")
        },
        **figures,
    }


STUDY = Study(
    name="gpu",
    summary="GPU pages to the arena and back, worst of four geometries against pinned memcpy, and beside an engine",
    run=run,
    targets={"offload_ratio_to_memcpy": ">=0.97", "reload_ratio_to_memcpy": ">=0.97", "decode_slowdown": "<1.03"},
)
