"""Reads blocks from other regions on demand: a tier that keeps nothing and writes nothing.

What it offers is in the manifests of other regions that this region's replicator has verified and kept in its own bucket, less
what rules, pauses and tombstones forbid (``replication.remoteindex``). Their signatures are checked again here: many can write
to a bucket. Looked at again every minute; a region that does not
answer is not offered until it does. What turns out damaged or gone is offered no more until the other region has stored it
anew; there, nothing is ever changed.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import AsyncExitStack, suppress
from dataclasses import replace
from functools import partial

import structlog
from prometheus_client import CollectorRegistry, Gauge
from prometheus_client import Counter as Metric

from kvstore.assembly import node_name, object_settings
from kvstore.config import Config
from kvstore.envelope import Header
from kvstore.errors import (
    BlockCorrupt,
    BlockNotFound,
    BlockTooLarge,
    ConfigError,
    KVStoreError,
    OtherFormat,
    TierUnavailable,
)
from kvstore.identity import BlockKey
from kvstore.tiers.base import BlockStat, Medium, PutResult, Tier, TierStats
from kvstore.tiers.object import ObjectSettings
from kvstore.tiers.object.budget import ByteBudget
from kvstore.tiers.object.names import block_name
from kvstore.tiers.object.objects import Found
from replication.contents import Contents
from replication.copier import checked
from replication.links import Links
from replication.manifest import MAX_MANIFEST_BYTES, ManifestRefused, Table, open_table
from replication.names import manifest_name
from replication.pause import read_pauses
from replication.planner import GB
from replication.purse import Purse
from replication.rate import RateLimit
from replication.remoteindex import Offer, Offered, compile_offer
from replication.site import Site
from replication.topology import Flow, Topology, load_topology

log = structlog.get_logger(__name__)

REFRESH_SECONDS = 60.0
"""As often as regions publish."""
READ_SECONDS = 30.0
"""For one block: no engine waits longer, and a node that stops waits for what is under way."""
RETRY_SECONDS = 5.0
"""While a region does not answer, or no manifest of it has come."""


class Regions:
    """The other regions, as one node sees them: what they offer, and the ways there. Owned by the node's event loop."""

    def __init__(
        self,
        near: Links,
        far: Mapping[str, Links],
        topology: Topology,
        region: str,
        registry: CollectorRegistry,
        bytes_in_flight: int,
        node: str,
    ) -> None:
        """``near`` leads to the bucket of ``region``, ``far`` to those of its sources; ``node`` is this one's name in it."""
        self._contents = Contents(near)
        self._far = far
        self._topology = topology
        self._region = region
        self._tenants: Counter[str] = Counter()
        """How many tiers each has open."""
        self._offer = self._withheld = Offer((), ())
        self._tables: dict[str, tuple[str | None, Table]] = {}
        """By source, with the etag of the manifest that it is."""
        self._seen: object = None
        """What the offer was made of."""
        self._forgotten: dict[BlockKey, float] = {}
        """When blocks that are offered no more had been created."""
        self._budget = ByteBudget(bytes_in_flight)
        self._rates = {flow.identity: RateLimit(flow.bytes_per_second) for flow in topology.flows_to(region)}
        self._purses = {
            flow.identity: Purse(near, flow, node)
            for flow in topology.flows_to(region)
            if flow.money_per_month is not None
        }
        self._nbytes = Metric(
            "kvstore_remote_bytes", "Bytes read from other regions on demand", ("region",), registry=registry
        )
        self._cost = Metric(
            "kvstore_remote_cost",
            "Price of the bytes read on demand by the topology, in its currency",
            ("region",),
            registry=registry,
        )
        money = Gauge(
            "kvstore_remote_money_spent",
            "1 while nothing is read by some flow because its month's money is spent",
            ("region",),
            registry=registry,
        )
        for source in far:
            money.labels(source).set_function(partial(self._spent_money, source))
        self._refused = Metric(
            "kvstore_remote_refused_manifests",
            "Manifests of other regions in the own bucket that were not believed, by reason",
            ("region", "reason"),
            registry=registry,
        )
        self._woken = asyncio.Event()
        self._refreshing: asyncio.Task[None] | None = None
        self._stack = AsyncExitStack()

    @classmethod
    async def open(cls, config: Config, registry: CollectorRegistry) -> Regions:
        """As configured; begins to look in the background. Raises ConfigError."""
        assert config.region.topology is not None
        topology = load_topology(config.region.topology).limited(config.remote.bytes_per_second)
        region = config.region.name
        if region not in topology.regions:
            remedy = f"Name one of these: {', '.join(topology.regions)}."
            raise ConfigError("region.name", region, "the topology has no such region", remedy)
        Site(config, topology, region)  # the bucket must be the region's
        sources = dict.fromkeys(flow.source for flow in topology.flows_to(region))
        if not sources:
            problem = "nothing can be read: no flow of the topology leads there"
            raise ConfigError("region.name", region, problem, "Add a flow, or set remote.mode = off.")
        async with AsyncExitStack() as stack:
            near = await stack.enter_async_context(Links.open([object_settings(config)], patience=0.0))
            far = {
                name: await stack.enter_async_context(Links.open(_impatient(topology.links(name)), patience=0.0))
                for name in sources
            }
            node = node_name(config.node.directory)
            regions = cls(near, far, topology, region, registry, config.remote.bytes_in_flight, node)
            regions._stack = stack.pop_all()
        regions._refreshing = asyncio.create_task(regions._refresh_regularly())
        return regions

    def tier(self, tenant: str) -> RemoteTier:
        """What a tenant may read. When the last tier is closed, so are the ways to the other regions."""
        self._tenants[tenant] += 1
        self._woken.set()
        return RemoteTier(self, tenant)

    async def leave(self, tenant: str) -> None:
        """A tier of that tenant is closed."""
        self._tenants -= Counter([tenant])
        if not self._tenants:
            if self._refreshing is not None:
                self._refreshing.cancel()
                await asyncio.wait([self._refreshing])
            for purse in self._purses.values():
                await purse.close()
            await self._stack.aclose()

    @property
    def offer(self) -> Offer:
        """What may be read now."""
        return self._offer

    @property
    def withheld(self) -> Offer:
        """What could be read if its flow's money for the month were not spent."""
        return self._withheld

    def spent(self, flow: Flow) -> bool:
        """Its money for this month is."""
        return flow.identity in self._purses and self._purses[flow.identity].spent

    def forget(self, tenant: str, keys: Iterable[BlockKey]) -> int:
        """Offer blocks no more, until they were stored anew there; how many were offered."""
        gone = self._offer.forget(tenant, list(keys))
        self._forgotten.update(gone)
        return len(gone)

    async def read(self, offered: Offered, into: memoryview) -> Header | None:
        """Fetch a block and verify it. None: it is gone, or there is no money for it. Raises BlockCorrupt, TierUnavailable."""
        block, flow = offered.block, offered.flow

        def check(found: Found, envelope: memoryview) -> Header:
            self._nbytes.labels(flow.source).inc(len(envelope))
            self._cost.labels(flow.source).inc(len(envelope) / GB * flow.price_per_gb)
            return checked(block, found, envelope)

        purse = self._purses.get(flow.identity)
        if purse is not None and not await purse.pay(block.nbytes):
            self._woken.set()
            return None
        async with self._budget.taken(block.nbytes):
            await self._rates[flow.identity].take(block.nbytes)
            name = block_name(block.namespace, block.key)
            try:
                return await self._far[flow.source].get(name, into[: block.nbytes], check)
            except BlockTooLarge as error:
                raise BlockCorrupt(f"larger than the {block.nbytes} bytes that were published: {error}") from error

    async def refresh(self) -> bool:
        """Look what is offered now; whether that is all of the regions. Raises TierUnavailable when the own bucket does not."""
        near = self._contents.bucket
        tombstones = await self._contents.tombstones()
        paused = await read_pauses(near)
        kept = {source: await near.head(manifest_name(source)) for source in self._far if source not in paused}
        published = {source: manifest.etag for source, manifest in kept.items() if manifest is not None}
        found = {source: etag for source, etag in published.items() if await self._answers(source)}
        for purse in self._purses.values():
            await purse.look()
        spent = {flow for flow, purse in self._purses.items() if purse.spent}  # a new month begins with money
        seen = found, [stone.identity for stone in tombstones], sorted(self._tenants), spent
        if seen == self._seen:
            return len(found) == len(kept)
        tables = [table for source, etag in found.items() if (table := await self._read_table(source, etag))]
        flows = list(self._topology.flows_to(self._region))

        def compiled(out_of_money: bool) -> Offer:
            wanted = [flow for flow in flows if (flow.identity in spent) is out_of_money]
            return compile_offer(tables, self._topology, self._region, seen[2], tombstones, wanted)

        offer, self._withheld = await asyncio.to_thread(compiled, False), await asyncio.to_thread(compiled, True)
        self._take(offer)
        self._seen = seen
        return len(found) == len(kept)

    def _spent_money(self, source: str) -> float:
        return float(any(self.spent(flow) for flow in self._topology.flows_to(self._region) if flow.source == source))

    def _take(self, offer: Offer) -> None:
        """Put a new offer in the old one's place, less what is forgotten."""
        still: dict[BlockKey, float] = {}
        for tenant in offer.shares:
            for key, created in self._forgotten.items():
                offered = offer.find(tenant, key)
                if offered is not None and offered.block.created <= created:
                    still[key] = created
            offer.forget(tenant, still)
        self._forgotten = still
        self._offer = offer

    async def _read_table(self, source: str, etag: str | None) -> Table | None:
        known = self._tables.get(source)
        if known is not None and known[0] == etag:
            return known[1]
        try:
            raw = await self._contents.bucket.read(manifest_name(source), MAX_MANIFEST_BYTES)
            if raw is None:
                return None
            table = await asyncio.to_thread(open_table, raw, source, self._topology.key_of(source))
        except (ManifestRefused, BlockTooLarge) as error:
            reason = error.reason if isinstance(error, ManifestRefused) else "oversize"
            self._refused.labels(source, reason).inc()
            log.warning("nothing is read from a region: its manifest is refused", region=source, error=str(error))
            return None
        self._tables[source] = etag, table
        return table

    async def _answers(self, source: str) -> bool:
        """Whether the other region's bucket can be read; this also opens a connection there."""
        try:
            return await self._far[source].head(manifest_name(source)) is not None
        except TierUnavailable as error:
            log.warning("region not read from", region=source, error=str(error))
            return False

    async def _refresh_regularly(self) -> None:
        while True:
            self._woken.clear()
            whole = False
            try:
                whole = await self.refresh()
            except KVStoreError as error:
                log.warning("not seen what other regions offer", error=str(error))
            with suppress(TimeoutError):
                await asyncio.wait_for(self._woken.wait(), REFRESH_SECONDS if whole else RETRY_SECONDS)


