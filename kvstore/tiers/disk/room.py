"""Room for new blocks: a free slot, else a new segment, else the slots of blocks that are worth least.

Segments are made and blocks are evicted ahead of the need, so that a put seldom waits for either. Owned by the event loop.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from concurrent.futures import Executor
from typing import Any

import structlog

from kvstore.identity import BlockKey
from kvstore.index import BlockIndex
from kvstore.policy.eviction import EvictionPolicy
from kvstore.slabs import SlabAllocator
from kvstore.tiers.disk.segments import Segments
from kvstore.tiers.disk.victims import victims
from kvstore.tiers.tasks import run

EVICTED_AT_ONCE = 32
"""Blocks given up in one go, as many as share a sync when they are written."""

RANKED_AT_ONCE = 1 / 64
"""Share of the index that one ranking serves: ranking is a pass over all of it."""

RETRY_SECONDS = 10.0
"""How long not to try again what a full or broken filesystem refused."""

Evict = Callable[[Sequence[BlockKey], BlockKey], Awaitable[None]]
Spawn = Callable[[Coroutine[Any, Any, Any]], asyncio.Task[Any]]

_log = structlog.get_logger(__name__)


class Room:
    """Hands out slots of ``slots``; the tier gives them back to it."""

    def __init__(
        self,
        index: BlockIndex,
        slots: SlabAllocator,
        segments: Segments,
        policy: EvictionPolicy,
        pool: Executor,
        max_segments: int,
        max_blocks: int,
        evict: Evict,
        spawn: Spawn,
    ) -> None:
        """``evict`` unlists blocks before it first waits, and has freed their slots when it returns; told for which block."""
        self._index = index
        self._slots = slots
        self._segments = segments
        self._policy = policy
        self._pool = pool
        self._max_segments = max_segments
        self._max_blocks = max_blocks
        self._evict_blocks = evict
        self._spawn = spawn
        self._making = asyncio.Lock()
        self._growing: asyncio.Task[bool] | None = None
        self._grow_after = 0.0
        self._stop = threading.Event()
        self._candidates: dict[int, deque[tuple[BlockKey, int]]] = {}
        """Blocks to evict next, by the size class that they make room for."""
        self._ranked_at: dict[int, float] = {}

    async def allocate(self, slot_bytes: int, newcomer: BlockKey) -> int | None:
        """Offset of a slot for a block; None when there is none to be had."""
        offset = self._take(slot_bytes)
        if offset is None:
            async with self._making:
                while (offset := self._take(slot_bytes)) is None:
                    if not (await self._grow() or await self._evict(slot_bytes, newcomer)):
                        return None
        self.grow_ahead()
        if self._is_short(slot_bytes) and not self._making.locked():
            self._spawn(self._evict_ahead(slot_bytes, newcomer))
        return offset

    async def close(self) -> None:
        """Give up on a segment that is being made; no more are made."""
        self._stop.set()
        if self._growing is not None:
            await asyncio.wait([self._growing])

    def _take(self, slot_bytes: int) -> int | None:
        return self._slots.allocate(slot_bytes) if len(self._index) < self._max_blocks else None

    # New segments

    def grow_ahead(self) -> None:
        """Have an empty segment ready before it is needed."""
        if not self._slots.free_extents and self._next_segment() is not None:
            self._grow_soon()

    async def _grow(self) -> bool:
        return self._next_segment() is not None and await self._grow_soon()

    def _grow_soon(self) -> asyncio.Task[bool]:
        if self._growing is None or self._growing.done():
            self._growing = asyncio.create_task(self._make_segment())
        return self._growing

    def _next_segment(self) -> int | None:
        if self._stop.is_set() or time.monotonic() < self._grow_after:
            return None
        return self._segments.first_missing(self._max_segments)

    async def _make_segment(self) -> bool:
        number = self._next_segment()
        if number is None:
            return False
        try:
            made = await run(self._pool, self._segments.create, number, self._stop)
        except OSError as error:
            self._grow_after = time.monotonic() + RETRY_SECONDS
            _log.warning("disk tier cannot grow for now", segments=number, error=str(error))
            return False
        if made:
            self._slots.grow(number)
        return made

    # Eviction

    def _is_short(self, slot_bytes: int) -> bool:
        return self._next_segment() is None and 2 * self._slots.room(slot_bytes) < self._batch()

    def _batch(self) -> int:
        """How many blocks to give up at a time: enough for the puts under way, but a small share of a small tier."""
        return max(1, min(EVICTED_AT_ONCE, len(self._index) // 8))

    async def _evict_ahead(self, slot_bytes: int, newcomer: BlockKey) -> None:
        async with self._making:
            if self._is_short(slot_bytes):
                await self._evict(slot_bytes, newcomer)

    async def _evict(self, slot_bytes: int, newcomer: BlockKey) -> bool:
        chosen = self._choose(slot_bytes)
        if not chosen:
            self._rank(slot_bytes)
            chosen = self._choose(slot_bytes)
        if chosen:
            await self._evict_blocks(chosen, newcomer)
        return bool(chosen)

    def _rank(self, slot_bytes: int) -> None:
        now = time.time()
        limit = max(self._batch(), int(len(self._index) * RANKED_AT_ONCE))
        rows = victims(self._index, self._policy, slot_bytes, self._segments.segment_bytes, now, limit)
        self._candidates[slot_bytes] = deque((self._index.key(row), row) for row in rows.tolist())
        self._ranked_at[slot_bytes] = now

    def _choose(self, slot_bytes: int) -> list[BlockKey]:
        """The next candidates, less those that were used, pinned or extended since they were ranked."""
        index = self._index
        candidates = self._candidates.get(slot_bytes, deque())
        chosen: list[BlockKey] = []
        leaving: dict[int, int] = {}  # how many children of a row are among the chosen
        batch = self._batch()
        while candidates and len(chosen) < batch:
            key, row = candidates.popleft()
            unused = index.row(key) == row and index.accessed[row] <= self._ranked_at[slot_bytes]
            if unused and not index.pins[row] and index.children[row] == leaving.get(row, 0):
                chosen.append(key)
                parent = int(index.parent_row[row])
                leaving[parent] = leaving.get(parent, 0) + 1
        return chosen
