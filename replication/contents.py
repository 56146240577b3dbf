"""What a region's bucket holds: from its catalog where there is one, else from a listing.

With a catalog nothing is listed: the index is followed, change by change, as nodes do. Whatever is copied or deleted is told
to it, so that nodes hear of it within a second. A catalog that is away or incomplete costs a listing, never an error.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager, suppress
from typing import Self

import structlog

from kvstore.catalog.asking import Heard, ask_nodes
from kvstore.catalog.base import START, Catalog, Entry
from kvstore.catalog.cursors import SourceCursor
from kvstore.catalog.hotness import reports
from kvstore.catalog.pins import region_pins
from kvstore.catalog.publisher import Publisher
from kvstore.catalog.purges import ring
from kvstore.errors import BlockTooLarge, CatalogUnavailable, IdentityError, ProtocolError
from kvstore.identity import BlockKey
from kvstore.policy.pins import Pins
from kvstore.tiers.object.contents import size_only
from kvstore.tiers.object.hotness import MAX_SNAPSHOT_BYTES, HotnessSnapshot
from kvstore.tiers.object.names import BLOCKS, HOTNESS, TOMBSTONES, block_name, hotness_name, parse_block_name
from kvstore.tiers.object.objects import Found
from kvstore.tombstones import Tombstone
from replication.links import Links

log = structlog.get_logger(__name__)

DELETED_AT_ONCE = 1000
READS_AT_ONCE = 1024
MAX_TOMBSTONE_BYTES = 8 << 10
TOLD_SECONDS = 2.0
"""How long a deletion, or the end of the work, waits for the catalog. After that, nodes may meet a block that is gone: a miss."""


class Contents:
    """The blocks of one bucket. Open it with ``Contents.open``; owned by one event loop."""

    def __init__(self, bucket: Links, catalog: Catalog | None = None) -> None:
        self.bucket = bucket
        self.catalog = catalog
        self._publisher = None if catalog is None else Publisher(catalog)
        self._known: dict[BlockKey, Entry] = {}
        """The catalog's index, and what it has yet to hear."""
        self._cursor = START
        self._unseen: set[BlockKey] = set()
        """While the whole index is read again: blocks that were not come across yet."""
        self._used_bytes = 0
        self._pins = Pins()
        self._stones: dict[str, Tombstone | None] = {}
        """By name in the bucket; None: unreadable."""
        self._turn = asyncio.Lock()

    @classmethod
    @asynccontextmanager
    async def open(cls, bucket: Links, catalog: Catalog | None = None) -> AsyncIterator[Self]:
        """``catalog`` stays open. At the end it has heard everything, unless it is away."""
        contents = cls(bucket, catalog)
        if contents._publisher is None:
            yield contents
            return
        telling = asyncio.create_task(contents._publisher.run())
        try:
            yield contents
            await contents._publisher.flush(set(contents._publisher.pending), TOLD_SECONDS)
        finally:
            telling.cancel()
            await asyncio.wait([telling])

    async def blocks(self) -> dict[BlockKey, Entry]:
        """Every block; one of which only a listing is known has 0 tokens, and was ``stored`` when its object was.

        Raises TierUnavailable when a listing is needed and the bucket does not answer.
        """
        if self.catalog is not None:
            try:
                if await self._follow(self.catalog):
                    return dict(self._known)
            except CatalogUnavailable as error:
                log.warning("the catalog does not answer: listing the bucket", error=str(error))
        listed = await list_blocks(self.bucket)
        return {key: self._better(entry) for key, entry in listed.items()}

    async def tombstones(self) -> list[Tombstone]:
        """Everything that was deleted for good; each is read once. Raises TierUnavailable."""
        listed = await self.bucket.listing(TOMBSTONES)
        new = [found for found in listed if found.name not in self._stones]
        for start in range(0, len(new), READS_AT_ONCE):
            batch = new[start : start + READS_AT_ONCE]
            stones = await asyncio.gather(*(self._read_tombstone(found) for found in batch))
            self._stones.update((found.name, stone) for found, stone in zip(batch, stones, strict=True))
        known = (self._stones[found.name] for found in listed)
        return [stone for stone in known if stone is not None]

    async def reports(self) -> list[HotnessSnapshot]:
        """What each of the region's nodes said last: to the catalog, else in the bucket. Raises TierUnavailable."""
        told: Mapping[str, HotnessSnapshot] = {}
        if self.catalog is not None:
            try:
                told = await reports(self.catalog.documents)
            except CatalogUnavailable as error:
                log.warning("the catalog does not answer: reading the bucket's reports", error=str(error))
        names = {hotness_name(node) for node in told}
        others = [found for found in await self.bucket.listing(HOTNESS) if found.name not in names]
        read: list[HotnessSnapshot | None] = list(told.values())
        for start in range(0, len(others), READS_AT_ONCE):
            read += await asyncio.gather(*map(self._read_report, others[start : start + READS_AT_ONCE]))
        return [report for report in read if report is not None]

    async def ask_nodes(self) -> Heard | None:
        """Have the region's nodes report now, and wait for it; None: there is no catalog to ask them by, or it is away."""
        if self.catalog is not None:
            with suppress(CatalogUnavailable):
                return await ask_nodes(self.catalog.documents)
        return None

    async def pinned(self) -> set[BlockKey]:
        """Blocks that somebody wants kept, by what the catalog told last."""
        if self.catalog is not None:
            with suppress(CatalogUnavailable):
                self._pins = await region_pins(self.catalog.documents)
        return self._pins.held(time.time())

    async def purged(self) -> None:
        """Tombstones were written: have nodes look at once. Without a catalog they look every few seconds."""
        if self.catalog is not None:
            with suppress(CatalogUnavailable):
                await ring(self.catalog.documents)

    async def came_to(self, cursor: SourceCursor) -> None:
        """Tell whoever asks the catalog how far replication is."""
        if self.catalog is not None:
            with suppress(CatalogUnavailable):
                await cursor.tell(self.catalog.documents)

    async def used_bytes(self) -> int | None:
        """Bytes of all blocks, by the catalog; None without one that covers the bucket. Raises CatalogUnavailable."""
        if self.catalog is None or not await self._follow(self.catalog):
            return None
        return self._used_bytes

    def copied(self, entry: Entry) -> None:
        """A block was created in the bucket."""
        if self._publisher is not None:
            self._known[entry.key] = entry
            self._publisher.offer(entry.key, entry)

    async def delete(self, blocks: Iterable[Entry]) -> int:
        """Delete blocks in this order, from the index first; how many. Raises TierUnavailable."""
        waiting = list(blocks)
        for start in range(0, len(waiting), DELETED_AT_ONCE):
            batch = waiting[start : start + DELETED_AT_ONCE]
            if self._publisher is not None:
                for entry in batch:
                    self._known.pop(entry.key, None)
                    self._publisher.offer(entry.key, None)
                await self._publisher.flush({entry.key for entry in batch}, TOLD_SECONDS)
            await self.bucket.delete([block_name(entry.namespace, entry.key) for entry in batch])
        return len(waiting)

    async def _read_report(self, found: Found) -> HotnessSnapshot | None:
        """None for what is none, or is gone again."""
        try:
            body = await self.bucket.read(found.name, MAX_SNAPSHOT_BYTES)
            return None if body is None else HotnessSnapshot.unpack(body)
        except (ProtocolError, BlockTooLarge) as error:
            log.warning("unreadable report", name=found.name, error=str(error))
            return None

    async def _read_tombstone(self, found: Found) -> Tombstone | None:
        """None for what is none, or is gone again."""
        try:
            body = await self.bucket.read(found.name, MAX_TOMBSTONE_BYTES)
            return None if body is None else Tombstone.from_json(body)
        except (IdentityError, BlockTooLarge) as error:
            log.warning("unreadable tombstone", name=found.name, error=str(error))
            return None

    async def _follow(self, catalog: Catalog) -> bool:
        """Bring ``_known`` up to date; whether that is the whole bucket."""
        async with self._turn:
            while True:
                batch = await catalog.follow(self._cursor)
                if batch.restarted:
                    self._unseen = set(self._known)
                self._unseen.difference_update(batch.changes)
                self._apply(batch.changes)
                self._cursor = batch.cursor
                if batch.caught_up:
                    self._used_bytes = batch.used_bytes
                    self._apply(dict.fromkeys(self._unseen))
                    self._unseen = set()
                    return batch.complete

    def _apply(self, changes: Mapping[BlockKey, Entry | None]) -> None:
        """What the catalog has yet to hear from us is newer than what it says."""
        assert self._publisher is not None
        for key, entry in changes.items():
            if key in self._publisher.pending:
                continue
            if entry is None:
                self._known.pop(key, None)
            else:
                self._known[key] = entry

    def _better(self, listed: Entry) -> Entry:
        """What the catalog says of a block that a listing shows, if both mean the same object."""
        known = self._known.get(listed.key)
        if known is None or known.namespace != listed.namespace or known.envelope_bytes != listed.envelope_bytes:
            return listed
        return known


async def list_blocks(bucket: Links) -> dict[BlockKey, Entry]:
    """Every block in a bucket, as far as a listing tells. Raises TierUnavailable."""
    blocks = {}
    for found in await bucket.listing(BLOCKS):
        if (parsed := parse_block_name(found.name)) is not None:
            blocks[parsed[1]] = Entry.of(size_only(*parsed, found))
    return blocks
