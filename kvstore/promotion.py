"""Brings blocks from the slower tiers into the arena, each one once however many want it."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence

from kvstore import tracing
from kvstore.envelope import Header, envelope_bytes
from kvstore.errors import BlockCorrupt, BlockNotFound, BlockTooLarge, TierError, TierUnavailable
from kvstore.history import History, What
from kvstore.identity import BlockKey
from kvstore.node.api import Miss
from kvstore.policy.planner import WINDOW, Run
from kvstore.policy.speed import SpeedMeter
from kvstore.promises import Promises
from kvstore.tiers.base import Medium, Tier
from kvstore.tiers.host import HostTier

FETCHES_PER_ACQUIRE = 32
"""Blocks that one acquire fetches at a time: enough to keep a tier busy, in order, so that a prefix arrives first."""

AHEAD = 4
"""Blocks fetched at a time for later requests: few, as engines wait for others."""

MOST_AHEAD = 4096
"""Blocks that may wait to be fetched for later requests; the latest are wanted soonest."""


BURST = 128
"""Blocks fetched together from another region: a window of its meter. A round trip of 80 ms then takes some 10 us a token."""

BURST_SHARE = 8
"""A burst takes at most this part of the arena, so that what arrives is still there when it is wanted."""


class Promoter:
    """Singleflight fetches into the host tier. Owned by the store's event loop."""

    def __init__(self, host: HostTier, lower: Sequence[Tier], history: History) -> None:
        self._host = host
        self._history = history
        self._lower = tuple(lower)
        self._flights: dict[BlockKey, asyncio.Task[Medium | Miss]] = {}
        self.meters = {tier.medium: SpeedMeter(tier.medium, _window(tier.medium)) for tier in lower}
        self.promises = Promises()
        self._in_flight = dict.fromkeys(self.meters, 0)
        self._wanted: deque[BlockKey] = deque(maxlen=MOST_AHEAD)
        self._fetchers: set[asyncio.Task[None]] = set()
        self._bursts: set[asyncio.Task[None]] = set()
        self._early: dict[BlockKey, None] = {}
        """Blocks that a burst has brought, or will, and nobody has acquired yet."""

    async def fetch(self, key: BlockKey) -> Medium | Miss:
        """Have the block published in the host tier; the tier it came from, or why it could not be had.

        Cancelling the caller does not cancel the fetch: it serves whoever asks next.
        """
        return await asyncio.shield(self._flight(key))

    def fetch_ahead(self, keys: Iterable[BlockKey]) -> None:
        """Fetch blocks for later requests, a few at a time, behind what engines wait for."""
        self._wanted.extend(keys)
        while self._wanted and len(self._fetchers) < AHEAD:
            task = asyncio.create_task(self._fetch_wanted())
            self._fetchers.add(task)
            task.add_done_callback(self._fetchers.discard)

    def fetch_burst(self, keys: Sequence[BlockKey]) -> None:
        """Where some of ``keys`` are in another region only, fetch them with what is promised behind them; call before
        ``measure``.

        The way there is long, and is gone once for all of them; not before it is known how fast it is.
        """
        meter = self.meters.get(Medium.REMOTE)
        if meter is None or not meter.known or not any(map(self._to_fetch_from_afar, keys)):
            return
        burst, room = [], (self._host.stats().capacity_bytes or 0) // BURST_SHARE
        for key in [*keys, *self.promises.behind(keys[-1], BURST - len(keys))]:
            if self._to_fetch_from_afar(key) and (stat := self._lower[-1].stat(key)) is not None:
                room -= envelope_bytes(stat.length)
                if room < 0:
                    break
                burst.append(key)
        self._early.update(dict.fromkeys(burst))
        while len(self._early) > MOST_AHEAD:
            del self._early[next(iter(self._early))]
        measurement = self.measure(burst)
        task = asyncio.create_task(self._time(measurement, burst, [self._flight(key) for key in burst]))
        self._bursts.add(task)
        task.add_done_callback(self._bursts.discard)

    def origin(self, key: BlockKey) -> Medium:
        """Where a block came from that is in the arena and is acquired now."""
        if key not in self._early:
            return Medium.HOST
        del self._early[key]
        return Medium.REMOTE

    def estimate(self, keys: Sequence[BlockKey], runs: Sequence[tuple[Medium, int]]) -> float:
        """Seconds until the runs, which begin at the first key, are in the arena: from what fetches took lately."""
        seconds = 0.0
        position = 0
        for medium, count in runs:
            for tier in self._lower:
                if tier.medium is medium and (stat := tier.stat(keys[position])) is not None:
                    meter = self.meters[medium]
                    if meter.known:
                        speed = meter.speed(self._in_flight[medium])
                        seconds += speed.seconds(Run(medium, count, count * stat.length))
            position += count
        return seconds

    def measure(self, keys: Sequence[BlockKey]) -> Measurement:
        """Begin to time how long these blocks take to be in the arena. Call before they are fetched."""
        arena = self._host.keys()
        lengths: dict[Medium, dict[BlockKey, int]] = {}
        for key in keys:
            if key in arena or key in self._flights:
                continue
            for tier in self._lower:
                if (stat := tier.stat(key)) is not None:
                    lengths.setdefault(tier.medium, {})[key] = stat.length
                    break
        return Measurement(self.meters, lengths, dict(self._in_flight))

    def measure_late(self, measurement: Measurement, delivered: Sequence[BlockKey], key: BlockKey) -> None:
        """``key`` is late. Of a tier that nobody measured yet it still tells how slow that is, when it comes."""
        flight = self._flights.get(key)
        if measurement.first_of_its_tier and flight is not None:
            keys = [*delivered, key]
            flight.add_done_callback(lambda done: measurement.end(keys) if _came(done) else None)
        else:
            measurement.end(delivered, late=True)

    async def settle(self, keys: Iterable[BlockKey]) -> None:
        """Wait until none of these blocks is being fetched."""
        await asyncio.gather(*(self._flights[key] for key in self._flights.keys() & set(keys)), return_exceptions=True)

    async def close(self) -> None:
        work = [*self._bursts, *self._fetchers, *self._flights.values()]
        for task in work:
            task.cancel()
        await asyncio.gather(*work, return_exceptions=True)

    def _flight(self, key: BlockKey) -> asyncio.Task[Medium | Miss]:
        flight = self._flights.get(key)
        if flight is None:
            flight = self._flights[key] = asyncio.create_task(self._promote(key))
            flight.add_done_callback(lambda _: self._flights.pop(key))
        return flight

    def _to_fetch_from_afar(self, key: BlockKey) -> bool:
        if key in self._host.keys() or key in self._flights:
            return False
        holder = next((tier.medium for tier in self._lower if key in tier.keys()), None)
        return holder is Medium.REMOTE

    async def _time(
        self, measurement: Measurement, keys: Sequence[BlockKey], flights: Sequence[asyncio.Task[Medium | Miss]]
    ) -> None:
        """How long a burst takes."""
        came = []
        for key, flight in zip(keys, flights, strict=True):
            await asyncio.wait([flight])
            if _came(flight):
                measurement.arrived(key)
                came.append(key)
            else:
                self._early.pop(key, None)
        measurement.end(came)

    async def _fetch_wanted(self) -> None:
        while self._wanted:
            key = self._wanted.popleft()
            if key in self._host.keys():
                continue
            measurement = self.measure([key])
            if isinstance(await self.fetch(key), Medium):
                measurement.end([key])

    async def _promote(self, key: BlockKey) -> Medium | Miss:
        try:
            return await self._bring(key)
        finally:
            self.promises.end(key)

    async def _bring(self, key: BlockKey) -> Medium | Miss:
        """From the fastest tier that delivers the block."""
        miss = Miss.NOT_STORED
        for tier in self._lower:
            if (stat := tier.stat(key)) is None:
                continue
            try:
                offset = self._host.allocate(envelope_bytes(stat.length), key)
            except BlockTooLarge:
                return Miss.NO_ROOM
            if offset is None:
                return Miss.NO_ROOM
            self._in_flight[tier.medium] += stat.length
            transfer = self.meters[tier.medium].begin(self._in_flight[tier.medium], time.monotonic())
            header = None
            try:
                with tracing.span(f"{tier.medium.value} get", block=key, bytes=stat.length):
                    header = _plain(await tier.get(key, self._host.slot(offset)))
            except BlockNotFound:
                self._history.record(What.GONE, [key], tier.medium)
                continue
            except (BlockCorrupt, BlockTooLarge):
                miss = Miss.CORRUPT
                self._history.record(What.CORRUPT, [key], tier.medium)
                continue
            except TierError:
                miss = Miss.UNAVAILABLE
                self._history.record(What.UNAVAILABLE, [key], tier.medium)
                continue
            finally:
                self._in_flight[tier.medium] -= stat.length
                self.meters[tier.medium].end(transfer)
                if header is None:
                    self._host.discard(offset)
            if key in self._host.keys():  # saved anew meanwhile
                self._host.discard(offset)
            else:
                self._host.publish(header, offset)
                self._history.record(What.FETCHED, [key], tier.medium)
            return tier.medium
        return miss


