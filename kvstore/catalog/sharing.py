"""A node's part in its region: it tells the catalog what it stores, learns what others store, and does its share of duties."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import suppress

import structlog
from prometheus_client import CollectorRegistry, Gauge
from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

from kvstore.catalog.base import Catalog, Entry
from kvstore.catalog.documents import Documents
from kvstore.catalog.follower import Follower
from kvstore.catalog.presence import Presence
from kvstore.catalog.publisher import Publisher
from kvstore.catalog.rebuild import ROLE as REBUILD
from kvstore.catalog.rebuild import ROLE_SECONDS as REBUILD_SECONDS
from kvstore.catalog.rebuild import fill
from kvstore.envelope import Header
from kvstore.errors import CatalogUnavailable, KVStoreError
from kvstore.identity import BlockKey
from kvstore.tiers.object import ObjectTier, Peers

log = structlog.get_logger(__name__)

FOLLOW_SECONDS = 0.2
"""How often others' changes are asked for: one small script each time."""
DUTY_SECONDS = 2.0
LEASE_SECONDS = 15.0
"""A node that is silent for so long is gone, and its roles are free."""
UNPUBLISH_SECONDS = 1.0
"""How long a deletion waits for the catalog to know of it. After that, others may meet a block that is gone: a miss."""
CLOSE_SECONDS = 2.0
LAST_RETRY_SECONDS = 5.0
EVICT = "role/evictor"
FREE_SHARE = 1 / 16
"""Part of the capacity that the evictor keeps free, for what several nodes write before they see each other's blocks."""


