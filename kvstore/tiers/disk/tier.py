"""The disk tier. Its state lives in the event loop; files are touched in its own threads."""

from __future__ import annotations

import asyncio
import errno
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

from kvstore.envelope import Header, envelope_bytes, verify
from kvstore.errors import BlockCorrupt, BlockNotFound, BlockTooLarge, TierUnavailable
from kvstore.identity import BlockKey
from kvstore.index import BlockIndex, slot_sizes
from kvstore.policy.eviction import LRU, EvictionPolicy
from kvstore.tiers.base import BlockStat, Medium, PutResult, Slot, Tier, TierStats
from kvstore.tiers.disk.files import Files
from kvstore.tiers.disk.journal import EXTEND_BYTES
from kvstore.tiers.disk.opening import Opened, open_directory
from kvstore.tiers.disk.records import RECORD_BYTES, Blocks, Delete, Entry, Put, Touch, snapshot
from kvstore.tiers.disk.room import RETRY_SECONDS, Room
from kvstore.tiers.tasks import run, uninterrupted

MAX_BATCH = 32
"""Puts that share one sync of data and journal."""

BATCH_DUE = 8
"""Puts that are synced although others are still being written."""

MAX_ENTRIES = 1024
"""Deletes and touches in one append."""

BAD_BLOCKS_KEPT = 64

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
            open_directory, Path(directory), capacity_bytes, segment_bytes, threads, files or Files()
        )
        try:
            return cls(await opening, capacity_bytes, policy or LRU())
        except OSError as error:
            raise TierUnavailable(f"disk tier in {directory}: {error}") from error

    def __init__(self, opened: Opened, capacity_bytes: int, policy: EvictionPolicy) -> None:
        """Use ``open``."""
        self._capacity = capacity_bytes
        self._max_journal_bytes = opened.max_journal_bytes
        self._resources = opened.resources
        self._segments = opened.segments
        self._journal = opened.journal
        self._slots = opened.slots
        self._index = opened.index
        self._pool = opened.pool
        self._log_pool = ThreadPoolExecutor(1, "disk-tier-log")
        """Syncs, journal and erasures: they must not queue behind the slots that they are to publish."""
        self._room = Room(
            self._index,
            self._slots,
            self._segments,
            policy,
            self._pool,
            opened.max_segments,
            opened.max_blocks,
            self._evict,
            self._spawn,
        )

        self._used = int(slot_sizes(self._index.length[self._index.used()]).sum())
        self._writing: dict[BlockKey, asyncio.Future[None]] = {}
        self._readers: Counter[int] = Counter()
        self._freed_while_read: set[int] = set()
        self._touched: set[BlockKey] = set()
        self._uncommitted: deque[tuple[Put, asyncio.Future[None]]] = deque()
        self._committing: asyncio.Task[None] | None = None
        self._logging = asyncio.Lock()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._slot_writes = 0
        self._admit_after = 0.0
        self._closed = False
        self._evicted = self._refused = self._quarantined = 0
        self._bad: deque[BadBlock] = deque(maxlen=BAD_BLOCKS_KEPT)
        self._room.grow_ahead()

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
        if not self._closed:
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

    @property
    def index(self) -> BlockIndex:
        """What is known of its blocks; to be read only."""
        return self._index

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

    def locate(self, key: BlockKey) -> Slot | None:
        row = self._index.row(key)
        if row is None or (found := self._segments.file(int(self._index.location[row]))) is None:
            return None
        path, offset = found
        return Slot(str(path.absolute()), offset, int(self._index.length[row]))

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
        _log.warning("bad block dropped", block=key.hex(), reason=reason)
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
            self._admit_after = time.monotonic() + RETRY_SECONDS
            _log.warning("filesystem full: disk tier stores nothing for a while", seconds=RETRY_SECONDS)
            stored = False
        finally:
            del self._writing[header.key]
            done.set_result(None)
        self._refused += not stored
        return PutResult.STORED if stored else PutResult.REFUSED

    async def _store(self, header: Header, envelope: memoryview) -> bool:
        if len(envelope) > self._segments.segment_bytes or time.monotonic() < self._admit_after:
            return False
        offset = await self._room.allocate(len(envelope), header.key)
        if offset is None:
            return False
        self._slot_writes += 1
        try:
            await run(self._pool, self._segments.write, offset, len(envelope), envelope)
        except OSError:
            self._slots.free(offset)
            raise
        finally:
            self._slot_writes -= 1
            self._commit_soon()
        try:
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
        if self._is_commit_due() and (self._committing is None or self._committing.done()):
            self._committing = self._spawn(self._commit_all())

    def _is_commit_due(self) -> bool:
        """A sync holds up the writes beside it, so it pays to wait for those that are about to end."""
        if len(self._uncommitted) >= BATCH_DUE or len(self._touched) >= MAX_ENTRIES:
            return True
        return bool(self._uncommitted) and not self._slot_writes

    async def _commit_all(self) -> None:
        while self._is_commit_due():
            await self._commit_batch()

    async def _commit_batch(self) -> None:
        async with self._logging:
            batch = [self._uncommitted.popleft() for _ in range(min(MAX_BATCH, len(self._uncommitted)))]
            try:
                await self._record([*(block for block, _ in batch), *self._touches()], sync=bool(batch))
            except Exception as error:
                for _, committed in batch:
                    committed.set_exception(error)
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
        is_long = longest > min(self._max_journal_bytes // 2, wanted)
        blocks = snapshot(self._index) if is_long or self._journal.numbers_left < len(entries) else None
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

    async def _evict(self, keys: Sequence[BlockKey], newcomer: BlockKey) -> None:
        unlisted = [self._unlist(key) for key in keys]
        self._evicted += len(unlisted)
        if self.on_evict is not None:
            self.on_evict(self.medium, keys, newcomer)
        await self._drop(unlisted, sync=False)

    async def delete(self, keys: Iterable[BlockKey]) -> int:
        self._check_open()
        return await uninterrupted(self._spawn(self._delete(set(keys))))

    async def _delete(self, keys: set[BlockKey]) -> int:
        rows = self._index.rows(keys)
        deepest_first = rows[np.argsort(-self._index.depth[rows].astype(np.int64), kind="stable")]
        unlisted = [self._unlist(self._index.key(row)) for row in deepest_first.tolist()]
        # One batch at least, even if empty: a key that is just being evicted must be journalled before this returns.
        starts = range(0, max(1, len(unlisted)), MAX_ENTRIES)
        batches = [unlisted[start : start + MAX_ENTRIES] for start in starts]
        outcomes = await asyncio.gather(*(self._drop(batch, sync=True) for batch in batches), return_exceptions=True)
        for error in outcomes:
            if error is not None:
                raise TierUnavailable(f"deleted blocks may come back at the next start: {error}") from error
        return len(unlisted)

    # Life

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        while self._tasks:
            await asyncio.wait(self._tasks)
        await self._room.close()
        while self._touched:
            await self._commit_batch()
        await asyncio.to_thread(self._log_pool.shutdown)
        await asyncio.to_thread(self._resources.close)

    def _check_open(self) -> None:
        if self._closed:
            raise TierUnavailable("the disk tier is closed")

    def _spawn(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task
