"""Brings what other nodes did to the bucket into this node's index."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence

from kvstore.catalog.base import BATCH, START, Batch, Catalog, Entry
from kvstore.catalog.publisher import Publisher
from kvstore.identity import BlockKey
from kvstore.tiers.object import ObjectTier


class Follower:
    """Applies the catalog's changes to a tier. Owned by the tier's event loop."""

    def __init__(self, catalog: Catalog, tier: ObjectTier, publisher: Publisher, largest_block: int) -> None:
        """Entries of envelopes beyond ``largest_block`` bytes are left out: this node could not load them if they were right,
        and wrong ones would keep it from finding the block's true size."""
        self.complete = False
        """Whether the catalog covered the whole bucket when it was last asked."""
        self.applied = 0
        """Changes of others that were applied."""
        self._catalog = catalog
        self._tier = tier
        self._publisher = publisher
        self._largest_block = largest_block
        self._turn = asyncio.Lock()
        self._cursor = START
        self._unseen: set[BlockKey] | None = None
        """While the whole index is read: blocks that this node lists and has not come across yet."""

    async def catch_up(self) -> None:
        """Apply everything there is. Raises CatalogUnavailable; the next call goes on from there."""
        async with self._turn:
            while not await self._advance():
                pass

    async def ask(self, keys: Sequence[BlockKey]) -> None:
        """List those of ``keys`` that the catalog knows. Raises CatalogUnavailable."""
        self._learn([entry for entry in await self._catalog.lookup(keys[:BATCH]) if entry is not None], wanted=True)

    async def _advance(self) -> bool:
        """Apply one batch; whether it was the last."""
        batch = await self._catalog.follow(self._cursor)
        if batch.restarted:
            self._unseen = set(self._tier.keys())
        self._apply(batch)
        self._cursor = batch.cursor
        self.complete = batch.complete
        if batch.caught_up:
            self._forget_unseen()
            self._tier.learn_total(batch.used_bytes)
        return batch.caught_up

    def _apply(self, batch: Batch) -> None:
        """What this node has yet to tell the catalog is newer than what the catalog says."""
        changes = {key: entry for key, entry in batch.changes.items() if key not in self._publisher.pending}
        self._learn(entry for entry in changes.values() if entry is not None)
        self._tier.unlearn(key for key, entry in changes.items() if entry is None)
        self.applied += len(changes)
        if self._unseen is not None:
            self._unseen.difference_update(batch.changes)

    def _learn(self, entries: Iterable[Entry], wanted: bool = False) -> None:
        self._tier.learn((e.header for e in entries if e.envelope_bytes <= self._largest_block), wanted)

    def _forget_unseen(self) -> None:
        """After an absence: blocks that a complete catalog does not have were deleted meanwhile."""
        unseen, self._unseen = self._unseen, None
        if unseen and self.complete and not self._publisher.dropped:
            self._tier.unlearn(unseen.difference(self._publisher.pending))
