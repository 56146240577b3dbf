"""Paging between GPU and arena against pinned memcpy of the same bytes, and what it costs a decoding engine.

Everything is measured in interleaved rounds on one GPU: each round times the ceiling and the pager, for every geometry. Blocks
are gathered from and scattered to random 16-token pages of vLLM's NHD layout; the arena is a real one, in ``/dev/shm``.
"""

from __future__ import annotations

import random
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from benchmarks.study import Study
from kvstore.layout import BlockLayout
from kvstore.node.arena import Arena

PAGE_TOKENS = 16
HEADER_BYTES = 4096
ARENA_BYTES = 4 << 30
ROUND_BYTES = 1 << 30
ROUNDS = 7
DECODE_SECONDS = 1.5


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

    def _copies(self, pages: Sequence[int], per_block: int) -> list[Any]:
        from connectors.paging.base import BlockCopy

        slot = self.geometry.slot
        return [
            BlockCopy(tuple(pages[i * per_block : (i + 1) * per_block]), i * slot + HEADER_BYTES)
            for i in range(self.geometry.blocks)
        ]

    def save(self, part: slice = slice(None), batch: int = 0) -> Any:
        return self.pager.save(self.arena, self.batches[batch][part])

    def load(self, part: slice = slice(None), batch: int = 1) -> Any:
        return self.pager.load(self.arena, self.batches[batch][part])

    def both(self) -> None:
        """Half of the blocks out while the other half comes in."""
        half = self.geometry.blocks // 2
        transfers = [self.save(slice(0, half)), self.load(slice(half, 2 * half))]
        for transfer in transfers:
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

    def torch_save(self, staging: Any) -> None:
        """The same bytes with torch alone: one index per layer and half, then one copy to pinned memory."""
        import torch

        block = self.geometry.block
        for copy in self.batches[0]:
            ids = torch.tensor(copy.pages, device="cuda")
            rows = [plane[ids].flatten(0, 1) for half in self.pages.planes for plane in half]
            moved = (
                torch.stack(rows).view(block.kv, block.layers, block.tokens, -1, block.head_dim).permute(0, 3, 2, 1, 4)
            )
            staging[: self.geometry.share].copy_(moved.contiguous().view(torch.uint8).view(-1), non_blocking=True)
        torch.cuda.synchronize()

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


class Decode:
    """What one decode step of an 8B-sized model asks of a GPU: reads all weights and a KV cache, computes little."""

    LAYERS = 40

    def __init__(self) -> None:
        import torch

        self.weights = [torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda") for _ in range(self.LAYERS)]
        self.keys = [torch.randn(8, 8, 4096, 128, dtype=torch.bfloat16, device="cuda") for _ in range(2)]
        self.queries = torch.randn(8, 8, 1, 128, dtype=torch.bfloat16, device="cuda")
        self.hidden = torch.randn(8, 8192, dtype=torch.bfloat16, device="cuda")

    def step(self) -> None:
        import torch

        hidden = self.hidden
        for weight in self.weights:
            hidden = hidden @ weight
            torch.nn.functional.scaled_dot_product_attention(self.queries, self.keys[0], self.keys[1])

    def seconds(self, between: Callable[[], None]) -> float:
        """Median seconds of a step; ``between`` runs on the host after each is enqueued."""
        import torch

        events = [torch.cuda.Event(enable_timing=True)]
        events[0].record()
        started = time.perf_counter()
        while time.perf_counter() - started < DECODE_SECONDS:
            self.step()
            events.append(torch.cuda.Event(enable_timing=True))
            events[-1].record()
            between()
            if len(events) > 3:  # an engine runs one or two steps ahead of its GPU, not more
                events[-3].synchronize()
        torch.cuda.synchronize()
        times = [a.elapsed_time(b) / 1e3 for a, b in pairwise(events)]
        return statistics.median(times[2:])


def timed(work: Callable[[], object], nbytes: int) -> float:
    """GB/s of one run."""
    import torch

    torch.cuda.synchronize()
    started = time.perf_counter()
    work()
    return nbytes / (time.perf_counter() - started) / 1e9


def bandwidth(rig: Rig, memcpy: Memcpy) -> dict[str, float]:
    """Medians of GB/s over interleaved rounds."""
    nbytes = rig.bytes
    runs: dict[str, Callable[[], object]] = {
        "memcpy_out": lambda: memcpy.out(nbytes),
        "offload": lambda: rig.save().wait(),
        "memcpy_back": lambda: memcpy.back(nbytes),
        "reload": lambda: rig.load().wait(),
        "memcpy_both": lambda: memcpy.both(nbytes),
        "both": rig.both,
        "torch_offload": lambda: rig.torch_save(memcpy.host[0]),
    }
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(ROUNDS):
        for name, work in runs.items():
            samples[name].append(timed(work, nbytes))
    return {name: statistics.median(values[1:]) for name, values in samples.items()}


@dataclass
class Offloading:
    """Keeps saves of ``rig`` in flight, as long as it is called again and again."""

    rig: Rig
    flying: list[Any] = field(default_factory=list)
    blocks: int = 0

    def __call__(self) -> None:
        self.flying = [transfer for transfer in self.flying if not transfer.done()]
        while len(self.flying) < 3:
            self.flying.append(self.rig.save(slice(0, 16)))
            self.blocks += 16


def decode_slowdown(rig: Rig, decode: Decode) -> dict[str, float]:
    """A decode loop beside offloading at full rate, against the loop alone, alternately."""
    ratios, rates = [], []
    for _ in range(3):
        quiet = decode.seconds(lambda: None)
        offloading = Offloading(rig)
        started = time.perf_counter()
        ratios.append(decode.seconds(offloading) / quiet)
        for transfer in offloading.flying:
            transfer.wait()
        rates.append(offloading.blocks * rig.geometry.share / (time.perf_counter() - started) / 1e9)
    return {"decode_slowdown": statistics.median(ratios), "decode_offload_gbps": statistics.median(rates)}


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
        gbps = bandwidth(rig, memcpy)
        print(geometry.name, {name: round(value, 1) for name, value in gbps.items()}, file=sys.stderr)
        figures |= {f"{name}_gbps_{geometry.name}": value for name, value in gbps.items()}
        if geometry is GEOMETRIES[0]:
            figures |= decode_slowdown(rig, Decode())
            torch.cuda.empty_cache()
        rig.close()

    def worst(ours: str, ceiling: str) -> float:
        return min(figures[f"{ours}_gbps_{g.name}"] / figures[f"{ceiling}_gbps_{g.name}"] for g in GEOMETRIES)

    return {
        "offload_ratio_to_memcpy": worst("offload", "memcpy_out"),
        "reload_ratio_to_memcpy": worst("reload", "memcpy_back"),
        "both_ratio_to_memcpy": worst("both", "memcpy_both"),
        **figures,
    }


STUDY = Study(
    name="gpu",
    summary="GPU pages to the arena and back, worst of four geometries against pinned memcpy, and beside decoding",
    run=run,
    targets={"offload_ratio_to_memcpy": ">=0.97", "reload_ratio_to_memcpy": ">=0.97", "decode_slowdown": "<1.03"},
)
