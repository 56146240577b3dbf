"""The disk tier. Its state lives in the event loop; files are touched in its own threads."""

from __future__ import annotations

import asyncio
import errno
import os
import threading
import time
from collections import Counter, deque
from collections.abc import Coroutine, Iterable, Sequence
from collections.abc import Set as AbstractSet
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import structlog

from kvstore.envelope import HEADER_BYTES, Header, envelope_bytes, verify
from kvstore.errors import BlockCorrupt, BlockNotFound, BlockTooLarge, ConfigError, TierUnavailable
from kvstore.identity import BlockKey
from kvstore.index import BlockIndex
from kvstore.policy.eviction import LRU, EvictionPolicy
from kvstore.slabs import SlabAllocator
from kvstore.tiers.base import BlockStat, Medium, PutResult, Tier, TierStats
from kvstore.tiers.disk.directory import lock, settle_segment_bytes
from kvstore.tiers.disk.files import Files
from kvstore.tiers.disk.journal import EXTEND_BYTES, Journal
from kvstore.tiers.disk.records import (
    ADDRESSABLE_BYTES,
    RECORD_BYTES,
    Blocks,
    Delete,
    Entry,
    Put,
    Touch,
    hits,
    offsets,
    slot_sizes,
    snapshot,
)
from kvstore.tiers.disk.recovery import recover
from kvstore.tiers.disk.segments import SEGMENT_HEADER_BYTES, Segments
from kvstore.tiers.disk.tasks import run, uninterrupted
from kvstore.tiers.disk.victims import victims

MAX_BATCH = 32
"""Puts that share one sync of data and journal."""

MAX_ENTRIES = 1024
"""Deletes and touches in one append."""

BAD_BLOCKS_KEPT = 64

FULL_PAUSE_SECONDS = 10.0
"""How long not to write, or not to make segments, after the filesystem was full."""

_JOURNAL_SHARE = 128
_MIN_JOURNAL_BYTES = 256 << 10
_JOURNAL_SLACK_BYTES = 1 << 20
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}

_log = structlog.get_logger(__name__)
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class BadBlock:
    """A block that failed verification."""

    key: BlockKey
    reason: str
    at: float
    """Seconds since the epoch."""


