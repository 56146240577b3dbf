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
from dataclasses import dataclass
from typing import Any

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
DECODE_ROUNDS = 5
DECODE_BATCHES = 10
QUIET_SECONDS = 0.3
PREFILL_GBPS = 4.0
"""What a prefill of an 8B model makes at 30,000 tokens a second and 128 KiB a token."""
WARM_STEPS = 3


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
DECODED_BESIDE = GEOMETRIES[:2]
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

    def capture(self) -> None:
        """From now on a step is one CUDA graph, as vLLM decodes unless told not to."""
        import torch

        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.step()
        self.step = graph.replay  # type: ignore[method-assign]

    def seconds(self, busy: Callable[[], bool]) -> float:
        """Mean seconds of a step, stepping while ``busy`` says so."""
        import torch

        for _ in range(WARM_STEPS):
            self.step()
        events = []
        while len(events) < 2 or busy():
            self.step()
            events.append(torch.cuda.Event(enable_timing=True))
            events[-1].record()
            if len(events) > 2:  # an engine runs one or two steps ahead of its GPU, not more
                events[-3].synchronize()
        torch.cuda.synchronize()
        return events[0].elapsed_time(events[-1]) / 1e3 / (len(events) - 1)


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


def decode_slowdown(rig: Rig, memcpy: Memcpy) -> dict[str, float]:
    """A decode loop of CUDA graphs, as vLLM's, beside traffic; and an eager one, which shares the interpreter with the pager.

    At full rate offloading, and plain memcpy as the least that any offloading costs; and at the rate at which a prefill of an
    8B model makes new KV.
    """
    eager = beside(rig, decode := Decode(), memcpy)
    decode.capture()
    graphs = beside(rig, decode, memcpy)
    return {
        "decode_slowdown": graphs["offload"],
        "decode_slowdown_of_memcpy": graphs["memcpy"],
        "decode_slowdown_at_prefill_rate": graphs["prefill_rate"],
        "decode_offload_gbps": graphs["gbps"],
        "decode_slowdown_eager": eager["offload"],
        "decode_slowdown_eager_of_memcpy": eager["memcpy"],
    }


def beside(rig: Rig, decode: Decode, memcpy: Memcpy) -> dict[str, float]:
    """Medians of the loop's slowdown by traffic, each against the loop alone just before; and GB/s of saves."""
    samples: dict[str, list[float]] = {name: [] for name in ("offload", "memcpy", "prefill_rate", "gbps")}
    for _ in range(DECODE_ROUNDS):
        quiet = decode.seconds(Countdown(QUIET_SECONDS))
        started = time.perf_counter()
        saving = Underway([rig.save() for _ in range(DECODE_BATCHES)])
        samples["offload"].append(decode.seconds(saving) / quiet)
        samples["gbps"].append(DECODE_BATCHES * rig.bytes / (time.perf_counter() - started) / 1e9)
        copying = Underway([memcpy.start_out(rig.bytes) for _ in range(DECODE_BATCHES)])
        samples["memcpy"].append(decode.seconds(copying) / quiet)
        samples["prefill_rate"].append(decode.seconds(Paced(rig, QUIET_SECONDS)) / quiet)
    return {name: statistics.median(values) for name, values in samples.items()}


class Underway:
    """True until the last transfer has arrived."""

    def __init__(self, transfers: Sequence[Any]) -> None:
        self.last = transfers[-1]

    def __call__(self) -> bool:
        return not self.last.done()


class Paced:
    """True for ``seconds``, and saves at PREFILL_GBPS meanwhile."""

    def __init__(self, rig: Rig, seconds: float) -> None:
        self.rig, self.running, self.started, self.moved = rig, Countdown(seconds), time.perf_counter(), 0

    def __call__(self) -> bool:
        if self.moved < (time.perf_counter() - self.started) * PREFILL_GBPS * 1e9:
            self.rig.save(slice(0, 4))
            self.moved += 4 * self.rig.geometry.share
        return self.running()


class Countdown:
    """True for ``seconds``."""

    def __init__(self, seconds: float) -> None:
        self.end = time.perf_counter() + seconds

    def __call__(self) -> bool:
        return time.perf_counter() < self.end


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
        if geometry in DECODED_BESIDE:
            measured |= decode_slowdown(rig, memcpy)
            torch.cuda.empty_cache()
        print(geometry.name, {name: round(value, 3) for name, value in measured.items()}, file=sys.stderr)
        figures |= {f"{name}_{geometry.name}": value for name, value in measured.items()}
        rig.close()
    worst = {name: min(figures[f"{name}_ratio_{g.name}"] for g in GEOMETRIES) for name in CEILINGS}
    return {
        **{f"{name}_ratio_to_memcpy": value for name, value in worst.items()},
        **{
            name: max(figures[f"{name}_{g.name}"] for g in DECODED_BESIDE)
            for name in ("decode_slowdown", "decode_slowdown_eager")
        },
        **figures,
    }


STUDY = Study(
    name="gpu",
    summary="GPU pages to the arena and back, worst of four geometries against pinned memcpy, and beside decoding",
    run=run,
    targets={"offload_ratio_to_memcpy": ">=0.97", "reload_ratio_to_memcpy": ">=0.97", "decode_slowdown": "<1.03"},
)
