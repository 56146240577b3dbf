"""Host memory: the shared arena carved into slots.

Besides the interface of every tier, this one hands out the slots themselves: a save allocates a slot, fills it and
publishes it; a load pins a published slot for as long as somebody reads it. A pinned slot is never evicted, and a deleted
one stays in place until its last pin is gone.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Sequence
from collections.abc import Set as AbstractSet

from kvstore.envelope import Header, verify
from kvstore.errors import BlockCorrupt, BlockNotFound, BlockTooLarge, ConfigError
from kvstore.identity import BlockKey
from kvstore.index import BlockIndex, Rows, slot_sizes
from kvstore.node.arena import Arena
from kvstore.policy.eviction import LRU, EvictionPolicy, eviction_order
from kvstore.slabs import SlabAllocator
from kvstore.tiers.base import BlockStat, Medium, PutResult, Tier, TierStats

RANKED_AT_ONCE = 1 / 16
"""Share of a size class that one ranking names for eviction: a ranking is a pass over the tier."""
RANKED_AT_LEAST = 32
"""Blocks, of a small tier: about what one reservation asks for."""


class HostTier(Tier):
    """Blocks in an arena. Loses everything when the process ends."""

    medium = Medium.HOST

    def __init__(self, arena: Arena, extent_bytes: int, policy: EvictionPolicy | None = None) -> None:
        """``extent_bytes`` bounds the largest block; see ``kvstore.slabs``."""
        extents = arena.nbytes // extent_bytes
        if extents < 1:
            remedy = "Give the arena more memory, or make the extents smaller."
            raise ConfigError("host.bytes", arena.nbytes, f"less than one extent of {extent_bytes} bytes", remedy)
        self.arena = arena
        self.index = BlockIndex()
        self.policy = policy or LRU()
        self._slabs = SlabAllocator(extents, extent_bytes)
        self._used_bytes = 0
        self._candidates: dict[int, deque[int]] = {}
        """Rows to evict next, by size class."""
        self._ranked_at = 0.0
        self._taken = 0
        """Bytes given out since the start."""
        self._named_at = -1
        """The same, when blocks were named last."""
        self._unlisted: dict[int, int] = {}
        """Pins left on slots whose block was deleted, by offset."""
        self._evicted = self._refused = self._quarantined = 0

    @property
    def largest_block(self) -> int:
        """Bytes of the largest envelope that a slot can hold."""
        return self._slabs.extent_bytes

    def keys(self) -> AbstractSet[BlockKey]:
        return self.index.keys()

    def stat(self, key: BlockKey) -> BlockStat | None:
        row = self.index.row(key)
        if row is None:
            return None
        return self.index.stat(row)

    def touch(self, keys: Iterable[BlockKey]) -> None:
        self.index.touch(keys, time.time())

    def stats(self) -> TierStats:
        return TierStats(
            medium=self.medium,
            blocks=len(self.index),
            used_bytes=self._used_bytes,
            capacity_bytes=self._slabs.capacity,
            quarantined=self._quarantined,
            evicted=self._evicted,
            refused=self._refused,
        )

    async def put(self, header: Header, envelope: memoryview) -> PutResult:
        if header.key in self.index:
            return PutResult.PRESENT
        offset = self.allocate(header.envelope_bytes, header.key)
        if offset is None:
            return PutResult.REFUSED
        self.arena.buffer[offset : offset + header.envelope_bytes] = envelope[: header.envelope_bytes]
        self.publish(header, offset)
        return PutResult.STORED

    async def get(self, key: BlockKey, into: memoryview) -> Header:
        row = self.index.row(key)
        if row is None:
            raise BlockNotFound(key.hex())
        slot = self.slot(int(self.index.location[row]))
        try:
            header = verify(slot, key)
        except BlockCorrupt:
            self._drop(key)
            self._quarantined += 1
            raise
        if len(into) < header.envelope_bytes:
            raise BlockTooLarge(f"block {key.hex()} has {header.envelope_bytes} bytes, the buffer {len(into)}")
        into[: header.envelope_bytes] = slot[: header.envelope_bytes]
        return header

    async def delete(self, keys: Iterable[BlockKey]) -> int:
        return sum(self._drop(key) for key in keys)

    async def close(self) -> None:
        self.arena.close()

    def allocate(self, nbytes: int, newcomer: BlockKey | None = None) -> int | None:
        """Offset of a free slot of ``nbytes``, evicting if need be; None when all that could go is pinned or reserved.

        ``newcomer`` is the block it is for. Raises BlockTooLarge when no slot can ever hold it.
        """
        offset = self._slabs.allocate(nbytes)
        if offset is None and self._make_room(nbytes, newcomer):
            offset = self._slabs.allocate(nbytes)
        if offset is None:
            self._refused += 1
            return None
        self._used_bytes += nbytes
        self._taken += nbytes
        return offset

    def leaving(self) -> list[BlockKey]:
        """Blocks that will be evicted before long, the next one first; nothing while there is room, or when they were named.

        Twice as many as one ranking names, again when half of them may be gone: who wants to keep a block elsewhere has time.
        """
        capacity = self._slabs.capacity
        usual = self._used_bytes // max(len(self.index), 1)
        share = max(int(capacity * RANKED_AT_ONCE), min(RANKED_AT_LEAST * usual, capacity // 4))
        nearly_full = self._evicted > 0 or self._used_bytes + 2 * share > capacity
        if not nearly_full or (self._named_at >= 0 and self._taken - self._named_at < share):
            return []
        self._named_at = self._taken
        rows = self.index.used()
        order = eviction_order(self.index, self.policy, rows[self.index.pins[rows] == 0], time.time())
        several = 2 * max(RANKED_AT_LEAST, int(len(order) * RANKED_AT_ONCE))
        return [self.index.key(row) for row in order[:several].tolist()]

    def discard(self, offset: int) -> None:
        """Give back a slot that was allocated and not published."""
        self._used_bytes -= self._slabs.slot_bytes(offset)
        self._slabs.free(offset)

    def publish(self, header: Header, offset: int) -> None:
        """List the block whose sealed envelope is in the slot at ``offset``."""
        assert header.key not in self.index, "published twice"
        self.index.add(header, offset, time.time())

    def pin(self, key: BlockKey) -> int | None:
        """Keep a block in place and say where its slot is; None when it is not here."""
        row = self.index.row(key)
        if row is None:
            return None
        self.index.pins[row] += 1
        return int(self.index.location[row])

    def unpin(self, key: BlockKey, offset: int) -> None:
        """Take one pin off the slot that ``pin`` gave for the key."""
        row = self.index.row(key)
        if row is not None and self.index.location[row] == offset:
            self.index.pins[row] -= 1
            return
        self._unlisted[offset] -= 1
        if not self._unlisted[offset]:
            del self._unlisted[offset]
            self.discard(offset)

    def created(self, key: BlockKey) -> float:
        """When a block that is here was computed, in seconds since the epoch."""
        row = self.index.row(key)
        assert row is not None, "not here"
        return Header.unpack(self.slot(int(self.index.location[row]))).created

    def slot(self, offset: int) -> memoryview:
        """The bytes of the slot at ``offset``: header and payload."""
        return self.arena.slot(offset, self._slabs.slot_bytes(offset))

    def _drop(self, key: BlockKey) -> bool:
        row = self.index.row(key)
        if row is None:
            return False
        pins = int(self.index.pins[row])
        offset = self.index.remove(key)
        assert offset is not None
        if pins:
            self._unlisted[offset] = pins
        else:
            self.discard(offset)
        return True

    def _make_room(self, nbytes: int, newcomer: BlockKey | None) -> bool:
        """Evict a block of the size class; failing that, empty the least valuable extent of another class."""
        victim = self._next_candidate(nbytes)
        if victim is None:
            self._rank(nbytes)
            victim = self._next_candidate(nbytes)
        if victim is not None:
            self._evict([victim], newcomer)
            return True
        rows = self.index.used()
        return self._empty_an_extent(rows[self.index.pins[rows] == 0], newcomer)

    def _rank(self, nbytes: int) -> None:
        """Find the next blocks of a size class to give up. Takes a pass over the tier, so it serves several evictions."""
        now = time.time()
        rows = self.index.used()
        may_go = (self.index.pins[rows] == 0) & (slot_sizes(self.index.length[rows]) == nbytes)
        order = eviction_order(self.index, self.policy, rows[may_go], now)
        several = max(RANKED_AT_LEAST, int(len(order) * RANKED_AT_ONCE))
        several = min(several, -(-len(order) // 2))  # the better half is never given up on a judgement of before
        self._candidates[nbytes] = deque(order[:several].tolist())
        self._ranked_at = now

    def _next_candidate(self, nbytes: int) -> int | None:
        """The next ranked row that was neither used, replaced nor pinned since."""
        candidates = self._candidates.get(nbytes)
        while candidates:
            row = candidates.popleft()
            if (
                self.index.location[row] >= 0
                and self.index.accessed[row] <= self._ranked_at
                and not self.index.pins[row]
            ):
                return row
        return None

    def _empty_an_extent(self, free: Rows, newcomer: BlockKey | None) -> bool:
        """Of the extents without a pinned or reserved slot, evict the one whose most valuable block is worth least."""
        order = eviction_order(self.index, self.policy, free, time.time())
        extents = self.index.location[order] // self._slabs.extent_bytes
        # Ascending by value: an extent's last occurrence is its most valuable block.
        by_best = list(dict.fromkeys(extents[::-1].tolist()))[::-1]
        for extent in by_best:
            members = order[extents == extent]
            if len(members) == self._slabs.used_slots(extent):
                self._evict(members.tolist(), newcomer)
                return True
        return False

    def _evict(self, rows: Sequence[int], newcomer: BlockKey | None) -> None:
        keys = [self.index.key(row) for row in rows]
        for key in keys:
            self._drop(key)
        self._evicted += len(keys)
        if self.on_evict is not None:
            self.on_evict(self.medium, keys, newcomer)
