"""Paging between GPU pages and the pinned arena with CuPy.

A save gathers a few blocks into a staging buffer in device memory and lets a copy engine bring them to their slots; a load is
the reverse. Every staging buffer has a stream of its own, so its kernels and copies need no synchronisation among themselves
and those of one buffer overlap with those of the next. The engine's stream is never made to wait: an event is recorded on it,
and ours wait for that.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np
import torch

from connectors.paging import kernels
from connectors.paging.base import BlockCopy, Pager
from connectors.paging.geometry import PagedKV, Share, Strides, strides
from kvstore.errors import ConfigError, IdentityError
from kvstore.layout import BlockLayout
from kvstore.node.arena import Arena

try:
    import cupy
    from cupy.cuda import runtime

    from connectors.paging.pinned import PinnedArena, pin
except ImportError as _missing:
    raise ConfigError(
        "cupy", None, f"GPU pages need CuPy, which does not import: {_missing}", "pip install 'llm-kvstore[gpu]'"
    ) from _missing

STAGING_BUFFERS = 2
"""Per direction: while one is on the bus, a kernel works on the other."""
STAGING_BYTES = 24 << 20
"""Of one buffer; four of them are 96 MiB of device memory."""
DIRECT_BELOW = 1 << 20
"""Runs shorter than this go between pages and arena in the kernel: a copy engine pays about 1 microsecond each."""
THREAD_BLOCKS = 32
"""Of one kernel: enough for several times the speed of the bus, on a quarter of the GPU."""
MAX_AHEAD = 32
"""Groups handed to CUDA and not finished. More would fill its launch queue, on which the engine's launches would wait too."""


class Direction(Enum):
    SAVE = "save"
    LOAD = "load"


class CudaTransfer:
    """A batch on its way; done when the last byte has arrived or the copy failed."""

    def __init__(self) -> None:
        self._handed_over = threading.Event()
        self._events: Sequence[Any] = ()
        self._error: Exception | None = None

    def done(self) -> bool:
        return self._handed_over.is_set() and all(event.done for event in self._events)

    def wait(self) -> None:
        self._handed_over.wait()
        if self._error is not None:
            raise self._error
        for event in self._events:
            event.synchronize()

    def handed_over(self, events: Sequence[Any]) -> None:
        self._events = events
        self._handed_over.set()

    def fail(self, error: Exception) -> None:
        self._error = error
        self._handed_over.set()


@dataclass(frozen=True, slots=True)
class _Job:
    arena: Arena
    copies: Sequence[BlockCopy]
    engine: Any
    """Event behind the engine's work so far."""
    transfer: CudaTransfer


class CudaPager(Pager):
    """One rank's pager for pages on one GPU.

    ``save`` and ``load`` only record an event and return; two threads, one a direction, hand the work to CUDA, and wait there
    until the slots in question are pinned. An empty batch starts the pinning of a new arena early.
    """

    def __init__(self, pages: PagedKV, block: BlockLayout, heads: tuple[int, int]) -> None:
        """Compile the kernels and allocate the staging buffers.

        Raises IdentityError when ``pages`` do not hold heads ``heads`` of such blocks, ConfigError when CuPy and torch are
        not built for the same CUDA.
        """
        check_versions()
        self.block_bytes = block.nbytes
        self._device = pages.sample.device
        share = Share.of(pages, block, heads)
        with cupy.cuda.Device(self._device.index):
            moves = Kernels(pages, share)
            self._lanes = {direction: _Lane(direction, pages, share, moves) for direction in Direction}

    def save(self, arena: Arena, copies: Sequence[BlockCopy]) -> CudaTransfer:
        return self._submit(Direction.SAVE, arena, copies)

    def load(self, arena: Arena, copies: Sequence[BlockCopy]) -> CudaTransfer:
        """Ordered after the engine's work enqueued so far: it may still use the pages for what they held before."""
        return self._submit(Direction.LOAD, arena, copies)

    def close(self) -> None:
        for lane in self._lanes.values():
            lane.close()

    def _submit(self, direction: Direction, arena: Arena, copies: Sequence[BlockCopy]) -> CudaTransfer:
        transfer = CudaTransfer()
        with cupy.cuda.Device(self._device.index):
            engine = cupy.cuda.Event(disable_timing=True)
            runtime.eventRecord(engine.ptr, torch.cuda.current_stream(self._device).cuda_stream)
        self._lanes[direction].submit(_Job(arena, tuple(copies), engine, transfer))
        return transfer


