"""The regional service: everything that a region does for itself, in one process. Any number of replicas may run.

publisher    the signed manifest of what is hot here
replicator   what is hot elsewhere, and tombstones
evictor      the bucket under its cap
quotas       each tenant's part of it under its quota
retention    what was not used for long, and old revisions of models
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

import structlog
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from prometheus_client import CollectorRegistry

from kvstore.units import human_bytes
from replication import evictor
from replication.contents import Contents
from replication.copier import Outcome
from replication.cycle import Cycle
from replication.duties import Duty, DutyMetrics, Keeper, Round
from replication.metrics import RegionMetrics
from replication.publisher import publish
from replication.quotas import keep_quotas
from replication.replicator import Replicator
from replication.retiring import retire
from replication.site import Site
from replication.topology import Topology

log = structlog.get_logger(__name__)

PUBLISH_SECONDS = 60.0
REPLICATE_SECONDS = 30.0
EVICT_SECONDS = 5.0
QUOTA_SECONDS = 30.0
RETIRE_SECONDS = 600.0
HOLD_UP_SECONDS = 10.0
"""How much later a slow source may make the next round for the others."""
STOP_SECONDS = 15.0
"""How long a service that is to stop may take: leases that it does not give back run out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """Seconds between rounds."""

    publish: float = PUBLISH_SECONDS
    replicate: float = REPLICATE_SECONDS
    evict: float = EVICT_SECONDS
    quota: float = QUOTA_SECONDS
    retire: float = RETIRE_SECONDS


async def serve(
    site: Site,
    key: Ed25519PrivateKey | None,
    stop: asyncio.Event,
    registry: CollectorRegistry | None = None,
    pace: Pace = Pace(),
) -> None:
    """Do the region's duties until ``stop`` is set; then leases are given back.

    ``key`` signs the region's manifests; without one none are published. Buckets, catalogs and regions that are away end
    nothing. Raises ConfigError when credentials or the catalog's password cannot be used.
    """
    registry = registry or CollectorRegistry()
    async with AsyncExitStack() as stack:
        contents = await stack.enter_async_context(site.open_contents())
        duties = _Duties(site, contents, registry)
        if site.topology is not None and site.topology.mode != "off":
            duties.replicate_with(
                await stack.enter_async_context(
                    Replicator.beside(site.topology, site.region, contents, capacity=site.capacity)
                )
            )
        wanted = list(duties.wanted(key, pace))
        log.info("regional service runs", region=site.region, duties=[duty.role for duty in wanted])
        metrics = DutyMetrics(registry)
        tasks = [asyncio.create_task(Keeper(contents.bucket, duty, metrics).run()) for duty in wanted]
        try:
            await stop.wait()
        finally:
            log.info("regional service stops", region=site.region)
            for task in tasks:
                task.cancel()
            if tasks:
                await asyncio.wait(tasks)


@asynccontextmanager
async def beside_a_node(
    site: Site, key: Ed25519PrivateKey | None, registry: CollectorRegistry | None = None
) -> AsyncIterator[None]:
    """``serve`` in a thread with an event loop of its own, while the context lasts.

    So its rounds do not hold up the node's event loop, and whatever becomes of it, the node goes on. Raises ConfigError.
    """
    _ = site.links  # credentials that cannot be used are known before anything starts
    loop, stop = asyncio.new_event_loop(), asyncio.Event()

    def run() -> None:
        try:
            loop.run_until_complete(serve(site, key, stop, registry))
        except Exception:
            log.exception("the regional service broke; the node goes on without it")

    thread = threading.Thread(target=run, name="region", daemon=True)
    thread.start()
    try:
        yield
    finally:
        loop.call_soon_threadsafe(stop.set)
        await asyncio.to_thread(thread.join, STOP_SECONDS)
        if not thread.is_alive():
            loop.close()


