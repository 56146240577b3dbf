"""The store pipeline: what a node does with its tiers.

    lookup    longest prefix that any tier holds; no I/O
    acquire   bring blocks to the arena and lease them; a block wanted twice is fetched once
    reserve → commit   a slot to write to, then checksum, publish, write down to the slower tiers

All state is owned by one event loop; only bytes move in threads. Every method that takes a session must get one that
``session`` made; what it leased and reserved falls with ``end``.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import islice

from kvstore.envelope import HEADER_BYTES, Header, crc32c, envelope_bytes, payload
from kvstore.errors import BlockCorrupt, BlockNotFound, BlockTooLarge, TierError
from kvstore.identity import BlockKey
from kvstore.node.api import Lookup, Miss, NewBlock
from kvstore.telemetry import StoreMetrics
from kvstore.tiers.base import Medium, Tier
from kvstore.tiers.host import HostTier
from kvstore.writeback import Writeback

FETCHES_PER_ACQUIRE = 32
"""Blocks that one acquire fetches at a time: enough to keep a tier busy, in order, so that a prefix arrives first."""

PROBED_AFTER_MISS = 4
"""Blocks asked of the bucket after a miss: a few, since a chain that is there at all continues."""

Probe = Callable[[Sequence[BlockKey]], Awaitable[None]]


@dataclass(slots=True)
class Session:
    """One client's leases and reservations."""

    leases: Counter[tuple[BlockKey, int]] = field(default_factory=Counter)
    reserved: set[BlockKey] = field(default_factory=set)


@dataclass(slots=True)
class _Reservation:
    """A slot being written, by one or several clients."""

    header: Header
    offset: int
    missing: set[int]
    """Parts that have not been committed."""
    holders: list[Session]
    aborted: bool = False
    """A part will never come: the slot is freed when the last holder lets go."""


@dataclass(frozen=True, slots=True)
class Delivery:
    """What ``acquire`` brought: payload offsets of a prefix, where each block came from, and why it ended early."""

    offsets: list[int]
    media: list[Medium]
    miss: Miss | None