class RemoteTier(Tier):
    """What one tenant may read of other regions. Owned by the node's event loop."""

    medium = Medium.REMOTE

    def __init__(self, regions: Regions, tenant: str) -> None:
        self._regions = regions
        self._tenant = tenant
        self._bad = 0

    def keys(self) -> AbstractSet[BlockKey]:
        return self._regions.offer.keys(self._tenant)

    def stat(self, key: BlockKey) -> BlockStat | None:
        """Also of blocks that are withheld, which ``keys`` does not have."""
        regions = self._regions
        return regions.offer.stat(self._tenant, key) or regions.withheld.stat(self._tenant, key)

    def touch(self, keys: Iterable[BlockKey]) -> None:
        """Nothing: what is used here, the other region need not know."""

    def stats(self) -> TierStats:
        """``used_bytes``: what is offered."""
        share = self._regions.offer.share(self._tenant)
        return TierStats(self.medium, len(share.places), share.nbytes, None, quarantined=self._bad)

    async def put(self, header: Header, envelope: memoryview) -> PutResult:
        return PutResult.REFUSED

    async def get(self, key: BlockKey, into: memoryview) -> Header:
        offered = self._regions.offer.find(self._tenant, key)
        if offered is None:
            raise BlockNotFound(key.hex())
        if offered.block.nbytes > len(into):
            raise BlockTooLarge(f"a block of {offered.block.nbytes} bytes, and a buffer of {len(into)}")
        try:
            header = await self._regions.read(offered, into)
        except OtherFormat as error:  # written by a node of another version
            self._regions.forget(self._tenant, [key])
            raise BlockNotFound(key.hex()) from error
        except BlockCorrupt as error:
            self._bad += 1
            self._regions.forget(self._tenant, [key])
            log.warning("bad block in another region", region=offered.flow.source, block=key.hex(), problem=str(error))
            raise
        if header is None and not self._regions.spent(offered.flow):
            self._regions.forget(self._tenant, [key])
        if header is None:
            raise BlockNotFound(key.hex())
        return header

    async def delete(self, keys: Iterable[BlockKey]) -> int:
        """Offers them no more; the other region keeps them."""
        return self._regions.forget(self._tenant, keys)

    async def close(self) -> None:
        await self._regions.leave(self._tenant)


def _impatient(links: Sequence[ObjectSettings]) -> list[ObjectSettings]:
    return [replace(link, request_timeout=READ_SECONDS) for link in links]


async def open_regions(config: Config, registry: CollectorRegistry) -> Callable[[str], Tier]:
    """What gives each tenant of a node its tier (``kvstore.assembly.open_remote``). Raises ConfigError."""
    return (await Regions.open(config, registry)).tier