class _Duties:
    """One round of each."""

    def __init__(self, site: Site, contents: Contents, registry: CollectorRegistry) -> None:
        self.replicator: Replicator | None = None
        self._site = site
        self._contents = contents
        self._problems: dict[str, str] = {}
        """With each source, when it was visited last."""
        self._metrics = RegionMetrics(registry)
        self._metrics.watch(site.region, contents.bucket)

    def replicate_with(self, replicator: Replicator) -> None:
        """Bring what is hot elsewhere with this one."""
        self.replicator = replicator
        for region, links in replicator.far.items():
            self._metrics.watch(region, links)

    def wanted(self, key: Ed25519PrivateKey | None, pace: Pace) -> Iterator[Duty]:
        """Those that the topology and the configuration ask for."""
        if key is not None:
            yield Duty("publisher", pace.publish, lambda: self._publish(key))
        if self.replicator is not None and self.replicator.sources:
            yield Duty(
                "replicator", pace.replicate, self._replicate, self._metrics.standing_by, self.replicator.at_work
            )
        if self._site.capacity is not None and self._contents.catalog is not None:
            yield Duty("evictor", pace.evict, self._evict)

        topology = self._site.topology
        if topology is not None and topology.mode != "off" and topology.quota and self._contents.catalog is not None:
            yield Duty("quotas", pace.quota, lambda: self._keep_quotas(topology))
        if topology is not None and topology.mode != "off" and topology.retention:
            yield Duty("retention", pace.retire, lambda: self._retire(topology))

    async def _publish(self, key: Ed25519PrivateKey) -> Round:
        manifest = await publish(self._contents, self._site.region, key)
        self._metrics.published(manifest)
        size = human_bytes(sum(block.nbytes for block in manifest.blocks))
        return Round(f"published {len(manifest.blocks):,} blocks ({size}), sequence {manifest.sequence}")

    async def _replicate(self) -> Round:
        assert self.replicator is not None
        enforce = self.replicator.topology.mode == "enforce"
        cycle = await (self.replicator.round(seconds=HOLD_UP_SECONDS) if enforce else self.replicator.plan())
        if enforce:
            self._metrics.cycled(cycle)
        self._problems |= {source: cycle.problems.get(source, "") for source in cycle.away_since}
        problems = (f"{source}: {text}" for source, text in self._problems.items() if text)
        return Round(_told(cycle, enforce), "; ".join(problems))

    async def _evict(self) -> Round:
        assert self._site.capacity is not None
        evicted = await evictor.make_room(self._contents, self._site.capacity)
        self._metrics.deleted("capacity", evicted)
        return Round(f"evicted {evicted:,} blocks" if evicted else "")

    async def _keep_quotas(self, topology: Topology) -> Round:
        enforce = topology.mode == "enforce"
        evicted = await keep_quotas(self._contents, topology.quotas, enforce)
        return Round(f"{'evicted' if enforce else 'would evict'} {evicted:,} blocks" if evicted else "")

    async def _retire(self, topology: Topology) -> Round:
        enforce = topology.mode == "enforce"
        report = await retire(self._contents, topology.retention, enforce)
        count = report.blocks.total()
        self._metrics.deleted("retention", count if enforce else 0)
        verb = "retired" if enforce else "would retire"
        return Round(f"{verb} {count:,} blocks ({human_bytes(report.nbytes)})" if count else "")


def _told(cycle: Cycle, enforce: bool) -> str:
    """What a cycle did, or would do; empty when it was nothing."""
    if not enforce:
        planned = sum(len(report.plan.blocks) for report in cycle.flows)
        size = human_bytes(sum(report.plan.nbytes for report in cycle.flows))
        cost = sum(report.cost for report in cycle.flows)
        return f"would copy {planned:,} blocks ({size}) for {cost:.4f}" if planned else ""
    copied = sum(report.copied.outcomes.get(Outcome.COPIED, 0) for report in cycle.flows)
    size = human_bytes(sum(report.copied.nbytes for report in cycle.flows))
    parts = [f"copied {copied:,} blocks ({size})"] if copied else []
    parts += [f"deleted {cycle.buried:,} blocks by tombstones"] if cycle.buried else []
    return ", ".join(parts)