class Sharing(Peers):
    """Joins an object tier to a catalog.

    While the catalog is away, the node works with what it knows: it serves and stores blocks, its changes wait in a bounded
    queue, and it asks the bucket itself for blocks that others may have stored.
    """

    def __init__(self, catalog: Catalog, node: Presence, capacity: int | None, largest_block: int) -> None:
        """``capacity``: bytes that the nodes of the region keep the bucket under together; None: no limit.

        ``largest_block``: envelope bytes that the node can load.
        """
        self.name = node.process
        self._node = node
        self.keep_room = capacity is not None
        self._catalog = catalog
        self._publisher = Publisher(catalog)
        self._capacity = capacity
        self._largest_block = largest_block
        self._tier: ObjectTier
        self._follower: Follower
        self._evictor = False
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def documents(self) -> Documents:
        """What the processes of the region tell each other."""
        return self._catalog.documents

    def also(self, work: Callable[[], Awaitable[None]]) -> Callable[[], object]:
        """Do ``work`` every ``DUTY_SECONDS`` too, until ``close`` or until what is returned is called.

        A KVStoreError that it raises is logged.
        """
        task = asyncio.create_task(self._forever(work, DUTY_SECONDS))
        self._tasks.append(task)
        return task.cancel

    def watch(self, registry: CollectorRegistry) -> None:
        """Show the state of the link in ``registry``."""

        def gauge(name: str, text: str, value: Callable[[], float]) -> None:
            Gauge(f"kvstore_catalog_{name}", text, registry=registry).set_function(value)

        gauge("reachable", "1 while the catalog answers", lambda: self._publisher.reachable)
        gauge("complete", "1 while the catalog covers the whole bucket", lambda: self._follower.complete)
        gauge("pending_changes", "Changes that wait to be published", lambda: len(self._publisher.pending))
        registry.register(_Changes(self))

    @property
    def changes(self) -> tuple[int, int]:
        """Published, and learnt from the catalog, since the start."""
        return self._publisher.published, self._follower.applied

    # --- what the tier asks and tells

    def join(self, tier: ObjectTier) -> None:
        self._tier = tier
        self._follower = Follower(self._catalog, tier, self._publisher, self._largest_block)
        works = [
            self._publisher.run(),
            self._forever(self._follow, FOLLOW_SECONDS),
            self._forever(self._renew_claims, DUTY_SECONDS),
            self._forever(self._fill, DUTY_SECONDS),
            self._forever(self._evict, DUTY_SECONDS),
        ]
        self._tasks += [asyncio.create_task(work) for work in works]

    async def stock(self) -> bool:
        try:
            await self._follower.catch_up()
        except CatalogUnavailable as error:
            self._publisher.heard(error)
            return False
        return self._follower.complete

    def stored(self, header: Header) -> None:
        self._publisher.offer(header.key, Entry.of(header))

    def lost(self, key: BlockKey) -> None:
        self._publisher.offer(key, None)

    async def deleting(self, keys: Sequence[BlockKey]) -> None:
        for key in keys:
            self._publisher.offer(key, None)
        await self._publisher.flush(set(keys), UNPUBLISH_SECONDS)

    async def close(self) -> None:
        tasks, self._tasks = self._tasks, []
        if tasks:
            await self._publisher.flush(set(self._publisher.pending), CLOSE_SECONDS)
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
            with suppress(CatalogUnavailable):  # what is not given back runs out
                await self._catalog.documents.put(self._node.document, b"", 0)
                for name in (EVICT, REBUILD):
                    await self._catalog.claim(name, self.name, 0)
        await self._catalog.close()

    # --- what the store asks

    async def probe(self, keys: Sequence[BlockKey]) -> None:
        """Look for blocks that the tier does not list: in the catalog, then in the bucket, to which others may write as well.

        Raises TierUnavailable.
        """
        if self._publisher.reachable:
            try:
                await self._follower.ask([key for key in keys if key not in self._tier.keys()])
            except CatalogUnavailable as error:
                self._publisher.heard(error)
        await self._tier.probe(keys)

    # --- in the background

    async def _forever(self, work: Callable[[], Awaitable[None]], seconds: float) -> None:
        delay = seconds
        while True:
            try:
                await work()
                delay = seconds
            except KVStoreError as error:
                if isinstance(error, CatalogUnavailable):
                    self._publisher.heard(error)
                else:
                    log.warning("a duty of the region failed", error=str(error))
                delay = min(2 * delay, LAST_RETRY_SECONDS)
            await asyncio.sleep(delay)

    async def _follow(self) -> None:
        await self._follower.catch_up()
        self._publisher.heard()

    async def _renew_claims(self) -> None:
        try:
            await self._catalog.documents.put(self._node.document, self._node.pack(), LEASE_SECONDS)
            if self._capacity is not None:
                self._evictor = await self._catalog.claim(EVICT, self.name, LEASE_SECONDS) is not None
        except CatalogUnavailable:
            self._evictor = False
            raise

    async def _fill(self) -> None:
        """Bring the catalog in line with the bucket, if that is needed and no other node is at it."""
        if self._follower.complete and not self._publisher.dropped:
            return
        if await self._catalog.claim(REBUILD, self.name, REBUILD_SECONDS) is None:
            return
        dropped, status = self._publisher.dropped, await self._catalog.status()
        if dropped or not status.complete:  # else another node was faster
            log.info("filling the catalog from the bucket")
            blocks = await fill(self._catalog, self._tier.objects, status.epoch, self._keep_filling)
            if blocks is not None:
                log.info("the catalog covers the bucket", blocks=blocks)
                self._publisher.dropped -= dropped
        await self._catalog.claim(REBUILD, self.name, 0)

    async def _keep_filling(self, _: int) -> None:
        await self._catalog.claim(REBUILD, self.name, REBUILD_SECONDS)

    async def _evict(self) -> None:
        """Keep some of the bucket free. Two who believe to be the evictor do no harm but evict more."""
        if self._capacity is None or not self._evictor or not self._tier.ready.is_set():
            return
        free = max(int(self._capacity * FREE_SHARE), min(self._largest_block, self._capacity // 4))
        if evicted := await self._tier.make_room(free):
            log.info("made room in the bucket", blocks=evicted)


class _Changes(Collector):
    """What went to the catalog and what came from it."""

    def __init__(self, sharing: Sharing) -> None:
        self._sharing = sharing

    def describe(self) -> Iterable[Metric]:
        return ()

    def collect(self) -> Iterator[Metric]:
        published, applied = self._sharing.changes
        yield CounterMetricFamily("kvstore_catalog_published_changes", "Changes published in the catalog", published)
        yield CounterMetricFamily("kvstore_catalog_applied_changes", "Changes learnt from the catalog", applied)
