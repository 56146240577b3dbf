"""The two ways of a group of blocks between engine pages and the pinned arena."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import cupy
import numpy as np
import torch

from connectors.paging import kernels
from connectors.paging.batchcopy import Column, copy_batch
from connectors.paging.geometry import PagedKV, Pages, Share, strides
from connectors.paging.pinned import PinnedArena, cut
from kvstore.errors import IdentityError

STAGING_BYTES = 32 << 20
"""Of one buffer at most: four of them (two a direction) are 128 MiB of device memory. Larger groups: fewer CUDA calls."""
DIRECT_BELOW = 128 << 10
"""Runs shorter than this go between pages and arena in the kernel: the copy engine would be no faster, and cost the CPU more."""
DIRECT_THREAD_BLOCKS = 32
"""Of a kernel that is held up by the bus: enough to keep that busy, and no more, since they stay as long as the copy."""

Batch = np.ndarray[Any, Any]
"""An argument of the kernels, see ``kernels.batch``."""


@dataclass(frozen=True, slots=True)
class Streams:
    """Of one direction; ordered between themselves by events."""

    kernels: Any
    copies: Any
    """One for all copies: two at a time would share the bus, and waste some of it."""


class Route(Protocol):
    """Moves up to ``blocks`` blocks at a time. Only enqueues; never blocks."""

    blocks: int

    def save(self, streams: Streams, arena: PinnedArena, offsets: Column, pages: Pages, engine: Any) -> None:
        """``pages`` ``[block, page]`` to ``offsets`` ``[block]`` of the arena, once the event ``engine`` has come."""

    def load(self, streams: Streams, arena: PinnedArena, offsets: Column, pages: Pages, engine: Any) -> None:
        """The reverse; ``engine`` holds up only what touches pages."""


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
        self._planes = torch.tensor(kernels.directory(pages), dtype=torch.int64, device=pages.sample.device)
        self._planes_at = self._planes.data_ptr()
        self._vectors = share.nbytes // kernels.vector_bytes(pages)
        self.device = pages.sample.device

    def gather(self, stream: Any, batch: Batch, blocks: int, most: int | None = None) -> None:
        """Pages to payloads, with at most ``most`` thread blocks."""
        self._launch(self._gather, stream, batch, blocks, most)

    def scatter(self, stream: Any, batch: Batch, blocks: int, most: int | None = None) -> None:
        """Payloads to pages, with at most ``most`` thread blocks."""
        self._launch(self._scatter, stream, batch, blocks, most)

    def _launch(self, kernel: Any, stream: Any, batch: Batch, blocks: int, most: int | None) -> None:
        vectors = blocks * self._vectors
        chunks = -(-vectors // (kernels.THREADS * kernels.UNROLL))
        grid = min(most or chunks, chunks)
        with stream:
            kernel((grid,), (kernels.THREADS,), (self._planes_at, np.uint32(vectors), batch))


class Staged:
    """Through a buffer in device memory that holds the shares of a group of blocks, one behind the other."""

    def __init__(self, share: Share, moves: Kernels, staging_bytes: int) -> None:
        nbytes, runs = share.nbytes, np.array(share.runs, np.int64)
        self.blocks = min(moves.max_blocks, staging_bytes // nbytes)
        self._moves = moves
        self._buffer = torch.empty(self.blocks * nbytes, dtype=torch.uint8, device=moves.device)
        payloads = self._buffer.data_ptr() + nbytes * np.arange(self.blocks)
        self._batch = kernels.batch(strides(share.compact), payloads.tolist())
        self._runs, sizes = runs[:, 0], runs[:, 1]
        self._sizes = np.tile(sizes, self.blocks)
        self._staged = (payloads[:, None] + (np.cumsum(sizes) - sizes)).ravel()
        """Where in the buffer each run of each block is."""
        self._full, self._empty = (cupy.cuda.Event(disable_timing=True) for _ in range(2))

    def save(self, streams: Streams, arena: PinnedArena, offsets: Column, pages: Pages, engine: Any) -> None:
        host, device, sizes = self._copies(arena, offsets)
        streams.kernels.wait_event(engine)
        streams.kernels.wait_event(self._empty)
        self._batch["page"][: pages.size] = pages.ravel()
        self._moves.gather(streams.kernels, self._batch, len(offsets))
        streams.kernels.record(self._full)
        streams.copies.wait_event(self._full)
        copy_batch(host, device, sizes, streams.copies.ptr)
        streams.copies.record(self._empty)

    def load(self, streams: Streams, arena: PinnedArena, offsets: Column, pages: Pages, engine: Any) -> None:
        host, device, sizes = self._copies(arena, offsets)
        streams.copies.wait_event(self._empty)
        copy_batch(device, host, sizes, streams.copies.ptr)
        streams.copies.record(self._full)
        streams.kernels.wait_event(engine)
        streams.kernels.wait_event(self._full)
        self._batch["page"][: pages.size] = pages.ravel()
        self._moves.scatter(streams.kernels, self._batch, len(offsets))
        streams.kernels.record(self._empty)

    def _copies(self, arena: PinnedArena, offsets: Column) -> tuple[Column, Column, Column]:
        """Addresses in the arena, addresses in the buffer, bytes."""
        count = len(offsets) * len(self._runs)
        runs = (offsets[:, None] + self._runs).ravel()
        runs, staged, sizes = cut(runs, self._staged[:count], self._sizes[:count])
        return runs + arena.address, staged, sizes


class Direct:
    """Straight between pages and the registered arena, over the bus, in the kernel."""

    def __init__(self, share: Share, moves: Kernels) -> None:
        self.blocks = max(1, min(moves.max_blocks, STAGING_BYTES // share.nbytes))
        self._moves = moves
        self._first = share.heads[0] * strides(share.block).head
        self._batch = kernels.batch(strides(share.block), ())

    def save(self, streams: Streams, arena: PinnedArena, offsets: Column, pages: Pages, engine: Any) -> None:
        streams.kernels.wait_event(engine)
        self._moves.gather(streams.kernels, self._filled(arena, offsets, pages), len(offsets), DIRECT_THREAD_BLOCKS)

    def load(self, streams: Streams, arena: PinnedArena, offsets: Column, pages: Pages, engine: Any) -> None:
        streams.kernels.wait_event(engine)
        self._moves.scatter(streams.kernels, self._filled(arena, offsets, pages), len(offsets), DIRECT_THREAD_BLOCKS)

    def _filled(self, arena: PinnedArena, offsets: Column, pages: Pages) -> Batch:
        self._batch["payload"][: len(offsets)] = offsets + (arena.address + self._first)
        self._batch["page"][: pages.size] = pages.ravel()
        return self._batch


def choose(share: Share, moves: Kernels, sharers: int = 1) -> Route:
    """The better one for a share; with its own buffer if it needs one, as one of ``sharers`` pagers of an engine."""
    staging_bytes = STAGING_BYTES // sharers
    short = min(run.length for run in share.runs) < DIRECT_BELOW
    return Direct(share, moves) if short or share.nbytes > staging_bytes else Staged(share, moves, staging_bytes)
