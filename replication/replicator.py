"""The work of a destination region: pull manifests, bury, plan, copy, write down how far it came."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Self

import structlog

from kvstore.catalog.base import Catalog, Entry
from kvstore.errors import BlockTooLarge, TierUnavailable
from kvstore.identity import NO_PARENT, BlockKey
from kvstore.tiers.object import ObjectSettings
from kvstore.tombstones import Tombstone
from replication.contents import Contents
from replication.copier import MEMORY_BYTES, Copied, Outcome, ServerSide, Streamed, Transfer, Window, copy
from replication.cursor import Cursor, Ledger
from replication.evictor import known_scores, overflow
from replication.hotset import share_namespaces
from replication.links import Links
from replication.manifest import MAX_MANIFEST_BYTES, HotBlock, Label, Manifest, ManifestRefused, open_manifest
from replication.names import manifest_name
from replication.pause import read_pauses
from replication.planner import GB, LeftOut, Limits, Plan, affordable, plan
from replication.publisher import entomb
from replication.quotas import overflow_of_tenants, read_owners
from replication.rate import RateLimit
from replication.retention import Retired
from replication.retiring import read_retired
from replication.topology import Flow, Topology

log = structlog.get_logger(__name__)

Progress = Callable[["FlowReport", HotBlock, Outcome], None]


@dataclass
class FlowReport:
    """What one flow would bring, and what it brought."""

    source: str
    flow: str
    price_per_gb: float
    plan: Plan = field(default_factory=lambda: Plan(()))
    copied: Copied = field(default_factory=Copied)
    seconds: float = 0.0

    @property
    def cost(self) -> float:
        """Of the plan."""
        return self.plan.nbytes / GB * self.price_per_gb


@dataclass
class Cycle:
    """One round over all sources."""

    flows: list[FlowReport] = field(default_factory=list)
    problems: dict[str, str] = field(default_factory=dict)
    """By source: why its manifest was refused, or its copy broke off."""
    lag: dict[str, float | None] = field(default_factory=dict)
    """By source, in seconds."""
    buried: int = 0
    """Blocks deleted because of tombstones."""


@dataclass(frozen=True, slots=True)
class _Pulled:
    manifest: Manifest
    raw: bytes
    cursor: Cursor


class Replicator:
    """Brings hot blocks to one region. Open it with ``Replicator.open``; all calls in one event loop."""

    def __init__(
        self,
        topology: Topology,
        region: str,
        contents: Contents,
        far: Mapping[str, Links],
        budget: int | None = None,
        capacity: int | None = None,
    ) -> None:
        """``contents`` are the region's own, ``far`` leads to the buckets of all others; for the others see ``open``."""
        self.topology = topology
        self.region = region
        self.near = contents.bucket
        self._contents = contents
        self._budget = budget
        self._capacity = capacity
        self.far = far
        self.sources = frozenset(far)
        """Regions that it hears of, for their tombstones at least."""
        self._settings = {name: topology.links(name) for name in (region, *far)}
        self._sources = {flow.source for flow in topology.flows_to(region)}
        self._windows = {source: Window(MEMORY_BYTES // max(1, len(self._sources))) for source in self._sources}
        self._rates = {flow.identity: RateLimit(flow.bytes_per_second) for flow in topology.flows_to(region)}

    @classmethod
    @asynccontextmanager
    async def open(
        cls,
        topology: Topology,
        region: str,
        catalog: Catalog | None = None,
        budget: int | None = None,
        capacity: int | None = None,
    ) -> AsyncIterator[Self]:
        """Connect to the region and to every other one whose key is known. Raises ConfigError.

        ``catalog`` is the region's own, if there is one: what is copied and deleted is recorded in it at once. ``budget``
        limits the bytes that one round copies, over all flows; ``capacity`` is the cap of the region's bucket in bytes.
        """
        async with Links.open(topology.links(region)) as near, Contents.open(near, catalog) as contents:
            async with cls.beside(topology, region, contents, budget, capacity) as replicator:
                yield replicator

    @classmethod
    @asynccontextmanager
    async def beside(
        cls,
        topology: Topology,
        region: str,
        contents: Contents,
        budget: int | None = None,
        capacity: int | None = None,
    ) -> AsyncIterator[Self]:
        """As ``open``, for who has the region's contents open already."""
        async with AsyncExitStack() as stack:
            far = {
                name: await stack.enter_async_context(Links.open(topology.links(name)))
                for name, table in topology.regions.items()
                if name != region and table.public_key
            }
            yield cls(topology, region, contents, far, budget, capacity)

    async def plan(self) -> Cycle:
        """What a cycle would do now. Changes nothing. Raises TierUnavailable when the own bucket does not answer."""
        cycle = Cycle()
        pulled = await self._pull(cycle)
        await self._plan(cycle, pulled, _united(await self._contents.tombstones(), pulled))
        return cycle

    async def cycle(self, progress: Progress = lambda report, block, outcome: None) -> Cycle:
        """Do it. A source that fails is left for the next cycle. Raises TierUnavailable, as ``plan`` does."""
        cycle = Cycle()
        pulled = await self._pull(cycle)
        known = await self._contents.tombstones()
        stones = _united(known, pulled)
        if new := stones[len(known) :]:
            cycle.buried = await entomb(self._contents, new)
        for source, one in pulled.items():
            await self._believe(source, one)
        await self._plan(cycle, pulled, stones)
        paused = await read_pauses(self.near)
        cycle.problems |= {source: str(paused[source]) for source in self._sources & paused.keys()}
        copied_from = {source: one for source, one in pulled.items() if source not in paused}
        await asyncio.gather(
            *(self._settle(cycle, source, copied_from.get(source), progress) for source in self._sources)
        )
        heeded = set(stones)
        if late := [stone for stone in await self._contents.tombstones() if stone not in heeded]:
            cycle.buried += await entomb(self._contents, late)  # what they bury may have been copied meanwhile
        return cycle

    # --- manifests

    async def _pull(self, cycle: Cycle) -> dict[str, _Pulled]:
        """Manifests of all other regions: those without a flow may still have tombstones for us."""

        async def pull(source: str) -> None:
            cursor = await Cursor.load(self.near, source)
            try:
                raw = await self.far[source].read(manifest_name(source), MAX_MANIFEST_BYTES)
                if raw is None:
                    if source in self._sources:
                        cycle.problems[source] = "it has not published a manifest yet"
                    return
                manifest = open_manifest(raw, source, self.topology.key_of(source), cursor.sequence)
                pulled[source] = _Pulled(manifest, raw, cursor)
            except (ManifestRefused, BlockTooLarge, TierUnavailable) as error:
                log.warning("no manifest", source=source, error=str(error))
                cycle.problems[source] = str(error)

        pulled: dict[str, _Pulled] = {}
        await asyncio.gather(*(pull(source) for source in self.far))
        return {source: pulled[source] for source in self.far if source in pulled}

    async def _believe(self, source: str, pulled: _Pulled) -> None:
        """Remember the manifest: against replays, and as the hot set for warming nodes here."""
        cursor, manifest = pulled.cursor, pulled.manifest
        if manifest.sequence > cursor.sequence:
            await self.near.put(manifest_name(source), pulled.raw, create=False)
            cursor.sequence, cursor.published = manifest.sequence, manifest.published
            await cursor.save(self.near)

    # --- planning

    async def _plan(self, cycle: Cycle, pulled: Mapping[str, _Pulled], stones: Sequence[Tombstone]) -> None:
        held = await self._contents.blocks()
        quotas = self.topology.quotas
        bounded = self._capacity is not None or quotas
        scores, pinned = (await known_scores(self._contents), await self._contents.pinned()) if bounded else ({}, set())
        owners = await read_owners(self.near) if quotas else {}
        have: set[BlockKey] = set(held)
        retired = await read_retired(self.near)
        now, left = time.time(), self._budget
        for flow in self.topology.flows_to(self.region):
            if flow.source not in pulled:
                continue
            manifest, cursor = pulled[flow.source].manifest, pulled[flow.source].cursor
            limits = Limits(
                min_score=flow.min_score,
                held_bytes=_may_hold(flow, left, manifest, have),
                copied_bytes=_affordable(flow, cursor, now),
            )
            report = FlowReport(flow.source, flow.identity, flow.price_per_gb)
            buried = [*stones, *retired.stones(manifest.blocks)]
            wants = partial(self._wants, flow, retired)
            report.plan = plan(manifest.blocks, manifest.labels, have, limits, buried, wants)
            coming = [*(block for earlier in cycle.flows for block in earlier.plan.blocks), *report.plan.blocks]
            lost: set[BlockKey] = set()
            if self._capacity is not None:
                lost |= overflow(held.values(), scores, coming, self._capacity, pinned)
            if quotas:
                owners |= {label.digest: label.tenant for label in manifest.labels.values()}
                lost |= overflow_of_tenants(held.values(), owners, scores, coming, quotas, pinned)
            report.plan = report.plan.without(lost, LeftOut.ROOM)
            have.update(block.key for block in report.plan.blocks)
            left = None if left is None else left - report.plan.nbytes
            cycle.flows.append(report)

    def _wants(self, flow: Flow, retired: Retired, label: Label) -> LeftOut | None:
        if not flow.takes(label):
            return LeftOut.OTHER_FLOW
        if label.digest in retired.namespaces:
            return LeftOut.TOMBSTONE
        return None if self.topology.permits(label, self.region) else LeftOut.RESIDENCY

    # --- copying

    async def _settle(self, cycle: Cycle, source: str, pulled: _Pulled | None, progress: Progress) -> None:
        """Copy what is planned from a source, and write down how far that went."""
        cursor = pulled.cursor if pulled else await Cursor.load(self.near, source)
        if pulled:
            try:
                await self._copy(cycle, pulled.manifest, cursor, progress)
                cursor.caught_up = pulled.manifest.published
            except TierUnavailable as error:
                cycle.problems[source] = str(error)
        cursor.problem = cycle.problems.get(source, "")
        cycle.lag[source] = cursor.lag(time.time())
        await cursor.save(self.near)
        await self._contents.came_to(cursor.told)

    async def _copy(self, cycle: Cycle, manifest: Manifest, cursor: Cursor, progress: Progress) -> None:
        """All flows from one source, one after the other: they share its links."""
        source = cursor.source
        for report in cycle.flows:
            if report.source == source and report.plan.blocks:
                await self._copy_flow(report, manifest, cursor, progress)
                if bad := sum(report.copied.outcomes.get(outcome, 0) for outcome in (Outcome.CORRUPT, Outcome.UNPAID)):
                    cycle.problems[source] = f"{bad} blocks were damaged, and not copied"

    async def _copy_flow(self, report: FlowReport, manifest: Manifest, cursor: Cursor, progress: Progress) -> None:
        flow = next(flow for flow in self.topology.flows_to(self.region) if flow.identity == report.flow)
        started = time.monotonic()
        ledger = Ledger(self.near, cursor, flow.identity, _affordable(flow, cursor, time.time()))
        far = self.far[flow.source]
        await share_namespaces(far, self.near, {block.namespace for block in report.plan.blocks})

        def done(block: HotBlock, outcome: Outcome) -> None:
            report.copied.add(block, outcome)
            cursor.blocks += outcome is Outcome.COPIED
            cursor.nbytes += block.nbytes * (outcome is Outcome.COPIED)
            progress(report, block, outcome)

        transfer = self._transfer(flow.source, _Paced(ledger, self._rates[flow.identity]))
        try:
            await copy(report.plan.blocks, Recorded(transfer, manifest, self._contents.copied), done)
        finally:
            report.seconds = time.monotonic() - started
            await ledger.settle()

    def _transfer(self, source: str, pace: _Paced) -> Transfer:
        far, near = self._settings[source][0], self._settings[self.region][0]
        if not _same_provider(far, near):
            return Streamed(self.far[source], self.near, pace, self._windows[source])
        from kvstore.tiers.object.bucket import connect

        return ServerSide(connect(near), self.far[source], far, self.near, near, pace)


class Recorded:
    """Tells what a transfer brought, as an entry of the catalog: nodes then find it without listing the bucket."""

    def __init__(self, transfer: Transfer, manifest: Manifest, tell: Callable[[Entry], None]) -> None:
        """``manifest`` says where in its chain a block is."""
        self._transfer = transfer
        self._labels = manifest.labels
        self._tell = tell
        self._depths: dict[BlockKey, int] = {NO_PARENT: -1}
        for block in manifest.blocks:
            self._depths[block.key] = self._depths[block.parent] + 1

    async def __call__(self, block: HotBlock, parent: Awaitable[bool]) -> Outcome:
        outcome = await self._transfer(block, parent)
        if outcome in (Outcome.COPIED, Outcome.PRESENT):
            self._tell(
                Entry(
                    key=block.key,
                    length=block.length,
                    namespace=block.namespace,
                    tokens=self._labels[block.namespace].block_tokens,
                    depth=self._depths[block.key],
                    parent=block.parent,
                    stored=int(block.created),
                )
            )
        return outcome


class _Paced:
    """Paid for first, then sent at the flow's rate."""

    def __init__(self, ledger: Ledger, rate: RateLimit) -> None:
        self._ledger = ledger
        self._rate = rate

    async def take(self, nbytes: int) -> bool:
        return await self._ledger.spend(nbytes) and await self._rate.take(nbytes)


def _united(known: Sequence[Tombstone], pulled: Mapping[str, _Pulled]) -> list[Tombstone]:
    """Those that are known here, then those that the manifests add."""
    return list(dict.fromkeys([*known, *(stone for one in pulled.values() for stone in one.manifest.tombstones)]))


def _may_hold(flow: Flow, left: int | None, manifest: Manifest, have: Collection[BlockKey]) -> int | None:
    """Bytes of the manifest that the destination may have after a copy of at most ``left``."""
    if left is None:
        return flow.max_bytes
    afterwards = left + sum(block.nbytes for block in manifest.blocks if block.key in have)
    return afterwards if flow.max_bytes is None else min(afterwards, flow.max_bytes)


def _affordable(flow: Flow, cursor: Cursor, now: float) -> int | None:
    """Bytes that the rest of the month's money pays for."""
    whole = affordable(flow.money_per_month, flow.price_per_gb)
    return None if whole is None else max(0, whole - cursor.spending(flow.identity, now).nbytes)


def _same_provider(source: ObjectSettings, destination: ObjectSettings) -> bool:
    """One endpoint, one account: the server can copy by itself."""
    return (
        bool(source.bucket and destination.bucket)
        and source.endpoint == destination.endpoint
        and source.access_key_id == destination.access_key_id
    )
