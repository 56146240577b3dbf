"""Paging between GPU pages and the pinned arena with CuPy.

A save gathers a few blocks into a staging buffer in device memory and lets a copy engine bring them to their slots; a load is
the reverse. Kernels run on one stream and copies on another, so one buffer is on the bus while a kernel works on the next. The
engine's stream is never made to wait: an event is recorded on it, and ours wait for that.

Nobody waits for a save. While the engine computes, its copies leave the bus between windows: a copy engine that always has work
lets no other copy of its direction in, and the tokens that a step has sampled would wait for the end of the save, 37 ms behind
2 GiB. They also rest then, unless the next save could begin: their traffic slows an engine that lives on the GPU's memory.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch

from connectors.paging.base import BlockCopy, Pager
from connectors.paging.capture import BesideCaptures
from connectors.paging.geometry import PagedKV, Share
from kvstore.errors import ConfigError, IdentityError
from kvstore.layout import BlockLayout
from kvstore.node.arena import Arena

try:
    import cupy
    from cupy.cuda import runtime

    from connectors.paging.pinned import PinnedArena, pin
    from connectors.paging.routes import Direction, Kernels, Streams, choose
except ImportError as _missing:
    raise ConfigError(
        "cupy", None, f"GPU pages need CuPy, which does not import: {_missing}", "pip install 'llm-kvstore[gpu]'"
    ) from _missing

ALIGNMENT = 16
"""Bytes, of payloads: the widest access of a kernel. Slots are aligned to 4 KiB."""
MAX_AHEAD = 3
"""Windows handed to CUDA and not finished. More would fill its launch queue, on which the engine's launches would wait too."""
SAVING_SHARE = 1 / 2
"""Of the time, while the engine computes and no other save could begin. A prefill of an 8B model makes KV at 4 GB/s."""

IDLE_THREAD_BLOCKS = 66
"""Of a gather while the engine does nothing: with more it takes the memory from under the copy engine. An engine that computes
feels a short gather less than a narrow one, so beside that it is as wide as can be."""


class CudaTransfer:
    """A batch on its way; done when the last byte has arrived or the copy failed."""

    def __init__(self, engine: int) -> None:
        """``engine`` is the engine's stream."""
        self._engine = engine
        self._handing_over = threading.Lock()  # an Event takes ten times as long to make
        self._handing_over.acquire()
        self._end: Any = None
        self._error: Exception | None = None

    def done(self) -> bool:
        return self._error is not None or (self._end is not None and bool(self._end.done))

    def wait(self) -> None:
        end = self._ended()
        with BesideCaptures():
            end.synchronize()

    def precede(self) -> None:
        runtime.streamWaitEvent(self._engine, self._ended().ptr)

    def handed_over(self, end: Any) -> None:
        """``end`` is the event behind all of it."""
        self._end = end
        self._handing_over.release()

    def fail(self, error: Exception) -> None:
        self._error = error
        self._handing_over.release()

    def _ended(self) -> Any:
        """The event behind all of it, once it was handed over. Raises what that raised."""
        with self._handing_over:
            pass
        if self._error is not None:
            raise self._error
        return self._end


@dataclass(frozen=True, slots=True)
class _Job:
    arena: Arena
    copies: Sequence[BlockCopy]
    stream: int
    """The engine's."""
    begin: Any
    """Event behind the engine's work so far."""
    transfer: CudaTransfer

    def computing(self) -> bool:
        """Whether the engine has work on its GPU."""
        return bool(runtime.streamQuery(self.stream))


class CudaPager(Pager):
    """One rank's pager for pages on one GPU.

    ``save`` records an event and returns; a thread hands the work to CUDA. ``load`` hands it over itself, since a request waits
    for it. Either waits, there, until the slots in question are pinned. An empty load starts the pinning of a new arena early.
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
            self._saves = _SaveLane(pages, share, moves, sharers)
            self._loads = _Lane(Direction.LOAD, pages, share, moves, sharers)
        self._saving = _Background(self._settled)
        self.follow()

    def follow(self) -> None:
        """vLLM may change its stream once, when it first captures a CUDA graph or makes a communicator."""
        self._engine = int(torch.cuda.current_stream(self._device).cuda_stream)

    def save(self, arena: Arena, copies: Sequence[BlockCopy]) -> CudaTransfer:
        with self._settled():
            job = self._job(arena, copies)
        self._saves.waiting.append(job)
        self._saving.submit(self._saves.run_next)
        return job.transfer

    def load(self, arena: Arena, copies: Sequence[BlockCopy]) -> CudaTransfer:
        """Ordered after the engine's work enqueued so far: it may still use the pages for what they held before."""
        with self._settled():
            job = self._job(arena, copies)
            self._loads.run(job)
        return job.transfer

    def ready(self, arena: Arena) -> bool:
        return self._loads.ready(arena)

    def forget(self) -> None:
        """Waits for loads that were handed over, and unregisters once the saves before it have been, too."""
        self._saving.submit(self._saves.forget)
        with self._settled():
            self._loads.forget()

    def close(self) -> None:
        self._saving.close()
        with self._settled():
            for lane in (self._saves, self._loads):
                lane.close()

    def _settled(self) -> _Settled:
        return _Settled(self._device.index)

    def _job(self, arena: Arena, copies: Sequence[BlockCopy]) -> _Job:
        begin = cupy.cuda.Event(block=True, disable_timing=True)
        runtime.eventRecord(begin.ptr, self._engine)
        return _Job(arena, copies, self._engine, begin, CudaTransfer(self._engine))


