"""A tenant's part of a tier that tenants share: it sees, counts and deletes its own blocks only, and keeps under its quota."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable
from collections.abc import Set as AbstractSet
from dataclasses import replace

from kvstore.envelope import Header
from kvstore.errors import BlockNotFound
from kvstore.identity import BlockKey
from kvstore.index import slot_sizes
from kvstore.policy.eviction import EvictionPolicy, eviction_order
from kvstore.tenants.ledger import Ledger
from kvstore.tiers.base import BlockStat, PutResult, Tier, TierStats
from kvstore.tiers.wrappers import Wrapped

GIVEN_UP_AT_ONCE = 1 / 64
"""Share of a quota that goes when it is reached: a ranking is a pass over the tenant's blocks, and each deletion is synced."""


class Own(Wrapped):
    """Owned by the event loop of the tier, which stays open when this is closed: others use it."""

    def __init__(
        self, inner: Tier, ledger: Ledger, tenant: str, policy: EvictionPolicy, quota: Callable[[], int | None]
    ) -> None:
        """``ledger`` is that of ``inner``; ``quota`` gives bytes, None for no limit, and may change at any time."""
        super().__init__(inner)
        self._ledger = ledger
        self._mine = ledger.of(tenant)
        self._tenant = tenant
        self._policy = policy
        self._quota = quota
        self._turn = asyncio.Lock()
        self._evicted = self._refused = 0

    def keys(self) -> AbstractSet[BlockKey]:
        return self._mine.keys

    def stat(self, key: BlockKey) -> BlockStat | None:
        return self.inner.stat(key) if key in self._mine.keys else None

    def touch(self, keys: Iterable[BlockKey]) -> None:
        self.inner.touch(
            list(filter(self._mine.keys.__contains__, keys))
        )  # no Python a key: every lookup comes by here

    def stats(self) -> TierStats:
        quota = self._quota()
        whole = self.inner.stats()
        return replace(
            whole,
            blocks=len(self._mine.keys),
            used_bytes=self._mine.nbytes,
            capacity_bytes=whole.capacity_bytes if quota is None else quota,
            quarantined=0,
            evicted=self._evicted,
            refused=self._refused,
        )

    async def put(self, header: Header, envelope: memoryview) -> PutResult:
        if header.key in self._mine.keys:
            return PutResult.PRESENT
        size = header.envelope_bytes
        async with self._turn:
            admitted = await self._make_room(size, header.key)
            self._mine.coming += size * admitted
        if not admitted:
            self._refused += 1
            return PutResult.REFUSED
        try:
            return await self.inner.put(header, envelope)
        finally:
            self._mine.coming -= size

    async def get(self, key: BlockKey, into: memoryview) -> Header:
        if key not in self._mine.keys:
            raise BlockNotFound(key.hex())
        return await self.inner.get(key, into)

    async def delete(self, keys: Iterable[BlockKey]) -> int:
        return await self.inner.delete([key for key in keys if key in self._mine.keys])

    async def close(self) -> None:
        """Nothing: the tier goes on."""

    async def keep_quota(self) -> None:
        """Give up what is above a quota that was lowered. Raises TierUnavailable."""
        async with self._turn:
            await self._make_room(0, None)

    async def _make_room(self, size: int, newcomer: BlockKey | None) -> bool:
        """Whether ``size`` bytes fit under the quota, once the tenant's least valuable blocks have gone for them.

        Holds ``_turn``. What is coming counts twice for the moment in which it is listed and its ``put`` returns: too much
        may go, and the quota is never exceeded.
        """
        quota = self._quota()
        if quota is None:
            return True
        if size > quota:
            return False
        if (over := self._mine.nbytes + self._mine.coming + size - quota) > 0:
            await self._give_up(max(over, int(quota * GIVEN_UP_AT_ONCE)), newcomer)
        return self._mine.nbytes + self._mine.coming + size <= quota

    async def _give_up(self, nbytes: int, newcomer: BlockKey | None) -> None:
        index, rows = self._ledger.index, self._ledger.rows(self._tenant)
        order = eviction_order(index, self._policy, rows[index.pins[rows] == 0], time.time())
        enough = int(slot_sizes(index.length[order]).cumsum().searchsorted(nbytes)) + 1
        going = [index.key(row) for row in order[:enough].tolist()]
        if not going:
            return
        self._evicted += await self.inner.delete(going)
        if self.on_evict is not None:
            self.on_evict(self.medium, going, newcomer)
