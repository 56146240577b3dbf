"""Tells the catalog what this node did to the bucket: in order, in the background, and again after an outage."""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from itertools import islice

import structlog

from kvstore.catalog.base import BATCH, Catalog, Entry
from kvstore.errors import CatalogUnavailable
from kvstore.identity import BlockKey

log = structlog.get_logger(__name__)

MAX_PENDING = 100_000
"""Changes kept for a catalog that is away, some 30 MB. Beyond it the oldest are dropped, and the bucket has to be listed."""
FIRST_RETRY_SECONDS, LAST_RETRY_SECONDS = 0.1, 5.0


class Publisher:
    """A bounded queue of changes with the latest state of each block. Owned by one event loop."""

    def __init__(self, catalog: Catalog) -> None:
        self.reachable = True
        """Whether the catalog answered when it was last asked."""
        self.dropped = 0
        """Changes that the catalog never heard of."""
        self.published = 0
        self._catalog = catalog
        self._pending: dict[BlockKey, Entry | None] = {}
        self._offered = asyncio.Event()
        self._progress = asyncio.Condition()

    def offer(self, key: BlockKey, entry: Entry | None) -> None:
        """Queue what has become of a block; None: it is gone."""
        self._pending.pop(key, None)
        self._pending[key] = entry
        if len(self._pending) > MAX_PENDING:
            del self._pending[next(iter(self._pending))]
            self.dropped += 1
        self._offered.set()

    @property
    def pending(self) -> Collection[BlockKey]:
        """Blocks whose change the catalog may not know yet."""
        return self._pending.keys()

    async def flush(self, keys: Collection[BlockKey], timeout: float) -> bool:
        """Wait until the catalog knows the changes of ``keys``. False when it cannot be reached, or not in time."""
        try:
            async with asyncio.timeout(timeout), self._progress:
                await self._progress.wait_for(lambda: not self.reachable or self._pending.keys().isdisjoint(keys))
        except TimeoutError:
            return False
        return self.reachable

    async def run(self) -> None:
        """Publish until cancelled."""
        delay = FIRST_RETRY_SECONDS
        while True:
            await self._offered.wait()
            self._offered.clear()
            while self._pending:
                if await self._publish(dict(islice(self._pending.items(), BATCH))):
                    delay = FIRST_RETRY_SECONDS
                else:
                    await asyncio.sleep(delay)
                    delay = min(2 * delay, LAST_RETRY_SECONDS)

    def heard(self, error: CatalogUnavailable | None = None) -> None:
        """Note whether the catalog answered, to a call of whoever made one."""
        if error is not None and self.reachable:
            log.warning("the catalog does not answer; the node goes on without it", error=str(error))
        if error is None and not self.reachable:
            log.info("the catalog answers again", pending=len(self._pending))
        self.reachable = error is None

    async def _publish(self, changes: dict[BlockKey, Entry | None]) -> bool:
        try:
            await self._catalog.record(changes)
        except CatalogUnavailable as error:
            self.heard(error)
        else:
            self.heard()
            self.published += len(changes)
            for key, entry in changes.items():
                if self._pending.get(key, ...) is entry:
                    del self._pending[key]
        async with self._progress:
            self._progress.notify_all()
        return self.reachable
