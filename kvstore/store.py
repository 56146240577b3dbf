"""The store pipeline: what a node does with its tiers.

    lookup    longest prefix that any tier holds; no I/O
    acquire   bring blocks to the arena and lease them; a block wanted twice is fetched once
    reserve → commit   a slot to write to, then checksum, publish, write down to the slower tiers

All state is owned by one event loop; only bytes move in threads.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from contextlib import suppress
from itertools import takewhile
from math import inf

import numpy as np
import numpy.typing as npt

from kvstore.envelope import Header
from kvstore.errors import TierError
from kvstore.history import History, What
from kvstore.identity import BlockKey
from kvstore.leases import Delivery, Leases, Session
from kvstore.leaving import Leaving
from kvstore.node.api import Lookup, Miss, NewBlock
from kvstore.policy.admission import AdmissionPolicy, Mode, Target
from kvstore.promotion import Promoter
from kvstore.reservations import Reservations
from kvstore.telemetry import StoreMetrics
from kvstore.tiers.base import Medium, Tier
from kvstore.tiers.host import HostTier
from kvstore.writeback import Writeback

PROBED_AFTER_MISS = 4
"""Blocks asked of the bucket after a miss: a few, since a chain that is there at all continues."""

PROBES_AT_ONCE = 16
"""Bound for when the bucket is slow or away; a miss beyond it stays a miss."""

FULL_ENOUGH = 0.25
"""Share of a write queue from which writing down all of the host tier waits, so that nothing is dropped."""

Probe = Callable[[Sequence[BlockKey]], Awaitable[object]]

Flags = npt.NDArray[np.bool_]
"""One for each block of a chain."""


class Store:
    """Tiers joined into one cache."""

    def __init__(
        self,
        host: HostTier,
        lower: Sequence[Tier],
        metrics: StoreMetrics,
        queue_bytes: int,
        writers: int = 64,
        probe: Probe | None = None,
        admission: AdmissionPolicy | None = None,
        history: History | None = None,
        afar: Sequence[Tier] = (),
        only_observed: bool = False,
    ) -> None:
        """``lower`` are the slower tiers, fastest first; ``queue_bytes`` bounds what may wait for each of them and
        ``writers`` how many blocks are on their way to it (two batches of the disk: one is written while the other is synced).

        ``probe`` is told of keys that no tier listed, to look for them off the caller's path. ``admission`` says which blocks
        are written down; without one, all are. ``history`` is told what becomes of blocks.

        ``afar`` are tiers that are read and never written, slower than all others: what only they hold is saved here once it
        is computed, or was read. If they are ``only_observed``, it is only told what they would add.
        """
        self.host = host
        self.written: tuple[Tier, ...] = (host, *lower)
        """Those that keep what engines save here."""
        self.tiers: tuple[Tier, ...] = self.written if only_observed else (*self.written, *afar)
        """Those that blocks are loaded from, fastest first."""
        self._observed = tuple(afar) if only_observed else ()
        self.metrics = metrics
        self.history = history if history is not None else History()
        self._reservations = Reservations(host)
        self._promoter = Promoter(host, self.tiers[1:], self.history)
        self._leases = Leases(host, self._promoter, metrics, self.history)
        self._queues = [Writeback(host, tier, metrics, self.history, queue_bytes, writers) for tier in lower]
        self._probe = probe
        self.admission = admission
        self._leaving = [Leaving(host, queue) for queue in self._queues if queue.tier.medium is Medium.DISK]
        self._probes: set[asyncio.Task[None]] = set()
        self._deleting: Counter[BlockKey] = Counter()

    # --- loading

    def lookup(self, keys: Sequence[BlockKey], start: int = 0) -> Lookup:
        """Longest prefix of ``keys[start:]`` that some tier holds. Counts the chain as used."""
        runs = self.peek(keys[start:])
        blocks = sum(count for _, count in runs)
        for medium, count in runs:
            self.metrics.found.labels(medium.value).inc(count)
        self.metrics.looked_up.inc(len(keys) - start)
        end = start + blocks
        asyncio.get_running_loop().call_soon(self._touch, keys[:end])
        near = start + sum(count for _, count in takewhile(lambda run: run[0] is not Medium.REMOTE, runs))
        if near < len(keys):  # the region's bucket may have what others have stored meanwhile
            self._look_further(keys[near : near + PROBED_AFTER_MISS])
        return Lookup(blocks, tuple(runs), self.estimate(keys[start:end], runs))

    def peek(self, keys: Sequence[BlockKey]) -> list[tuple[Medium, int]]:
        """Where the longest prefix of ``keys`` is, as runs of (medium, blocks). Does not count as a use."""
        return runs_of(((tier.medium, contained(keys, tier.keys())) for tier in self.tiers), len(keys))

    def beyond(self, keys: Sequence[BlockKey]) -> list[tuple[Medium, int]]:
        """What the observed tiers would add to the longest prefix of a chain, as runs; ``keys`` are the blocks behind it."""
        if not self._observed:
            return []
        tiers = (*self.tiers, *self._observed)
        return runs_of(((tier.medium, contained(keys, tier.keys())) for tier in tiers), len(keys))

    def estimate(self, keys: Sequence[BlockKey], runs: Sequence[tuple[Medium, int]]) -> float:
        """Seconds until ``keys``, which are in ``runs``, are in the arena."""
        return self._promoter.estimate(keys, runs)

    @property
    def promoter(self) -> Promoter:
        """What brings blocks to the arena: its speeds, and what it is asked for ahead of time."""
        return self._promoter

    def pressure(self, medium: Medium) -> float:
        """Fill of a slower tier's write queue, 0 to 1."""
        return next((queue.fill for queue in self._queues if queue.tier.medium is medium), 0.0)

    def holds(self, keys: Sequence[BlockKey]) -> list[bool]:
        """Which blocks some tier holds, each by itself; no I/O."""
        held = np.zeros(len(keys), dtype=bool)
        for tier in self.tiers:
            if not held.all():
                held |= contained(keys, tier.keys())
        flags: list[bool] = held.tolist()
        return flags

    def wanted(self, keys: Sequence[BlockKey], held: Sequence[bool]) -> None:
        """Count blocks that are held as used, and look further for the others."""
        self._touch([key for key, here in zip(keys, held, strict=True) if here])
        if lacking := [key for key, here in zip(keys, held, strict=True) if not here]:
            self._look_further(lacking[:PROBED_AFTER_MISS])

    async def find(self, keys: Sequence[BlockKey]) -> None:
        """Look in the bucket for blocks that no tier lists, as others may have stored them; a bounded number of them."""
        if self._probe is not None:
            await _quietly(self._probe(keys))

    async def acquire(self, session: Session, keys: Sequence[BlockKey], timeout: float) -> Delivery:
        """Lease a prefix of ``keys``, as ``Leases.acquire``; what came gets to the tiers that lack it."""
        delivery = await self._leases.acquire(session, keys, timeout)
        self._write_down_lacking(keys[: len(delivery.offsets)], delivery.media)
        deque(self._ask_leaving(), maxlen=0)
        return delivery

    def release(self, session: Session, keys: Sequence[BlockKey]) -> None:
        """Return one lease of each key. Unknown leases are ignored."""
        self._leases.release(session, keys)

    # --- saving

    def reserve(
        self,
        session: Session,
        namespace: bytes,
        length: int,
        tokens: int,
        blocks: Sequence[NewBlock],
        part: int = 0,
        parts: int = 1,
    ) -> list[int | Miss]:
        """For each block the arena offset to write its payload to, or why not to (PRESENT, NO_ROOM)."""
        held = [tier.keys() for tier in self.written]
        answers: list[int | Miss] = []
        for block in blocks:
            if any(block.key in present for present in held):
                answers.append(Miss.PRESENT)
                continue
            header = Header(
                key=block.key,
                namespace=namespace,
                parent=block.parent,
                index=block.index,
                tokens=tokens,
                length=length,
                crc=0,
            )
            answers.append(self._reservations.open(session, header, part, parts))
        for answer in answers:
            self.metrics.reserved.labels(answer.value if isinstance(answer, Miss) else "granted").inc()
        crowded_out = [block.key for block, answer in zip(blocks, answers, strict=True) if answer is Miss.NO_ROOM]
        self.history.record(What.NO_ROOM, crowded_out, Medium.HOST)
        return answers

    async def commit(
        self,
        session: Session,
        keys: Sequence[BlockKey],
        part: int = 0,
        durable: Medium = Medium.HOST,
        timeout: float = 10.0,
    ) -> list[BlockKey]:
        """Publish what all parts have written; the keys that reached ``durable`` before the timeout."""
        complete = [r for key in keys if (r := self._reservations.commit(session, key, part)) is not None]
        sealed = await asyncio.gather(*(self._reservations.seal(reservation) for reservation in complete))
        published = [header for header in sealed if header is not None]
        self.metrics.published.inc(len(published))
        self.history.record(What.SAVED, [header.key for header in published], Medium.HOST)
        writes = self._write_down(published, at_once=durable is not Medium.HOST)
        for leaving in self._leaving:
            leaving.saved(published)
        deque(self._ask_leaving(), maxlen=0)
        if durable is Medium.HOST:
            return [header.key for header in published]
        waits = {key: futures[durable] for key, futures in writes.items() if durable in futures}
        if waits:
            await asyncio.wait(waits.values(), timeout=timeout)
        return [key for key, future in waits.items() if future.done() and future.result()]

    def abort(self, session: Session, keys: Sequence[BlockKey]) -> None:
        """Give reservations up."""
        self.metrics.aborted.inc(sum(self._reservations.abort(session, key) for key in keys))

    # --- life cycle

    def end(self, session: Session) -> None:
        """Take back everything a client held."""
        self._leases.end(session)
        self.abort(session, list(self._reservations.held_by(session)))

    async def delete(
        self, keys: Sequence[BlockKey], media: Collection[Medium] = tuple(Medium), what: What = What.DELETED
    ) -> dict[Medium, int]:
        """Delete blocks so that no write or fetch that was under way brings one back; how many went, by tier.

        With less than all ``media``, copies in the others stay. ``what`` is how the blocks' history calls it. What is afar is
        only forgotten, and not counted.
        """
        self._deleting.update(keys)
        try:
            await asyncio.gather(*(queue.forget(keys) for queue in self._queues))
            if Medium.REMOTE in media:
                await asyncio.gather(*(tier.delete(keys) for tier in self.tiers[len(self.written) :]))
            lower = [tier for tier in reversed(self.written[1:]) if tier.medium in media]
            deleted = {tier.medium: await self.drop(tier, keys, what) for tier in lower}
            await self._promoter.settle(keys)
            if Medium.HOST in media:
                deleted[Medium.HOST] = await self.drop(self.host, keys, what)
            return deleted
        finally:
            self._deleting.subtract(keys)
            self._deleting += Counter()  # drops what is at zero

    async def drop(self, tier: Tier, keys: Sequence[BlockKey], what: What = What.DELETED) -> int:
        """Delete blocks from one of the tiers; how many went. Writes to the others go on."""
        self.history.record(what, [key for key in keys if key in tier.keys()], tier.medium)
        return await tier.delete(keys)

    async def drain(self, timeout: float) -> bool:
        """Wait until what was saved, and slower tiers admit, has been written down. False when the timeout came first."""
        try:
            async with asyncio.timeout(timeout):
                for queue in self._ask_leaving(everything=True):
                    if queue.fill > FULL_ENOUGH:
                        await queue.drain()
                await asyncio.gather(*(queue.drain() for queue in self._queues))
        except TimeoutError:
            return False
        return True

    async def close(self) -> None:
        """Drop what is queued and close every tier."""
        for probe in self._probes:
            probe.cancel()
        await self._promoter.close()
        for queue in self._queues:
            await queue.close()
        for tier in reversed((*self.tiers, *self._observed)):
            await tier.close()

    @property
    def queued_bytes(self) -> dict[Medium, int]:
        """Bytes waiting to be written, by tier."""
        return {queue.tier.medium: queue.queued_bytes for queue in self._queues}

    # --- inside

    def _write_down(
        self, headers: Sequence[Header], at_once: bool = False, judged: bool = True
    ) -> dict[BlockKey, dict[Medium, asyncio.Future[bool]]]:
        """Offer blocks of the host tier to every slower tier that lacks them and admits them.

        A disk that may refuse is asked about blocks that are not certain when they leave the host tier, unless ``at_once``.
        Blocks that are not ``judged`` are admitted.
        """
        writes: dict[BlockKey, dict[Medium, asyncio.Future[bool]]] = {header.key: {} for header in headers}
        for queue in self._queues:
            lacking = [h for h in headers if h.key not in queue.tier.keys() and h.key not in self._deleting]
            for chain in consecutive(lacking):
                if queue.tier.medium is Medium.DISK and not at_once:
                    chain = chain[: self._certain(chain)]
                admits = self._admit(queue, chain, queue.fill) if judged else [True] * len(chain)
                for header, admitted in zip(chain, admits, strict=True):
                    if admitted and (future := queue.offer(header)) is not None:
                        writes[header.key][queue.tier.medium] = future
        return writes

    def _write_down_lacking(self, keys: Sequence[BlockKey], media: Sequence[Medium]) -> None:
        """Blocks that are used get to the tiers that a full queue, an outage, admission or their origin kept them from.

        What came from afar was hot there, and is far to fetch again: it needs no admission.
        """
        headers: dict[bool, list[Header]] = {False: [], True: []}
        for key, medium in zip(keys, media, strict=True):
            if (
                any(key not in queue.tier.keys() for queue in self._queues)
                and (offset := self.host.pin(key)) is not None
            ):
                headers[medium is Medium.REMOTE].append(Header.unpack(self.host.slot(offset)))
                self.host.unpin(key, offset)
        self._write_down(headers[False])
        self._write_down(headers[True], at_once=True, judged=False)

    def _certain(self, chain: Sequence[Header]) -> int:
        if self.admission is None or self.admission.mode is not Mode.ENFORCE:
            return len(chain)
        return self.admission.certain([header.key for header in chain], time.time())

    def _ask_leaving(self, everything: bool = False) -> Iterator[Writeback]:
        """Write down what the host tier will give up and the disk admits, with the blocks before it, chain by chain."""
        if self.admission is None or self.admission.mode is not Mode.ENFORCE:
            return
        for leaving in self._leaving:
            queue = leaving.queue
            pressure = queue.fill  # of others: what is offered here is not held against the rest of it
            due = [header for header in leaving.due(everything) if not queue.has(header.key)]
            for chain in consecutive(header for header in due if header.key not in self._deleting):
                admitted = self._admit(queue, chain, pressure, leaving.residence)
                for header in (header for header, admit in zip(chain, admitted, strict=True) if admit):
                    for each in leaving.with_ancestors(header):
                        queue.offer(each)
                yield queue

    def _admit(self, queue: Writeback, chain: Sequence[Header], pressure: float, residence: float = inf) -> list[bool]:
        if self.admission is None or not chain:
            return [True] * len(chain)
        medium = queue.tier.medium.value
        keys = [header.key for header in chain]
        decisions = self.admission.admit(Target(medium), keys, time.time(), pressure, residence=residence)
        for decision in decisions:
            self.metrics.judged.labels(medium, decision.reason.value).inc()
        refused = [key for key, decision in zip(keys, decisions, strict=True) if not decision.admit]
        self.history.record(
            What.NOT_ADMITTED, refused, queue.tier.medium, decisions[-1].reason
        )  # one rule for all of them
        return [decision.admit for decision in decisions]

    def _touch(self, keys: Sequence[BlockKey]) -> None:
        for tier in self.tiers:
            tier.touch(keys)

    def _look_further(self, keys: Sequence[BlockKey]) -> None:
        if self._probe is not None and len(self._probes) < PROBES_AT_ONCE:
            task = asyncio.create_task(_quietly(self._probe(keys)))
            self._probes.add(task)
            task.add_done_callback(self._probes.discard)