class DiskTier(Tier):
    """Blocks on a local disk.

    Segments and journal together never take more than the capacity; 1/128 of it (at least 256 KiB) is kept for the journal,
    which also bounds the number of blocks to one per 32 KiB of capacity. ``put`` returns after the bytes and their
    journal record have been synced, in batches of concurrent puts. Room is made in batches too, ahead of the need.
    """

    medium = Medium.DISK

    @classmethod
    async def open(
        cls,
        directory: Path,
        capacity_bytes: int,
        policy: EvictionPolicy | None = None,
        segment_bytes: int | None = None,
        threads: int = 4,
        files: Files | None = None,
    ) -> DiskTier:
        """Open or make the tier in ``directory`` and find what it holds.

        ``segment_bytes``, a multiple of 4 KiB, bounds the size of a block; by default about 1/64 of the capacity, between
        64 MiB and 4 GiB, or what the directory was made with. A smaller capacity than before drops the blocks in the
        segments beyond it. Raises ConfigError, TierUnavailable.
        """
        opening = asyncio.to_thread(
            _Opened, Path(directory), capacity_bytes, segment_bytes, threads, files or Files()
        )
        try:
            return cls(await opening, policy or LRU())
        except OSError as error:
            raise TierUnavailable(f"disk tier in {directory}: {error}") from error

    def __init__(self, opened: _Opened, policy: EvictionPolicy) -> None:
        """Use ``open``."""
        self._capacity = opened.capacity
        self._max_segments = opened.max_segments
        self._journal_bytes = opened.journal_bytes
        self._max_blocks = opened.journal_bytes // (4 * RECORD_BYTES)
        self._lock_fd = opened.lock_fd
        self._pool = opened.pool
        self._log_pool = ThreadPoolExecutor(1, "disk-tier-log")
        """Syncs, journal and erasures: they must not queue behind the slots that they are to publish."""
        self._segments = opened.segments
        self._journal = opened.journal
        self._slots = opened.slots
        self._index = opened.index
        self._policy = policy

        self._used = int(slot_sizes(self._index.length[self._index.used()]).sum())
        self._writing: dict[BlockKey, asyncio.Future[None]] = {}
        self._readers: Counter[int] = Counter()
        self._freed_while_read: set[int] = set()
        self._touched: set[BlockKey] = set()
        self._candidates: dict[int, deque[tuple[BlockKey, int]]] = {}
        """Blocks to evict next, by the size class that they make room for."""
        self._ranked_at: dict[int, float] = {}
        self._uncommitted: deque[tuple[Put, asyncio.Future[None]]] = deque()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._committing: asyncio.Task[None] | None = None
        self._growing: asyncio.Task[bool] | None = None
        self._making_room = asyncio.Lock()
        self._logging = asyncio.Lock()
        self._stop = threading.Event()
        self._grow_after = 0.0
        self._admit_after = 0.0
        self._evicted = self._refused = self._quarantined = 0
        self._bad: deque[BadBlock] = deque(maxlen=BAD_BLOCKS_KEPT)
        self._grow_ahead()

    # What the index knows

    def keys(self) -> AbstractSet[BlockKey]:
        return self._index.keys()

    def stat(self, key: BlockKey) -> BlockStat | None:
        row = self._index.row(key)
        return None if row is None else self._index.stat(row)

    def touch(self, keys: Iterable[BlockKey]) -> None:
        present = [key for key in keys if key in self._index]
        self._index.touch(present, time.time())
        self._touched.update(present)
        if len(self._touched) >= MAX_ENTRIES and not self._stop.is_set():
            self._commit_soon()

    def stats(self) -> TierStats:
        return TierStats(
            medium=self.medium,
            blocks=len(self._index),
            used_bytes=self._used,
            capacity_bytes=self._capacity,
            quarantined=self._quarantined,
            evicted=self._evicted,
            refused=self._refused,
        )

    def bad_blocks(self) -> tuple[BadBlock, ...]:
        """The last blocks that failed verification, oldest first."""
        return tuple(self._bad)

    # Reading

    async def get(self, key: BlockKey, into: memoryview) -> Header:
        row = self._index.row(key)
        if row is None:
            raise BlockNotFound(key.hex())
        size, offset = envelope_bytes(int(self._index.length[row])), int(self._index.location[row])
        if size > len(into):
            raise BlockTooLarge(f"{key.hex()} needs {size} bytes, the buffer has {len(into)}")
        self._check_open()
        self._pin(row, offset)
        try:
            return await run(self._pool, self._read, key, offset, into[:size])
        except BlockCorrupt as error:
            if self._index.row(key) != row or self._index.location[row] != offset:
                raise BlockNotFound(f"{key.hex()} was deleted while it was read") from None
            self._quarantine(key, str(error))
            raise
        except OSError as error:
            raise TierUnavailable(f"reading {key.hex()}: {error}") from error
        finally:
            self._unpin(row, offset)

    def _read(self, key: BlockKey, offset: int, into: memoryview) -> Header:
        return verify(into[: self._segments.read(offset, into)], key)

    def _pin(self, row: int, offset: int) -> None:
        self._index.pins[row] += 1
        self._readers[offset] += 1

    def _unpin(self, row: int, offset: int) -> None:
        if self._index.location[row] == offset:
            self._index.pins[row] -= 1
        self._readers[offset] -= 1
        if not self._readers[offset]:
            del self._readers[offset]
            if offset in self._freed_while_read:
                self._freed_while_read.remove(offset)
                self._slots.free(offset)

    def _quarantine(self, key: BlockKey, reason: str) -> None:
        self._quarantined += 1
        self._bad.append(BadBlock(key, reason, time.time()))
        _log.warning("bad block dropped", key=key.hex(), reason=reason)
        self._spawn(self._drop([self._unlist(key)], sync=False))

    # Writing

    async def put(self, header: Header, envelope: memoryview) -> PutResult:
        self._check_open()
        return await uninterrupted(self._spawn(self._put(header, envelope[: header.envelope_bytes])))

    async def _put(self, header: Header, envelope: memoryview) -> PutResult:
        while (other := self._writing.get(header.key)) is not None:
            await asyncio.wait([other])
        if header.key in self._index:
            return PutResult.PRESENT
        done = self._writing[header.key] = asyncio.get_running_loop().create_future()
        try:
            stored = await self._store(header, envelope)
        except OSError as error:
            if error.errno not in _FULL:
                raise TierUnavailable(f"writing {header.key.hex()}: {error}") from error
            self._admit_after = time.monotonic() + FULL_PAUSE_SECONDS
            _log.warning("filesystem full: disk tier stores nothing for a while", seconds=FULL_PAUSE_SECONDS)
            stored = False
        finally:
            del self._writing[header.key]
            done.set_result(None)
        self._refused += not stored
        return PutResult.STORED if stored else PutResult.REFUSED

    async def _store(self, header: Header, envelope: memoryview) -> bool:
        if len(envelope) > self._segments.segment_bytes or time.monotonic() < self._admit_after:
            return False
        offset = await self._allocate(len(envelope))
        if offset is None:
            return False
        try:
            await run(self._pool, self._segments.write, offset, len(envelope), envelope)
            await self._commit(Put(header, offset, time.time()))
        except OSError:
            self._slots.free(offset)
            raise
        return True

    async def _commit(self, block: Put) -> None:
        """Make a written block durable, then list it."""
        committed = asyncio.get_running_loop().create_future()
        self._uncommitted.append((block, committed))
        self._commit_soon()
        await committed

    def _commit_soon(self) -> None:
        if self._committing is None or self._committing.done():
            self._committing = self._spawn(self._commit_all())

    async def _commit_all(self) -> None:
        while self._uncommitted or self._touched:
            async with self._logging:
                batch = [self._uncommitted.popleft() for _ in range(min(MAX_BATCH, len(self._uncommitted)))]
                blocks = [block for block, _ in batch]
                try:
                    await self._record([*blocks, *self._touches()], sync=bool(blocks))
                except OSError as error:
                    for _, committed in batch:
                        committed.set_exception(OSError(error.errno, error.strerror))
                    if not batch:
                        return  # recency only: the next put or touch tries again
                else:
                    for block, committed in batch:
                        self._list(block)
                        committed.set_result(None)

    def _touches(self) -> list[Touch]:
        index = self._index
        touched = [self._touched.pop() for _ in range(min(MAX_ENTRIES, len(self._touched)))]
        rows = [(key, row) for key in touched if (row := index.row(key)) is not None]
        return [Touch(key, int(index.hits[row]), float(index.accessed[row])) for key, row in rows]

    async def _record(self, entries: Sequence[Entry], sync: bool) -> None:
        """Sync the slots of new blocks, journal all entries, erase the slots of dropped blocks; in this order.

        Holds ``_logging``. The journal is written anew when it has become long.
        """
        longest = self._journal.nbytes + 2 * RECORD_BYTES * len(entries) + EXTEND_BYTES
        wanted = 2 * RECORD_BYTES * len(self._index) + _JOURNAL_SLACK_BYTES
        blocks = snapshot(self._index) if longest > min(self._journal_bytes // 2, wanted) else None
        await run(self._log_pool, self._write_record, entries, sync, blocks)

    def _write_record(self, entries: Sequence[Entry], sync: bool, blocks: Blocks | None) -> None:
        self._segments.sync(entry.offset for entry in entries if isinstance(entry, Put))
        if blocks is None:
            self._journal.append(entries, sync)
        else:
            self._journal.rewrite(blocks, entries)
        dropped = [entry.offset for entry in entries if isinstance(entry, Delete)]
        self._segments.erase(dropped)
        if sync:
            self._segments.sync(dropped)

    # Listing

    def _list(self, block: Put) -> None:
        self._index.add(block.header, block.offset, block.accessed)
        self._used += block.header.envelope_bytes

    def _unlist(self, key: BlockKey) -> Delete:
        row = self._index.row(key)
        assert row is not None
        self._used -= envelope_bytes(int(self._index.length[row]))
        offset = self._index.remove(key)
        assert offset is not None
        return Delete(key, offset)

    async def _drop(self, unlisted: Sequence[Delete], sync: bool) -> None:
        """Journal that these blocks are gone, erase their headers, free their slots."""
        where = [entry.offset for entry in unlisted]
        try:
            async with self._logging:
                await self._record(unlisted, sync)
        except OSError as error:
            # What may come back is verified when it is read, so the slots can be used all the same.
            _log.warning("could not record dropped blocks", blocks=len(where), error=str(error))
            if sync:
                raise
        finally:
            for offset in where:
                if offset in self._readers:
                    self._freed_while_read.add(offset)
                else:
                    self._slots.free(offset)

    async def delete(self, keys: Iterable[BlockKey]) -> int:
        self._check_open()
        return await uninterrupted(self._spawn(self._delete(set(keys))))

    async def _delete(self, keys: set[BlockKey]) -> int:
        rows = self._index.rows(keys)
        deepest_first = rows[np.argsort(-self._index.depth[rows].astype(np.int64), kind="stable")]
        unlisted = [self._unlist(self._index.key(row)) for row in deepest_first.tolist()]
        try:
            for start in range(0, len(unlisted), MAX_ENTRIES):
                await self._drop(unlisted[start : start + MAX_ENTRIES], sync=True)
        except OSError as error:
            raise TierUnavailable(f"deleting: {error}") from error
        return len(unlisted)

    # Room

    async def _allocate(self, slot_bytes: int) -> int | None:
        """A slot, from free space, a new segment or evicted blocks; None when there is none to be had."""
        offset = self._take(slot_bytes)
        if offset is None:
            async with self._making_room:
                while (offset := self._take(slot_bytes)) is None:
                    if not (await self._grow() or await self._evict(slot_bytes)):
                        return None
        self._grow_ahead()
        if self._is_short(slot_bytes) and not self._making_room.locked():
            self._spawn(self._evict_ahead(slot_bytes))
        return offset

    def _is_short(self, slot_bytes: int) -> bool:
        return self._next_segment() is None and 2 * self._slots.room(slot_bytes) < self._eviction_batch()

    def _eviction_batch(self) -> int:
        """How many blocks to give up at a time: enough for the puts under way, but a small share of a small tier."""
        return max(1, min(MAX_BATCH, len(self._index) // 8))

    async def _evict_ahead(self, slot_bytes: int) -> None:
        async with self._making_room:
            if self._is_short(slot_bytes):
                await self._evict(slot_bytes)

    def _take(self, slot_bytes: int) -> int | None:
        if len(self._index) + len(self._writing) > self._max_blocks:
            return None
        return self._slots.allocate(slot_bytes)

    async def _evict(self, slot_bytes: int) -> bool:
        unlisted = self._next_victims(slot_bytes)
        if not unlisted:
            self._rank(slot_bytes)
            unlisted = self._next_victims(slot_bytes)
        if unlisted:
            self._evicted += len(unlisted)
            await self._drop(unlisted, sync=False)
        return bool(unlisted)

    def _rank(self, slot_bytes: int) -> None:
        """Ranking costs a pass over the whole index, so it serves a share of the index at a time."""
        now = time.time()
        limit = max(self._eviction_batch(), len(self._index) // 64)
        rows = victims(self._index, self._policy, slot_bytes, self._segments.segment_bytes, now, limit)
        self._candidates[slot_bytes] = deque((self._index.key(row), row) for row in rows.tolist())
        self._ranked_at[slot_bytes] = now

    def _next_victims(self, slot_bytes: int) -> list[Delete]:
        """Unlist the next candidates, less those that were used, pinned or extended since they were ranked."""
        index = self._index
        candidates = self._candidates.get(slot_bytes, deque())
        unlisted: list[Delete] = []
        batch = self._eviction_batch()
        while candidates and len(unlisted) < batch:
            key, row = candidates.popleft()
            unused = index.row(key) == row and index.accessed[row] <= self._ranked_at[slot_bytes]
            if unused and not index.pins[row] and not index.children[row]:
                unlisted.append(self._unlist(key))
        return unlisted

    def _grow_ahead(self) -> None:
        """Have an empty segment ready before it is needed."""
        if not self._slots.free_extents and self._next_segment() is not None:
            self._grow_soon()

    async def _grow(self) -> bool:
        return self._next_segment() is not None and await self._grow_soon()

    def _grow_soon(self) -> asyncio.Task[bool]:
        if self._growing is None or self._growing.done():
            self._growing = self._spawn(self._make_segment())
        return self._growing

    def _next_segment(self) -> int | None:
        if self._stop.is_set() or time.monotonic() < self._grow_after:
            return None
        there = set(self._segments.numbers())
        return next((number for number in range(self._max_segments) if number not in there), None)

    async def _make_segment(self) -> bool:
        number = self._next_segment()
        if number is None:
            return False
        try:
            made = await run(self._pool, self._segments.create, number, self._stop)
        except OSError as error:
            self._grow_after = time.monotonic() + FULL_PAUSE_SECONDS
            _log.warning("disk tier cannot grow for now", segments=number, error=str(error))
            return False
        if made:
            self._slots.grow(number)
        return made

    # Life

    async def close(self) -> None:
        if self._stop.is_set():
            return
        self._stop.set()
        while self._tasks:
            await asyncio.wait(self._tasks)
        if self._touched:
            await self._commit_all()
        for pool in (self._pool, self._log_pool):
            await asyncio.to_thread(pool.shutdown)
        self._segments.close()
        self._journal.close()
        os.close(self._lock_fd)

    def _check_open(self) -> None:
        if self._stop.is_set():
            raise TierUnavailable("the disk tier is closed")

    def _spawn(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


class _Opened:
    """Locks the directory and recovers what is in it. Blocks."""

    def __init__(
        self, directory: Path, capacity: int, segment_bytes: int | None, threads: int, files: Files
    ) -> None:
        self.capacity = capacity
        self.journal_bytes = max(capacity // _JOURNAL_SHARE, _MIN_JOURNAL_BYTES)
        self.lock_fd = lock(directory)
        try:
            default = min(max(1 << (capacity // 64).bit_length() - 1, 64 << 20), 4 << 30)
            size = settle_segment_bytes(directory, segment_bytes, default, files)
            self.max_segments = self._count(size)
            self.segments = Segments(directory, size, files)
            self.segments.open_existing(self.max_segments)
            self.slots = SlabAllocator(0, size)
            for number in self.segments.numbers():
                self.slots.grow(number)
            self.journal = Journal(directory / "journal", files)
            self.pool = ThreadPoolExecutor(threads, "disk-tier")
            blocks = recover(self.journal, self.journal_bytes, self.segments, self.slots, self.pool)
        except BaseException:
            os.close(self.lock_fd)
            raise
        self.index = BlockIndex()
        records = blocks.records
        self.index.load(
            records["key"],
            records["parent"],
            blocks.namespaces,
            records["namespace"],
            location=offsets(records),
            accessed=records["accessed"],
            length=records["length"],
            depth=records["depth"],
            hits=hits(records),
            tokens=records["tokens"],
        )

    def _count(self, segment_bytes: int) -> int:
        remedy = "Use a multiple of 4096 between 8 KiB and the capacity"
        if segment_bytes % HEADER_BYTES or segment_bytes < 2 * HEADER_BYTES:
            raise ConfigError("disk.segment_bytes", segment_bytes, "segments cannot have this size", remedy)
        count = (self.capacity - self.journal_bytes) // (segment_bytes + SEGMENT_HEADER_BYTES)
        if count < 1:
            needed = segment_bytes + SEGMENT_HEADER_BYTES + self.journal_bytes
            problem = f"one segment and the journal need {needed} bytes"
            raise ConfigError(
                "disk.bytes", self.capacity, problem, "Raise disk.bytes or lower disk.segment_bytes"
            )
        return min(count, ADDRESSABLE_BYTES // segment_bytes)