class Store:
    """Tiers joined into one cache. ``lower`` are the slower tiers, fastest first."""

    def __init__(
        self,
        host: HostTier,
        lower: Sequence[Tier],
        metrics: StoreMetrics,
        queue_bytes: int,
        writers: int = 8,
        probe: Probe | None = None,
    ) -> None:
        """``queue_bytes`` bounds what may wait to be written to each slower tier."""
        self.host = host
        self.lower = tuple(lower)
        self.metrics = metrics
        self._queues = [Writeback(host, tier, metrics, queue_bytes, writers) for tier in lower]
        self._probe = probe
        self._background: set[asyncio.Task[None]] = set()
        self._fetching: dict[BlockKey, asyncio.Task[Medium | Miss]] = {}
        self._reservations: dict[BlockKey, _Reservation] = {}
        self._speeds = {tier.medium: _Speed() for tier in lower}

    @property
    def tiers(self) -> tuple[Tier, ...]:
        return (self.host, *self.lower)

    # --- loading

    def lookup(self, keys: Sequence[BlockKey], start: int = 0) -> Lookup:
        """Longest prefix of ``keys[start:]`` that some tier holds. Counts the chain as used."""
        held = [(tier.medium, tier.keys()) for tier in self.tiers]
        runs: list[tuple[Medium, int]] = []
        blocks = 0
        for key in islice(keys, start, None):
            medium = next((medium for medium, present in held if key in present), None)
            if medium is None:
                break
            blocks += 1
            if runs and runs[-1][0] is medium:
                runs[-1] = (medium, runs[-1][1] + 1)
            else:
                runs.append((medium, 1))
        self.metrics.looked_up.inc(len(keys) - start)
        for medium, count in runs:
            self.metrics.found.labels(medium.value).inc(count)
        end = start + blocks
        loop = asyncio.get_running_loop()
        loop.call_soon(self._touch, keys[:end])
        if self._probe is not None and end < len(keys):
            self._spawn(self._probe(keys[end : end + PROBED_AFTER_MISS]))
        return Lookup(blocks, tuple(runs), self._estimate(keys, start, runs))

    async def acquire(self, session: Session, keys: Sequence[BlockKey], timeout: float) -> Delivery:
        """Lease a prefix of ``keys``, fetching what is not in the arena; at the deadline, what has arrived.

        Fetches that are under way at the deadline go on: they serve whoever asks next.
        """
        deadline = asyncio.get_running_loop().time() + timeout
        window = asyncio.Semaphore(FETCHES_PER_ACQUIRE)
        tasks = [asyncio.create_task(self._lease(session, key, window)) for key in keys]
        miss: Miss | None = None
        media: list[Medium] = []
        offsets: list[int] = []
        try:
            async with asyncio.timeout_at(deadline):
                for task in tasks:
                    outcome = await task
                    if isinstance(outcome, Miss):
                        miss = outcome
                        break
                    media.append(outcome[0])
                    offsets.append(outcome[1] + HEADER_BYTES)
        except TimeoutError:
            miss = Miss.DEADLINE
        finally:
            await self._let_go(session, keys, tasks, kept=len(offsets))
        for medium in media:
            self.metrics.delivered.labels(medium.value).inc()
        if miss is not None:
            self.metrics.missed.labels(miss.value).inc(len(keys) - len(offsets))
        for key in keys[: len(offsets)]:
            self._write_down(key)
        return Delivery(offsets, media, miss)

    def release(self, session: Session, keys: Sequence[BlockKey]) -> None:
        """Return one lease of each key. Unknown leases are ignored: the client may have lost track, never the node."""
        by_key = dict(session.leases)
        for key in keys:
            offset = by_key.get(key)
            if offset is not None and session.leases[key, offset]:
                self._unlease(session, key, offset)

    # --- saving

    def reserve(
        self,
        session: Session,
        namespace: bytes,
        length: int,
        tokens: int,
        blocks: Sequence[NewBlock],
        part: int,
        parts: int,
    ) -> list[int | Miss]:
        """For each block the arena offset to write its payload to, or why not to (PRESENT, NO_ROOM)."""
        answers: list[int | Miss] = []
        held = [tier.keys() for tier in self.tiers]
        for block in blocks:
            reservation = self._reservations.get(block.key)
            if reservation is not None:
                answers.append(self._join(session, reservation, part))
            elif any(block.key in present for present in held):
                answers.append(Miss.PRESENT)
            else:
                answers.append(self._reserve_one(session, namespace, length, tokens, block, part, parts))
        for answer in answers:
            self.metrics.reserved.labels(answer.value if isinstance(answer, Miss) else "granted").inc()
        return answers

    async def commit(
        self, session: Session, keys: Sequence[BlockKey], part: int, durable: Medium, timeout: float
    ) -> list[BlockKey]:
        """Publish what all parts have written; returns the keys that reached ``durable`` before the timeout."""
        complete = [r for key in keys if (r := self._commit_part(session, key, part)) is not None]
        published = [h for h in await asyncio.gather(*(self._seal(r) for r in complete)) if h is not None]
        reached = {header.key: self._write_down(header.key, header) for header in published}
        self.metrics.published.inc(len(published))
        if durable is Medium.HOST:
            return [header.key for header in published]
        waits = {key: future for key, futures in reached.items() if (future := futures.get(durable)) is not None}
        if waits:
            await asyncio.wait(waits.values(), timeout=timeout)
        return [key for key, future in waits.items() if future.done() and future.result()]

    def abort(self, session: Session, keys: Sequence[BlockKey]) -> None:
        """Give reservations up."""
        for key in keys:
            if key in session.reserved:
                self._withdraw(session, key)

    # --- sessions and life cycle

    @asynccontextmanager
    async def session(self) -> AsyncIterator[Session]:
        """A client's session; its leases and reservations fall at the end."""
        session = Session()
        try:
            yield session
        finally:
            self.end(session)

    def end(self, session: Session) -> None:
        """Take back everything a client held."""
        for (key, offset), count in list(session.leases.items()):
            for _ in range(count):
                self._unlease(session, key, offset)
        for key in list(session.reserved):
            self._withdraw(session, key)

    async def delete(self, keys: Sequence[BlockKey]) -> int:
        """Delete blocks from every tier, slowest first, so that no promotion brings one back."""
        deleted = [await tier.delete(keys) for tier in reversed(self.tiers)]
        return max(deleted)

    async def drain(self, timeout: float) -> bool:
        """Wait until what was saved has been written down. False when the timeout came first."""
        try:
            async with asyncio.timeout(timeout):
                await asyncio.gather(*(queue.drain() for queue in self._queues))
        except TimeoutError:
            return False
        return True

    async def close(self) -> None:
        for task in [*self._fetching.values(), *self._background]:
            task.cancel()
        await asyncio.gather(*self._fetching.values(), *self._background, return_exceptions=True)
        for queue in self._queues:
            await queue.close()
        for tier in reversed(self.tiers):
            await tier.close()

    @property
    def queued_bytes(self) -> dict[Medium, int]:
        """Bytes waiting to be written, by tier."""
        return {queue.tier.medium: queue.queued_bytes for queue in self._queues}

    # --- leases

    async def _lease(self, session: Session, key: BlockKey, window: asyncio.Semaphore) -> tuple[Medium, int] | Miss:
        medium = Medium.HOST
        if (offset := self.host.pin(key)) is None:
            async with window:
                while (offset := self.host.pin(key)) is None:  # evicted again before we woke: rare, so fetch again
                    outcome = await asyncio.shield(self._fetch(key))
                    if isinstance(outcome, Miss):
                        return outcome
                    medium = outcome
        session.leases[key, offset] += 1
        return medium, offset

    async def _let_go(
        self,
        session: Session,
        keys: Sequence[BlockKey],
        tasks: Sequence[asyncio.Task[tuple[Medium, int] | Miss]],
        kept: int,
    ) -> None:
        """End the lease tasks that are not part of the delivered prefix, and return what they leased."""
        for task in tasks[kept:]:
            task.cancel()
        for key, outcome in zip(keys[kept:], await asyncio.gather(*tasks[kept:], return_exceptions=True), strict=True):
            if isinstance(outcome, tuple):
                self._unlease(session, key, outcome[1])

    def _unlease(self, session: Session, key: BlockKey, offset: int) -> None:
        session.leases[key, offset] -= 1
        if not session.leases[key, offset]:
            del session.leases[key, offset]
        self.host.unpin(key, offset)

    # --- fetching

    def _fetch(self, key: BlockKey) -> asyncio.Task[Medium | Miss]:
        task = self._fetching.get(key)
        if task is None:
            task = self._fetching[key] = asyncio.create_task(self._promote(key))
            task.add_done_callback(lambda _: self._fetching.pop(key, None))
        return task

    async def _promote(self, key: BlockKey) -> Medium | Miss:
        """Copy a block from the fastest tier that delivers it into the arena."""
        miss = Miss.NOT_STORED
        for tier in self.lower:
            stat = tier.stat(key) if key in tier.keys() else None
            if stat is None:
                continue
            try:
                offset = self.host.allocate(envelope_bytes(stat.length))
            except BlockTooLarge:
                return Miss.NO_ROOM
            if offset is None:
                return Miss.NO_ROOM
            started = time.monotonic()
            try:
                header = await tier.get(key, self.host.slot(offset))
            except BlockNotFound:
                self.host.discard(offset)
                continue
            except TierError as error:
                self.host.discard(offset)
                miss = Miss.CORRUPT if isinstance(error, (BlockCorrupt, BlockTooLarge)) else Miss.UNAVAILABLE
                continue
            except BaseException:
                self.host.discard(offset)
                raise
            self._speeds[tier.medium].record(header.envelope_bytes, time.monotonic() - started)
            if key in self.host.keys():  # saved anew meanwhile
                self.host.discard(offset)
            else:
                self.host.publish(header, offset)
            return tier.medium
        return miss

    def _estimate(self, keys: Sequence[BlockKey], start: int, runs: Sequence[tuple[Medium, int]]) -> float:
        """Seconds until the runs are in the arena, from what fetches took lately."""
        seconds = 0.0
        position = start
        for medium, count in runs:
            if medium is not Medium.HOST:
                tier = next(tier for tier in self.lower if tier.medium is medium)
                stat = tier.stat(keys[position])
                seconds += self._speeds[medium].estimate(count, stat.length if stat else 0)
            position += count
        return seconds

    # --- saving

    def _reserve_one(
        self,
        session: Session,
        namespace: bytes,
        length: int,
        tokens: int,
        block: NewBlock,
        part: int,
        parts: int,
    ) -> int | Miss:
        offset = self.host.allocate(envelope_bytes(length))
        if offset is None:
            return Miss.NO_ROOM
        header = Header(
            key=block.key,
            namespace=namespace,
            parent=block.parent,
            index=block.index,
            tokens=tokens,
            length=length,
            crc=0,
        )
        reservation = _Reservation(header, offset, set(range(parts)), [])
        self._reservations[block.key] = reservation
        return self._join(session, reservation, part)

    def _join(self, session: Session, reservation: _Reservation, part: int) -> int | Miss:
        if part not in reservation.missing or session in reservation.holders or reservation.aborted:
            return Miss.PRESENT
        reservation.holders.append(session)
        session.reserved.add(reservation.header.key)
        return reservation.offset + HEADER_BYTES

    def _commit_part(self, session: Session, key: BlockKey, part: int) -> _Reservation | None:
        """Note a part as written; the reservation when it was the last one."""
        reservation = self._reservations.get(key)
        if reservation is None or session not in reservation.holders:
            return None
        reservation.missing.discard(part)
        self._unhold(session, reservation)
        if reservation.missing or reservation.aborted:
            self._free_if_abandoned(reservation)
            return None
        return reservation

    async def _seal(self, reservation: _Reservation) -> Header | None:
        """Checksum the payload, write the header, publish."""
        partial, offset = reservation.header, reservation.offset
        slot = self.host.slot(offset)
        crc = await asyncio.to_thread(crc32c, payload(slot, partial.length))
        now = time.time()
        header = Header(
            key=partial.key,
            namespace=partial.namespace,
            parent=partial.parent,
            index=partial.index,
            tokens=partial.tokens,
            length=partial.length,
            crc=crc,
            generation=time.time_ns(),
            created=now,
        )
        del self._reservations[header.key]
        if header.key in self.host.keys():
            self.host.discard(offset)
            return None
        header.pack_into(slot)
        self.host.publish(header, offset)
        return header

    def _withdraw(self, session: Session, key: BlockKey) -> None:
        reservation = self._reservations[key]
        reservation.aborted = True
        self._unhold(session, reservation)
        self._free_if_abandoned(reservation)

    def _unhold(self, session: Session, reservation: _Reservation) -> None:
        reservation.holders.remove(session)
        session.reserved.discard(reservation.header.key)

    def _free_if_abandoned(self, reservation: _Reservation) -> None:
        if reservation.aborted and not reservation.holders:
            del self._reservations[reservation.header.key]
            self.host.discard(reservation.offset)
            self.metrics.aborted.inc()

    def _write_down(self, key: BlockKey, header: Header | None = None) -> dict[Medium, asyncio.Future[bool]]:
        """Offer a block of the host tier to every slower tier that lacks it.

        Also done for blocks that are read: what a full queue or an outage kept from a tier gets there when it is used
        again, and what came from the bucket gets to the disk.
        """
        lacking = [queue for queue in self._queues if key not in queue.tier.keys()]
        if not lacking:
            return {}
        if header is None:
            offset = self.host.pin(key)
            if offset is None:
                return {}
            header = Header.unpack(self.host.slot(offset))
            self.host.unpin(key, offset)
        return {queue.tier.medium: future for queue in lacking if (future := queue.offer(header)) is not None}

    # --- background

    def _touch(self, keys: Sequence[BlockKey]) -> None:
        for tier in self.tiers:
            tier.touch(keys)

    def _spawn(self, work: Awaitable[None]) -> None:
        async def run() -> None:
            await work

        task = asyncio.create_task(run())
        self._background.add(task)
        task.add_done_callback(self._background.discard)


@dataclass(slots=True)
class _Speed:
    """Moving average of what fetching a block takes, and of its bytes."""

    seconds: float = 0.0
    nbytes: float = 0.0

    def record(self, nbytes: int, seconds: float, weight: float = 0.1) -> None:
        if not self.nbytes:
            weight = 1.0
        self.seconds += weight * (seconds - self.seconds)
        self.nbytes += weight * (nbytes - self.nbytes)

    def estimate(self, blocks: int, length: int) -> float:
        """Seconds for ``blocks`` of ``length`` bytes; 0 before the first measurement. Fetches overlap by the window."""
        if not self.nbytes:
            return 0.0
        rounds = -(-blocks // FETCHES_PER_ACQUIRE)
        return rounds * self.seconds * length / self.nbytes