class Kernels:
    """Gather and scatter for one geometry, compiled on construction (or taken from CuPy's cache on disk)."""

    def __init__(self, pages: PagedKV, share: Share) -> None:
        self.max_blocks = kernels.max_blocks(pages, share)
        """Of one launch."""
        if not self.max_blocks:
            raise IdentityError(f"a block of {share.block.tokens} tokens has more than {kernels.MAX_PAGES} pages")
        constants = kernels.defines(pages, share)
        module = cupy.RawModule(code=kernels.SOURCE, options=tuple(f"-D{k}={v}" for k, v in constants.items()))
        self._gather = module.get_function("gather")
        self._scatter = module.get_function("scatter")
        self._planes = torch.tensor(kernels.addresses(pages), dtype=torch.int64, device=pages.sample.device)
        self._vectors = share.nbytes // kernels.vector_bytes(pages)
        self.device = pages.sample.device

    def gather(self, stream: Any, steps: Strides, payloads: Sequence[int], rows: Sequence[Sequence[int]]) -> None:
        """Pages to payloads at these addresses."""
        self._launch(self._gather, stream, steps, payloads, rows)

    def scatter(self, stream: Any, steps: Strides, payloads: Sequence[int], rows: Sequence[Sequence[int]]) -> None:
        """Payloads at these addresses to pages."""
        self._launch(self._scatter, stream, steps, payloads, rows)

    def _launch(
        self, kernel: Any, stream: Any, steps: Strides, payloads: Sequence[int], rows: Sequence[Sequence[int]]
    ) -> None:
        vectors = len(payloads) * self._vectors
        grid = min(THREAD_BLOCKS, -(-vectors // (kernels.THREADS * kernels.UNROLL)))
        with stream:
            kernel(
                (grid,),
                (kernels.THREADS,),
                (self._planes.data_ptr(), np.uint32(vectors), kernels.batch(steps, payloads, rows)),
            )


class _Staged:
    """Through a buffer in device memory that holds the shares of a group of blocks, one behind the other."""

    def __init__(self, share: Share, moves: Kernels) -> None:
        self.blocks = min(moves.max_blocks, STAGING_BYTES // share.nbytes)
        self._buffer = torch.empty(self.blocks * share.nbytes, dtype=torch.uint8, device=moves.device)
        self._share = share
        self._steps = strides(share.compact)
        self._moves = moves

    def save(
        self, stream: Any, arena: PinnedArena, offsets: Sequence[int], rows: Sequence[Sequence[int]], engine: Any
    ) -> None:
        stream.wait_event(engine)
        self._moves.gather(stream, self._steps, self._payloads(offsets), rows)
        for host, device, length in self._pieces(arena, offsets):
            runtime.memcpyAsync(host, device, length, runtime.memcpyDeviceToHost, stream.ptr)

    def load(
        self, stream: Any, arena: PinnedArena, offsets: Sequence[int], rows: Sequence[Sequence[int]], engine: Any
    ) -> None:
        for host, device, length in self._pieces(arena, offsets):
            runtime.memcpyAsync(device, host, length, runtime.memcpyHostToDevice, stream.ptr)
        stream.wait_event(engine)
        self._moves.scatter(stream, self._steps, self._payloads(offsets), rows)

    def _payloads(self, offsets: Sequence[int]) -> list[int]:
        return [self._buffer.data_ptr() + index * self._share.nbytes for index in range(len(offsets))]

    def _pieces(self, arena: PinnedArena, offsets: Sequence[int]) -> Iterator[tuple[int, int, int]]:
        """(address in the arena, address in the buffer, length) of what one copy can move."""
        for offset, device in zip(offsets, self._payloads(offsets), strict=True):
            for run in self._share.runs:
                for piece in arena.pieces(offset + run.offset, run.length):
                    yield arena.address + piece.offset, device, piece.length
                    device += piece.length


class _Direct:
    """Straight between pages and the registered arena, over the bus, in the kernel."""

    def __init__(self, share: Share, moves: Kernels) -> None:
        self.blocks = max(1, min(moves.max_blocks, STAGING_BYTES // share.nbytes))
        self._steps = strides(share.block)
        self._first = share.heads[0] * self._steps.head
        self._moves = moves

    def save(
        self, stream: Any, arena: PinnedArena, offsets: Sequence[int], rows: Sequence[Sequence[int]], engine: Any
    ) -> None:
        stream.wait_event(engine)
        self._moves.gather(stream, self._steps, self._payloads(arena, offsets), rows)

    def load(
        self, stream: Any, arena: PinnedArena, offsets: Sequence[int], rows: Sequence[Sequence[int]], engine: Any
    ) -> None:
        stream.wait_event(engine)
        self._moves.scatter(stream, self._steps, self._payloads(arena, offsets), rows)

    def _payloads(self, arena: PinnedArena, offsets: Sequence[int]) -> list[int]:
        return [arena.address + offset + self._first for offset in offsets]


def _route(share: Share, moves: Kernels) -> _Staged | _Direct:
    short = min(run.length for run in share.runs) < DIRECT_BELOW
    return _Direct(share, moves) if short or share.nbytes > STAGING_BYTES else _Staged(share, moves)


class _Lane:
    """One direction: a thread, a queue of jobs, and the staging buffers with their streams."""

    def __init__(self, direction: Direction, pages: PagedKV, share: Share, moves: Kernels) -> None:
        self._device = pages.sample.device
        self._pages = pages
        self._share = share
        self._whole = direction is Direction.SAVE
        self._pinned: PinnedArena | None = None
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._ahead: deque[Any] = deque()
        routes = [_route(share, moves) for _ in range(STAGING_BUFFERS)]
        self._group = routes[0].blocks
        self._ring = deque(
            (cupy.cuda.Stream(non_blocking=True), route.save if direction is Direction.SAVE else route.load)
            for route in routes
        )
        self._thread = threading.Thread(target=self._serve, name=f"kv-{direction.value}", daemon=True)
        self._thread.start()

    def submit(self, job: _Job) -> None:
        self._jobs.put(job)

    def close(self) -> None:
        self._jobs.put(None)
        self._thread.join()

    def _serve(self) -> None:
        with cupy.cuda.Device(self._device.index):
            while (job := self._jobs.get()) is not None:
                try:
                    job.transfer.handed_over(self._hand_over(job))
                except Exception as error:  # whatever it is, the engine recomputes
                    self._drain()
                    job.transfer.fail(error)
            self._drain()
            if self._pinned is not None:
                self._pinned.close()

    def _hand_over(self, job: _Job) -> list[Any]:
        """Enqueue a whole job; returns the events behind it."""
        pinned = self._pin(job.arena)
        rows = self._pages.view_pages(job.copies, self._share.block.tokens, self._whole)
        for start in range(0, len(rows), self._group):
            group = slice(start, start + self._group)
            offsets = [copy.offset for copy in job.copies[group]]
            pinned.wait(max(offsets) + self._share.block.nbytes)
            stream, move = self._ring[0]
            self._ring.rotate(-1)
            move(stream, pinned, offsets, rows[group], job.engine)
            self._ahead.append(stream.record(cupy.cuda.Event(block=True, disable_timing=True)))
            if len(self._ahead) > MAX_AHEAD:
                self._ahead.popleft().synchronize()
        return [stream.record(cupy.cuda.Event(block=True, disable_timing=True)) for stream, _ in self._ring]

    def _pin(self, arena: Arena) -> PinnedArena:
        if self._pinned is None or self._pinned.arena is not arena:
            self._drain()
            if self._pinned is not None:
                self._pinned.close()
            self._pinned = pin(arena, self._device.index)
        return self._pinned

    def _drain(self) -> None:
        for stream, _ in self._ring:
            stream.synchronize()
        self._ahead.clear()


def check_versions() -> None:
    """Raises ConfigError when CuPy and torch are built for different CUDA major versions, or the driver is too old for CuPy."""
    have, need, driver = runtime.runtimeGetVersion(), str(torch.version.cuda), runtime.driverGetVersion()
    if str(have // 1000) != need.split(".")[0]:
        raise ConfigError(
            "cupy", cupy.__version__, f"it is built for CUDA {_cuda(have)}, torch for {need}",
            f"Install cupy-cuda{need.split('.')[0]}x.",
        )  # fmt: skip
    if driver // 1000 < have // 1000:
        raise ConfigError(
            "cupy", cupy.__version__, f"it is built for CUDA {_cuda(have)}, the driver stops at {_cuda(driver)}",
            f"Update the driver, or install the torch and CuPy of CUDA {driver // 1000}.",
        )  # fmt: skip


def _cuda(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"
