"""Work that one process of a region does, again and again: whoever holds its lease. The others stand by.

Nothing that a round meets ends the loop: a bucket, a catalog or a region that is away is logged, counted and tried again later,
and meanwhile the lease is free for a replica that may fare better.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager, nullcontext, suppress
from dataclasses import asdict, dataclass

import structlog
from prometheus_client import CollectorRegistry, Counter, Gauge

from kvstore.errors import BlockTooLarge, KVStoreError, TierUnavailable
from kvstore.parsing import parse_json
from replication.lease import LEASE_SECONDS, LeaseTaken, hold
from replication.links import Links
from replication.names import duty_name

log = structlog.get_logger(__name__)

FIRST_RETRY_SECONDS, LAST_RETRY_SECONDS = 1.0, 60.0
STANDBY_SECONDS = LEASE_SECONDS / 2
_MAX_BYTES = 64 << 10


@dataclass(frozen=True, slots=True)
class Round:
    """What a round came to."""

    did: str = ""
    """For people; empty: there was nothing to do."""
    problem: str = ""
    """What of it failed, while the rest went well."""


@dataclass(frozen=True, slots=True)
class Duty:
    """A job of which a region needs one at a time."""

    role: str
    """Name of the lease."""
    seconds: float
    """From the end of a round to the next."""
    work: Callable[[], Awaitable[Round]]
    standing_by: Callable[[], None] = lambda: None
    """Told while another process does it."""
    at_work: Callable[[], AbstractAsyncContextManager[None]] = nullcontext
    """Entered with the lease and left with it: around what goes on between rounds."""


@dataclass(slots=True)
class Standing:
    """How a duty fares; kept in the bucket, so that ``kvstore region status`` can show it from anywhere."""

    at: float = 0.0
    """End of the last round, in seconds since the epoch."""
    rounds: int = 0
    failures: int = 0
    did: str = ""
    did_at: float = 0.0
    """The last round that had something to do, and when."""
    problem: str = ""
    """Of the last round; empty when it went well."""


class DutyMetrics:
    """Counters of a process. Labels are names of duties and of outcomes: a handful."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.rounds = Counter(
            "kvstore_region_rounds", "Rounds of the region's duties, by outcome", ("duty", "outcome"), registry=registry
        )
        self.active = Gauge(
            "kvstore_region_duty_active",
            "1 while this process holds the lease of the duty",
            ("duty",),
            registry=registry,
        )
        self.ended = Gauge(
            "kvstore_region_round_timestamp_seconds",
            "End of the last round that went well, seconds since the epoch",
            ("duty",),
            registry=registry,
        )


class Keeper:
    """Does one duty as long as the process lives."""

    def __init__(self, bucket: Links, duty: Duty, metrics: DutyMetrics) -> None:
        self.standing = Standing()
        self._bucket = bucket
        self._duty = duty
        self._metrics = metrics

    async def run(self) -> None:
        """Until cancelled; the lease is given back then."""
        delay = FIRST_RETRY_SECONDS
        standing_by = ""
        while True:
            try:
                async with hold(self._bucket, self._duty.role), self._duty.at_work():
                    with self._metrics.active.labels(self._duty.role).track_inprogress():
                        while True:
                            await self._round()
                            delay = FIRST_RETRY_SECONDS
                            await asyncio.sleep(self._duty.seconds)
            except LeaseTaken as taken:
                if str(taken) != standing_by:
                    standing_by = str(taken)
                    self._duty.standing_by()
                    log.info("standing by", duty=self._duty.role, reason=standing_by)
                await asyncio.sleep(STANDBY_SECONDS)
                continue
            except KVStoreError as error:
                log.warning("duty failed", duty=self._duty.role, error=str(error), retry_seconds=delay)
                problem = f"{type(error).__name__}: {error}"
            except Exception as error:
                log.exception("duty broke", duty=self._duty.role, retry_seconds=delay)
                problem = f"{type(error).__name__}: {error}"
            await self._note(Round(problem=problem), failed=True)
            await asyncio.sleep(delay)
            delay = min(2 * delay, LAST_RETRY_SECONDS)

    async def _round(self) -> None:
        done = await self._duty.work()
        if done.did:
            log.info("duty done", duty=self._duty.role, did=done.did)
        await self._note(done, failed=False)

    async def _note(self, done: Round, failed: bool) -> None:
        standing = self.standing
        standing.at = time.time()
        standing.rounds += 1
        standing.failures += failed
        standing.problem = done.problem
        if done.did:
            standing.did, standing.did_at = done.did, standing.at
        outcome = "failed" if failed else "partly" if done.problem else "done"
        self._metrics.rounds.labels(self._duty.role, outcome).inc()
        if not failed:
            self._metrics.ended.labels(self._duty.role).set(standing.at)
        with suppress(TierUnavailable):  # shown again after the next round
            await self._bucket.put(duty_name(self._duty.role), json.dumps(asdict(standing)).encode(), create=False)


async def read_standing(bucket: Links, role: str) -> Standing | None:
    """How a duty fared last; None when it never did, or that cannot be read. Raises TierUnavailable."""
    try:
        body = await bucket.read(duty_name(role), _MAX_BYTES)
        return None if body is None else Standing(**parse_json(body))
    except (ValueError, TypeError, BlockTooLarge):
        return None
