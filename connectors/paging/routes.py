"""The two ways of blocks between engine pages and the pinned arena."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import cycle, islice
from typing import Any, Protocol

import cupy
import numpy as np
import torch
from cupy.cuda import driver

from connectors.paging import kernels, pinned
from connectors.paging.batchcopy import copy_batch
from connectors.paging.geometry import PagedKV, Pages, Share, strides
from connectors.paging.kernels import Arguments
from connectors.paging.pieces import Pieces, cut
from connectors.paging.pinned import PinnedArena
from kvstore.errors import IdentityError

BUFFERS = 2
"""Of a direction: one on the bus, one under the kernel, which is over twenty times as fast."""
STAGING_BYTES = 32 << 20
"""Of one buffer at most. Larger groups: fewer CUDA calls."""
WINDOW_BYTES = 64 << 20
"""Prepared at a time, or up to twice that: were all of a large transfer prepared first, the bus would stand idle meanwhile."""
DIRECT_BELOW = 128 << 10
"""Runs shorter than this go between pages and arena in the kernel: the copy engine would be no faster, and cost the CPU more."""
DIRECT_THREAD_BLOCKS = 32
"""Of a kernel that is held up by the bus: enough to keep that busy, and no more, since they stay as long as the copy."""


class Direction(Enum):
    SAVE = "save"
    LOAD = "load"


@dataclass(frozen=True, slots=True)
class Streams:
    """Of one direction; ordered between themselves by events."""

    kernels: Any
    copies: Any
    """One for all copies: two at a time would share the bus, and waste some of it."""


class Route(Protocol):
    """Moves windows of blocks in one direction. Only enqueues; never blocks."""

    first: int
    """Blocks to begin with: the sooner something is on the bus the better."""
    window: int
    """Blocks of one ``move`` at most."""
    tail: Any
    """The stream on which a transfer ends."""

    def move(self, arena: PinnedArena, offsets: Sequence[int], pages: Pages, most: int | None) -> None:
        """Between ``pages`` ``[block, page]`` and ``offsets`` ``[block]`` of the arena; through a buffer with kernels of at
        most ``most`` thread blocks."""


class Kernels:
    """Gather and scatter for one geometry, compiled on construction (or taken from CuPy's cache on disk)."""

    def __init__(self, pages: PagedKV, share: Share) -> None:
        self.max_blocks = kernels.max_blocks(pages, share)
        """Of one launch."""
        if not self.max_blocks:
            raise IdentityError(f"a block of {share.block.tokens} tokens has more than {kernels.MAX_PAGES} pages")
        constants = kernels.defines(pages, share)
        module = cupy.RawModule(code=kernels.SOURCE, options=tuple(f"-D{k}={v}" for k, v in constants.items()))
        self._gather, self._scatter = (module.get_function(name).kernel for name in ("gather", "scatter"))
        self._directory = torch.tensor(kernels.directory(pages), dtype=torch.int64, device=pages.sample.device)
        self.directory = self._directory.data_ptr()
        self.device = pages.sample.device
        self.vector_bytes = kernels.vector_bytes(pages)
        units = len(pages.planes) * pages.heads * (share.block.tokens // pages.page_tokens)
        self.unit_bytes = share.nbytes // units
        """Of one page of one head of K or V: what lies in one piece both in a payload and in the kernel's count of vectors."""

    def launch(
        self, direction: Direction, arguments: Arguments, vectors: int, stream: Any, most: int | None = None
    ) -> None:
        """With at most ``most`` thread blocks."""
        function = self._gather if direction is Direction.SAVE else self._scatter
        chunks = -(-vectors // (kernels.THREADS * kernels.UNROLL))
        grid = min(most or chunks, chunks)
        driver.launchKernel(function.ptr, grid, 1, 1, kernels.THREADS, 1, 1, 0, stream.ptr, arguments.address, 0)


@dataclass(frozen=True, slots=True)
class _Buffer:
    address: int
    copied: Any
    """Event: a copy has filled it, or emptied it; the kernel's turn."""
    moved: Any
    """Event: the kernel has; the copy's turn."""


class Staged:
    """Through buffers in device memory, which hold the shares of the blocks one behind the other, group by group."""

    def __init__(self, direction: Direction, share: Share, moves: Kernels, streams: Streams, group_bytes: int) -> None:
        """``group_bytes`` is the size of a buffer."""
        self._direction, self._save = direction, direction is Direction.SAVE
        self._kernels, self._streams = moves, streams
        self.tail = streams.copies if self._save else streams.kernels
        self._share, self._group = share.nbytes, group_bytes
        self.first = max(group_bytes // share.nbytes, 1)
        self.window = _window(share.nbytes, group_bytes)
        self._runs = share.runs
        self._arguments = Arguments(moves.directory, strides(share.compact))
        self._shares = share.nbytes * np.arange(moves.max_blocks)
        self._memory = torch.empty(BUFFERS * group_bytes, dtype=torch.uint8, device=moves.device)
        base = self._memory.data_ptr()
        self._buffers = cycle([_Buffer(base + i * group_bytes, _event(), _event()) for i in range(BUFFERS)])

    def move(self, arena: PinnedArena, offsets: Sequence[int], pages: Pages, most: int | None) -> None:
        starts = range(0, len(offsets) * self._share, self._group)
        buffers = list(islice(self._buffers, len(starts)))
        groups = cut(
            offsets, self._runs, arena.address, pinned.SLICE_BYTES, [buffer.address for buffer in buffers], self._group
        )
        launches = zip(buffers, starts, strict=True)
        if self._save:
            self._move(*next(launches), pages, most)
        for buffer, pieces in zip(buffers, groups, strict=True):
            self._copy(buffer, pieces)
            if following := next(launches, None):
                self._move(*following, pages, most)

    def _move(self, buffer: _Buffer, start: int, pages: Pages, most: int | None) -> None:
        """Enqueue the kernel of a group: the bytes of the window from ``start`` on."""
        stream = self._streams.kernels
        stop = min(start + self._group, len(pages) * self._share)
        first, skipped = divmod(start, self._share)
        last = -(-stop // self._share)
        payloads = self._shares[: last - first] + (buffer.address - skipped)
        width = self._kernels.vector_bytes
        vectors = (stop - start) // width
        self._arguments.fill(payloads, pages[first:last], skipped // width, vectors)
        stream.wait_event(buffer.copied)
        self._kernels.launch(self._direction, self._arguments, vectors, stream, most)
        stream.record(buffer.moved)

    def _copy(self, buffer: _Buffer, pieces: Pieces) -> None:
        """Enqueue the copies of a group."""
        stream = self._streams.copies
        stream.wait_event(buffer.moved)
        ways = (pieces.arena, pieces.staged) if self._save else (pieces.staged, pieces.arena)
        copy_batch(*ways, pieces.sizes, stream.ptr)
        stream.record(buffer.copied)


class Direct:
    """Straight between pages and the registered arena, over the bus, in the kernel."""

    def __init__(self, direction: Direction, share: Share, moves: Kernels, streams: Streams) -> None:
        self._direction, self._kernels, self.tail = direction, moves, streams.kernels
        self.first = self.window = max(1, min(moves.max_blocks, STAGING_BYTES // share.nbytes))
        self._vectors = share.nbytes // moves.vector_bytes
        self._head = share.heads[0] * strides(share.block).head
        self._arguments = Arguments(moves.directory, strides(share.block))

    def move(self, arena: PinnedArena, offsets: Sequence[int], pages: Pages, most: int | None) -> None:
        vectors = len(offsets) * self._vectors
        payloads = np.array(offsets, np.int64) + (arena.address + self._head)
        self._arguments.fill(payloads, pages, 0, vectors)
        self._kernels.launch(self._direction, self._arguments, vectors, self.tail, DIRECT_THREAD_BLOCKS)


def choose(direction: Direction, share: Share, moves: Kernels, streams: Streams, sharers: int = 1) -> Route:
    """The better one for a share; with its own buffers if it needs them, as one of ``sharers`` pagers of an engine."""
    group = _group_bytes(share, moves, sharers)
    if group and min(run.length for run in share.runs) >= DIRECT_BELOW:
        return Staged(direction, share, moves, streams, group)
    return Direct(direction, share, moves, streams)


def _group_bytes(share: Share, moves: Kernels, sharers: int) -> int:
    """How much to stage at a time; 0 where not even one unit fits. A group may begin and end within a block."""
    most = min(STAGING_BYTES // sharers, (moves.max_blocks - 1) * share.nbytes)
    return most // moves.unit_bytes * moves.unit_bytes


def _window(share_bytes: int, group_bytes: int) -> int:
    """Blocks to prepare at a time: so many that the last group of them is as full as can be."""
    least = max(WINDOW_BYTES // share_bytes, 1)
    return max(range(least, 2 * least + 1), key=lambda blocks: blocks / -(-blocks * share_bytes // group_bytes))


def _event() -> Any:
    return cupy.cuda.Event(disable_timing=True)
