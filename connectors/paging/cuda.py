"""Paging between GPU pages and the pinned arena with CuPy.

A save gathers a few blocks into a staging buffer in device memory and lets a copy engine bring them to their slots; a load is
the reverse. Kernels run on one stream and copies on another, so one buffer is on the bus while a kernel works on the next. The
engine's stream is never made to wait: an event is recorded on it, and ours wait for that.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np
import torch

from connectors.paging.base import BlockCopy, Pager
from connectors.paging.geometry import PagedKV, Share
from kvstore.errors import ConfigError, IdentityError
from kvstore.layout import BlockLayout
from kvstore.node.arena import Arena

try:
    import cupy
    from cupy.cuda import runtime

    from connectors.paging.batchcopy import Column
    from connectors.paging.pinned import PinnedArena, pin
    from connectors.paging.routes import Kernels, Streams, choose
except ImportError as _missing:
    raise ConfigError(
        "cupy", None, f"GPU pages need CuPy, which does not import: {_missing}", "pip install 'llm-kvstore[gpu]'"
    ) from _missing

STAGING_BUFFERS = 2
"""Per direction: one on the bus, one under the kernel, which is several times as fast."""
ALIGNMENT = 16
"""Bytes, of payloads: the widest access of a kernel. Slots are aligned to 4 KiB."""
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

    def __init__(self, pages: PagedKV, block: BlockLayout, heads: tuple[int, int], sharers: int = 1) -> None:
        """Compile the kernels and allocate the staging buffers; ``sharers`` pagers share what these may take.

        Raises IdentityError when ``pages`` do not hold heads ``heads`` of such blocks, ConfigError when CuPy and torch are
        not built for the same CUDA.
        """
        check_versions()
        self.block_bytes = block.nbytes
        self._device = pages.sample.device
        share = Share.of(pages, block, heads)
        with cupy.cuda.Device(self._device.index):
            moves = Kernels(pages, share)
            self._lanes = {direction: _Lane(direction, pages, share, moves, sharers) for direction in Direction}

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


class _Lane:
    """One direction: a thread, a queue of jobs, and the staging buffers with their streams."""

    def __init__(self, direction: Direction, pages: PagedKV, share: Share, moves: Kernels, sharers: int) -> None:
        self._device = pages.sample.device
        self._pages = pages
        self._block = share.block
        self._whole = direction is Direction.SAVE
        self._pinned: PinnedArena | None = None
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        routes = [choose(share, moves, sharers) for _ in range(STAGING_BUFFERS)]
        self._group = routes[0].blocks
        self._ring = deque(route.save if direction is Direction.SAVE else route.load for route in routes)
        self._streams = Streams(*(cupy.cuda.Stream(non_blocking=True) for _ in range(2)))
        self._marks = deque(cupy.cuda.Event(block=True, disable_timing=True) for _ in range(MAX_AHEAD))
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
                    with suppress(Exception):
                        self._drain()  # the pages and slots may be used again once the transfer is done
                    job.transfer.fail(error)
            self._drain()
            if self._pinned is not None:
                self._pinned.close()

    def _hand_over(self, job: _Job) -> list[Any]:
        """Enqueue a whole job; returns the events behind it."""
        pinned = self._pin(job.arena)
        # Group by group from the start: were all of a large job prepared first, the bus would stand idle for a millisecond.
        for start in range(0, len(job.copies), self._group):
            copies = job.copies[start : start + self._group]
            pages = self._pages.view_pages(copies, self._block.tokens, self._whole)
            offsets = self._offsets(job.arena, copies)
            pinned.wait(int(offsets.max()) + self._block.nbytes)
            mark = self._marks[0]
            mark.synchronize()
            self._ring[0](self._streams, pinned, offsets, pages, job.engine)
            self._streams.kernels.record(mark)
            self._marks.rotate(-1)
            self._ring.rotate(-1)
        streams = (self._streams.kernels, self._streams.copies)
        return [stream.record(cupy.cuda.Event(disable_timing=True)) for stream in streams]

    def _offsets(self, arena: Arena, copies: Sequence[BlockCopy]) -> Column:
        """Of each block in the arena. Checked: a kernel that leaves the arena, or is misaligned, costs the engine its GPU."""
        offsets = np.array([copy.offset for copy in copies], np.int64)
        outside = (offsets < 0) | (offsets > arena.nbytes - self._block.nbytes)
        if outside.any() or (offsets % ALIGNMENT).any():
            raise IdentityError(
                f"not every block at {offsets.tolist()} is inside the arena and aligned to {ALIGNMENT} bytes"
            )
        return offsets

    def _pin(self, arena: Arena) -> PinnedArena:
        if self._pinned is None or self._pinned.arena is not arena:
            self._drain()
            if self._pinned is not None:
                self._pinned.close()
            self._pinned = pin(arena, self._device.index)
        return self._pinned

    def _drain(self) -> None:
        self._streams.kernels.synchronize()
        self._streams.copies.synchronize()


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
