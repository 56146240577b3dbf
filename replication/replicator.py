"""The work of a destination region: pull manifests, bury, plan, copy, write down how far it came."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

from kvstore.catalog.base import Catalog
from kvstore.errors import TierUnavailable
from kvstore.identity import BlockKey
from kvstore.tiers.object import ObjectSettings
from kvstore.tombstones import Tombstone
from replication.contents import Contents
from replication.copier import MEMORY_BYTES, Outcome, Recorded, ServerSide, Streamed, Transfer, Window, copy
from replication.cursor import Cursor, Ledger, uncharged
from replication.cycle import Cycle, FlowReport, Progress
from replication.evictor import known_scores, overflow
from replication.hotset import share_namespaces
from replication.links import Links
from replication.manifest import HotBlock, Label, Manifest
from replication.pause import read_pauses
from replication.planner import LeftOut, Limits, affordable, plan
from replication.publisher import entomb
from replication.pulling import UNPUBLISHED, Missed, Pulled, believe, pull
from replication.quotas import overflow_of_tenants, read_owners
from replication.rate import RateLimit
from replication.retention import Retired
from replication.retiring import read_retired
from replication.topology import STALL_SECONDS, Flow, Topology


@dataclass(frozen=True, slots=True)
class _Visit:
    """A source that is copied from."""

    cycle: Cycle
    task: asyncio.Task[None]


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
        self._order = list(self._rates)
        """Of the flows, as the file names them."""
        self._left = budget
        """Bytes that this round may still plan."""
        self._pulls: dict[str, asyncio.Task[Pulled | Missed]] = {}
        self._visits: dict[str, _Visit] = {}
        """What is under way, by source."""

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
        self._left = self._budget
        answers = dict(zip(self.far, await asyncio.gather(*(self._pull(source) for source in self.far)), strict=True))
        for source, missed in answers.items():
            if isinstance(missed, Missed):
                self._note(cycle, source, missed)
        pulled = {source: one for source, one in answers.items() if isinstance(one, Pulled)}
        cycle.away_since |= dict.fromkeys(pulled, 0.0)
        cycle.flows = await self._plan(pulled, _united(await self._contents.tombstones(), pulled))
        return cycle

    async def cycle(self, progress: Progress = lambda report, block, outcome: None) -> Cycle:
        """Do it. A source that fails is left for the next cycle. Raises TierUnavailable, as ``plan`` does."""
        async with self.at_work():
            return await self.round(progress)

    @asynccontextmanager
    async def at_work(self) -> AsyncIterator[None]:
        """Rounds belong in here. What is still under way at its end is broken off."""
        try:
            yield
        finally:
            tasks = [*self._pulls.values(), *(visit.task for visit in self._visits.values())]
            self._pulls, self._visits = {}, {}
            for task in tasks:
                task.cancel()
            if tasks:
                await asyncio.wait(tasks)

    async def round(
        self, progress: Progress = lambda report, block, outcome: None, seconds: float | None = None
    ) -> Cycle:
        """Visit every source that is not under way from an earlier round: pull, bury, plan, copy.

        No source waits for another. The round ends with the last of them, or after ``seconds``, and then it does not wait
        either for those whose links did not answer the last time: what is under way goes on, and a later round tells of it.
        Raises TierUnavailable when the own bucket does not answer.
        """
        cycle = Cycle()
        self._left = self._budget
        await self._go_on(cycle, progress)
        for source in self.far:
            if source not in self._pulls and source not in self._visits:
                self._pulls[source] = asyncio.create_task(self._pull(source))
        deadline = math.inf if seconds is None else time.monotonic() + seconds
        while waited := self._awaited(everybody=seconds is None):
            left = None if seconds is None else max(0.0, deadline - time.monotonic())
            done, _ = await asyncio.wait(waited, timeout=left, return_when=asyncio.FIRST_COMPLETED)
            if not done:
                break
            await self._go_on(cycle, progress)
        cycle.flows.sort(key=lambda report: self._order.index(report.flow))
        return cycle

    # --- what is under way

    def _awaited(self, everybody: bool) -> list[asyncio.Task[Any]]:
        pulls = [task for source, task in self._pulls.items() if everybody or self._answers(source)]
        return [*pulls, *(visit.task for visit in self._visits.values())]

    def _answers(self, source: str) -> bool:
        """Some link there did the last time."""
        return any(link.answers for link in self.far[source].links)

    async def _go_on(self, cycle: Cycle, progress: Progress) -> None:
        """Copy from those whose manifest has come, and note what has ended."""
        if any(task.done() for task in self._pulls.values()):
            await self._wait_for_the_next()
        done = {source: task.result() for source, task in self._pulls.items() if task.done()}
        for source in done:
            del self._pulls[source]
        for source, missed in done.items():
            if isinstance(missed, Missed):
                self._note(cycle, source, missed)
                await self._write_down(cycle, missed.cursor)
        if pulled := {source: one for source in self.far if isinstance(one := done.get(source), Pulled)}:
            await self._begin(cycle, pulled, progress)
        for source in [source for source, visit in self._visits.items() if visit.task.done()]:
            visit = self._visits.pop(source)
            visit.task.result()
            cycle.add(visit.cycle)

    async def _wait_for_the_next(self) -> None:
        """Let sources that are about to answer join in: the bucket is looked through once for all of them, and what several
        offer comes from the one whose flow is named first. After so long the link of one that does not answer is known."""
        coming = [task for source, task in self._pulls.items() if not task.done() and self._answers(source)]
        if coming:
            await asyncio.wait(coming, timeout=STALL_SECONDS)

    async def _begin(self, cycle: Cycle, pulled: Mapping[str, Pulled], progress: Progress) -> None:
        """Bury, believe, plan; then each source is copied from by a task of its own."""
        known = await self._contents.tombstones()
        stones = _united(known, pulled)
        if new := stones[len(known) :]:
            cycle.buried += await entomb(self._contents, new)
        for one in pulled.values():
            await believe(one, self.near)
        reports = await self._plan(pulled, stones)
        paused = await read_pauses(self.near)
        for source, one in pulled.items():
            visit = Cycle([report for report in reports if report.source == source], away_since={source: 0.0})
            if source in paused and source in self._sources:
                visit.problems[source] = str(paused[source])
            task = asyncio.create_task(self._copy_from(visit, one, stones, progress))
            self._visits[source] = _Visit(visit, task)

    # --- manifests

    async def _pull(self, source: str) -> Pulled | Missed:
        return await pull(source, self.far[source], self.near, self.topology)

    def _note(self, cycle: Cycle, source: str, missed: Missed) -> None:
        cycle.away_since[source] = missed.cursor.away_since
        if source in self._sources or missed.problem != UNPUBLISHED:
            cycle.problems[source] = missed.problem

    # --- planning

    async def _plan(self, pulled: Mapping[str, Pulled], stones: Sequence[Tombstone]) -> list[FlowReport]:
        """What flows from these sources would bring besides what is there or under way."""
        held = await self._contents.blocks()
        quotas = self.topology.quotas
        bounded = self._capacity is not None or quotas
        scores, pinned = (await known_scores(self._contents), await self._contents.pinned()) if bounded else ({}, set())
        owners = await read_owners(self.near) if quotas else {}
        reports = [report for visit in self._visits.values() for report in visit.cycle.flows]
        begun = len(reports)
        have: set[BlockKey] = {*held, *(block.key for report in reports for block in report.plan.blocks)}
        retired = await read_retired(self.near)
        for flow in self.topology.flows_to(self.region):
            if flow.source not in pulled:
                continue
            manifest, cursor = pulled[flow.source].manifest, pulled[flow.source].cursor
            limits = Limits(
                min_score=flow.min_score,
                held_bytes=_may_hold(flow, self._left, manifest, have),
                copied_bytes=await self._affordable(flow, cursor),
            )
            report = FlowReport(flow.source, flow.identity, flow.price_per_gb)
            buried = [*stones, *retired.stones(manifest.blocks)]
            wants = partial(self._wants, flow, retired)
            report.plan = plan(manifest.blocks, manifest.labels, have, limits, buried, wants)
            coming = [block for one in (*reports, report) for block in one.plan.blocks]
            lost: set[BlockKey] = set()
            if self._capacity is not None:
                lost |= overflow(held.values(), scores, coming, self._capacity, pinned)
            if quotas:
                owners |= {label.digest: label.tenant for label in manifest.labels.values()}
                lost |= overflow_of_tenants(held.values(), owners, scores, coming, quotas, pinned)
            report.plan = report.plan.without(lost, LeftOut.ROOM)
            have.update(block.key for block in report.plan.blocks)
            self._left = None if self._left is None else self._left - report.plan.nbytes
            reports.append(report)
        return reports[begun:]

    async def _affordable(self, flow: Flow, cursor: Cursor) -> int | None:
        """Bytes that the rest of the month's money pays for."""
        whole = affordable(flow.money_per_month, flow.price_per_gb)
        return None if whole is None else max(0, await uncharged(self.near, cursor, flow.identity, whole))

    def _wants(self, flow: Flow, retired: Retired, label: Label) -> LeftOut | None:
        if not flow.takes(label):
            return LeftOut.OTHER_FLOW
        if label.digest in retired.namespaces:
            return LeftOut.TOMBSTONE
        return None if self.topology.permits(label, self.region) else LeftOut.RESIDENCY

    # --- copying

    async def _copy_from(self, cycle: Cycle, pulled: Pulled, stones: Sequence[Tombstone], progress: Progress) -> None:
        """Copy what is planned from a source, and write down how far that went. ``stones``: heeded by the plan."""
        source, cursor = pulled.cursor.source, pulled.cursor
        if source not in cycle.problems:
            try:
                await self._copy(cycle, pulled.manifest, cursor, progress)
                cursor.caught_up = pulled.manifest.published
            except TierUnavailable as error:
                cycle.problems[source] = str(error)
        await self._write_down(cycle, cursor)
        if not any(report.plan.blocks for report in cycle.flows):
            return
        heeded = set(stones)
        if late := [stone for stone in await self._contents.tombstones() if stone not in heeded]:
            cycle.buried += await entomb(self._contents, late)  # what they bury may have been copied meanwhile

    async def _write_down(self, cycle: Cycle, cursor: Cursor) -> None:
        """How a visit fared, for the next one and for whoever asks."""
        cursor.problem = cycle.problems.get(cursor.source, "")
        await cursor.save(self.near)
        if cursor.source in self._sources:
            cycle.lag[cursor.source] = cursor.lag(time.time())
            await self._contents.came_to(cursor.told)

    async def _copy(self, cycle: Cycle, manifest: Manifest, cursor: Cursor, progress: Progress) -> None:
        """All flows from one source, one after the other: they share its links."""
        for report in cycle.flows:
            if report.plan.blocks:
                await self._copy_flow(report, manifest, cursor, progress)
                if bad := sum(report.copied.outcomes.get(outcome, 0) for outcome in (Outcome.CORRUPT, Outcome.UNPAID)):
                    cycle.problems[cursor.source] = f"{bad} blocks were damaged, and not copied"

    async def _copy_flow(self, report: FlowReport, manifest: Manifest, cursor: Cursor, progress: Progress) -> None:
        flow = next(flow for flow in self.topology.flows_to(self.region) if flow.identity == report.flow)
        started = time.monotonic()
        ledger = Ledger(self.near, cursor, flow.identity, affordable(flow.money_per_month, flow.price_per_gb))
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