def consecutive(headers: Iterable[Header]) -> Iterator[list[Header]]:
    """Runs of blocks that follow each other in one chain."""
    run: list[Header] = []
    for header in headers:
        if run and header.parent != run[-1].key:
            yield run
            run = []
        run.append(header)
    if run:
        yield run


async def _quietly(work: Awaitable[object]) -> None:
    """A tier that fails here fails its own calls too, where it is counted."""
    with suppress(TierError):
        await work


def contained(keys: Sequence[BlockKey], present: AbstractSet[BlockKey]) -> Flags:
    """Which of ``keys`` are there, one flag each: 2,048 keys take some 100 us."""
    # Bytes of a list: as an array or from an iterator, the same flags take half as long again.
    return np.frombuffer(bytes([key in present for key in keys]), dtype=bool)


def runs_of(held: Iterable[tuple[Medium, Flags]], blocks: int) -> list[tuple[Medium, int]]:
    """The longest prefix of a chain of ``blocks`` that is held, as runs of blocks with the same fastest medium.

    ``held`` says of each medium, fastest first, which blocks of the chain it holds. It is read only as far as needed.
    """
    media: list[Medium] = []
    fastest = np.full(blocks, -1)
    for medium, here in held:
        fastest[here & (fastest < 0)] = len(media)
        media.append(medium)
        if here.all():
            break
    missing = np.flatnonzero(fastest < 0)
    prefix = fastest[: missing[0]] if len(missing) else fastest
    ends = np.flatnonzero(np.diff(prefix, append=-1)) + 1
    return [(media[prefix[end - 1]], int(count)) for end, count in zip(ends, np.diff(ends, prepend=0), strict=True)]