class _Settled:
    """Within it, this thread's calls of CUDA are for one device, whatever the engine captures."""

    def __init__(self, device: int) -> None:
        self._device, self._beside = cupy.cuda.Device(device), BesideCaptures()

    def __enter__(self) -> None:
        self._device.__enter__()
        self._beside.__enter__()

    def __exit__(self, *error: object) -> None:
        self._beside.__exit__()
        self._device.__exit__()


class _Background:
    """Runs a lane's jobs in a thread of its own."""

    def __init__(self, settled: Callable[[], _Settled]) -> None:
        self._settled = settled
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._serve, name="kv-save", daemon=True)
        self._thread.start()

    def submit(self, job: Callable[[], None]) -> None:
        """``job`` must not raise."""
        self._jobs.put(job)

    def close(self) -> None:
        self._jobs.put(None)
        self._thread.join()

    def _serve(self) -> None:
        with self._settled():
            while (job := self._jobs.get()) is not None:
                job()


class _Lane:
    """One direction: its streams, its route, and the registration of the arena it goes to. One thread at a time, which is
    settled: see ``CudaPager``."""

    def __init__(self, direction: Direction, pages: PagedKV, share: Share, moves: Kernels, sharers: int) -> None:
        self._device = pages.sample.device.index
        self._pages = pages
        self._block = share.block
        self._whole = direction is Direction.SAVE
        self._pinned: PinnedArena | None = None
        self._streams = Streams(*(cupy.cuda.Stream(non_blocking=True) for _ in range(2)))
        self._route = choose(direction, share, moves, self._streams, sharers)
        self._marks = deque(cupy.cuda.Event(block=True, disable_timing=True) for _ in range(MAX_AHEAD))

    def run(self, job: _Job) -> None:
        """Hand a whole job to CUDA. Never raises."""
        try:
            job.transfer.handed_over(self._hand_over(job))
        except Exception as error:  # whatever it is, the engine recomputes
            with suppress(Exception):
                self._drain()  # the pages and slots may be used again once the transfer is done
            job.transfer.fail(error)

    def ready(self, arena: Arena) -> bool:
        """Whether all of ``arena`` is pinned, so that no job waits for that. Any thread."""
        pinned = self._pinned
        return pinned is not None and pinned.arena is arena and pinned.complete

    def forget(self) -> None:
        """``close``, until the next job. Never raises: on a device that fails the next job will."""
        with suppress(Exception):
            self.close()

    def close(self) -> None:
        """Wait for what was handed over, and give the arena's registration back."""
        self._drain()
        if self._pinned is not None:
            self._pinned.close()
            self._pinned = None

    def _hand_over(self, job: _Job) -> Any:
        """Enqueue a whole job; the event behind it."""
        pinned = self._pin(job.arena)
        self._follow(job)
        start, count = 0, self._route.first
        while start < len(job.copies):
            copies = job.copies[start : start + count]
            start, count = start + count, min(2 * count, self._route.window)
            pages = self._pages.view_pages(copies, self._block.tokens, self._whole)
            offsets = self._offsets(job.arena, copies)
            pinned.wait(max(offsets) + self._block.nbytes)
            mark = self._marks[0]
            mark.synchronize()
            begun = time.perf_counter()
            self._route.move(pinned, offsets, pages, self._thread_blocks(job))
            self._route.tail.record(mark)
            self._marks.rotate(-1)
            if start < len(job.copies):
                self._pause(job, mark, begun)
        return self._route.tail.record(cupy.cuda.Event(disable_timing=True))

    def _follow(self, job: _Job) -> None:
        """Nothing of the job before the engine's work that it comes after."""
        self._streams.kernels.wait_event(job.begin)

    def _thread_blocks(self, job: _Job) -> int | None:
        """Of a kernel, at most."""
        return None

    def _pause(self, job: _Job, mark: Any, begun: float) -> None:
        """Between two windows, the last of which was enqueued from ``begun`` on and ends at the event ``mark``."""

    def _offsets(self, arena: Arena, copies: Sequence[BlockCopy]) -> Sequence[int]:
        """Of each block in the arena. Checked: a kernel that leaves the arena, or is misaligned, costs the engine its GPU."""
        offsets = [copy.offset for copy in copies]
        last = arena.nbytes - self._block.nbytes
        if not all(0 <= offset <= last and not offset % ALIGNMENT for offset in offsets):
            raise IdentityError(f"not every block at {offsets} is inside the arena and aligned to {ALIGNMENT} bytes")
        return offsets

    def _pin(self, arena: Arena) -> PinnedArena:
        if self._pinned is None or self._pinned.arena is not arena:
            self._drain()
            if self._pinned is not None:
                self._pinned.close()
            self._pinned = pin(arena, self._device)
        return self._pinned

    def _drain(self) -> None:
        self._streams.kernels.synchronize()
        self._streams.copies.synchronize()


class _SaveLane(_Lane):
    """Leaves room for an engine that computes."""

    def __init__(self, pages: PagedKV, share: Share, moves: Kernels, sharers: int) -> None:
        super().__init__(Direction.SAVE, pages, share, moves, sharers)
        self.waiting: deque[_Job] = deque()

    def run_next(self) -> None:
        self.run(self.waiting.popleft())

    def _follow(self, job: _Job) -> None:
        job.begin.synchronize()  # in this thread: the engine's has the interpreter to itself until its step is computed

    def _thread_blocks(self, job: _Job) -> int | None:
        return None if job.computing() else IDLE_THREAD_BLOCKS

    def _pause(self, job: _Job, mark: Any, begun: float) -> None:
        if not job.computing():
            return
        mark.synchronize()
        behind = bool(self.waiting) and self.waiting[0].begin.done
        if not behind:
            time.sleep((time.perf_counter() - begun) * (1 / SAVING_SHARE - 1))


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