class _Paced:
    """Paid for first, then sent at the flow's rate."""

    def __init__(self, ledger: Ledger, rate: RateLimit) -> None:
        self._ledger = ledger
        self._rate = rate

    async def take(self, nbytes: int) -> bool:
        return await self._ledger.spend(nbytes) and await self._rate.take(nbytes)


def _united(known: Sequence[Tombstone], pulled: Mapping[str, Pulled]) -> list[Tombstone]:
    """Those that are known here, then those that the manifests add."""
    return list(dict.fromkeys([*known, *(stone for one in pulled.values() for stone in one.manifest.tombstones)]))


def _may_hold(flow: Flow, left: int | None, manifest: Manifest, have: Collection[BlockKey]) -> int | None:
    """Bytes of the manifest that the destination may have after a copy of at most ``left``."""
    if left is None:
        return flow.max_bytes
    afterwards = left + sum(block.nbytes for block in manifest.blocks if block.key in have)
    return afterwards if flow.max_bytes is None else min(afterwards, flow.max_bytes)


def _same_provider(source: ObjectSettings, destination: ObjectSettings) -> bool:
    """One endpoint, one account: the server can copy by itself."""
    return (
        bool(source.bucket and destination.bucket)
        and source.endpoint == destination.endpoint
        and source.access_key_id == destination.access_key_id
    )