class Measurement:
    """Times blocks that were asked for together, for the meter of the tier that has them."""

    def __init__(
        self,
        meters: Mapping[Medium, SpeedMeter],
        lengths: Mapping[Medium, Mapping[BlockKey, int]],
        ahead: Mapping[Medium, int],
    ) -> None:
        """``lengths``: of the blocks to come, by tier. ``ahead``: bytes that each tier was busy with already."""
        self._meters = meters
        self._lengths = lengths
        self._ahead = ahead
        self._started = time.monotonic()
        self._first: float | None = None

    @property
    def first_of_its_tier(self) -> bool:
        """Nothing is known of the tier yet."""
        return all(not self._meters[medium].known for medium in self._lengths)

    def arrived(self, key: BlockKey) -> None:
        """A block is here. How long the first one took tells a tier's latency from its bandwidth."""
        if self._first is None and any(key in lengths for lengths in self._lengths.values()):
            self._first = time.monotonic() - self._started

    def end(self, delivered: Sequence[BlockKey], late: bool = False) -> None:
        """``delivered`` are here now; ``late``: the one behind them was awaited as long. Of two tiers nothing is learnt."""
        if len(self._lengths) != 1:
            return
        seconds = time.monotonic() - self._started
        ((medium, lengths),) = self._lengths.items()
        came = sum(lengths.get(key, 0) for key in delivered)
        one = next(iter(lengths.values()))
        if came:
            if came > one and self._first is not None:
                self._meters[medium].observe(self._ahead[medium] + one, self._first)
            self._meters[medium].observe(self._ahead[medium] + came, seconds)
        elif late:
            self._meters[medium].at_least(self._ahead[medium] + one, seconds)


def _window(medium: Medium) -> int:
    """Blocks that are asked for together."""
    return BURST if medium is Medium.REMOTE else WINDOW


def _came(flight: asyncio.Task[Medium | Miss]) -> bool:
    return not flight.cancelled() and flight.exception() is None and isinstance(flight.result(), Medium)


def _plain(header: Header) -> Header:
    """Raises TierUnavailable for a payload that is not what an engine saved: encrypted, and no key configured."""
    if header.codecs:
        raise TierUnavailable(f"stored with codecs {header.codecs}: set the encryption keys")
    return header
