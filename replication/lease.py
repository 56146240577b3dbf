"""A lease on a job that only one process of a region may do, kept in the region's bucket.

Needs nothing of the server but conditional creation. Taking a lease over creates the object of the next epoch, which only one
can do; the highest epoch is the lease. Clocks of a region's machines must agree within a few seconds. Should two processes
work at once all the same, they do the same work twice, and no harm.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass

import structlog

from kvstore.errors import KVStoreError, TierUnavailable
from kvstore.parsing import parse_json
from replication.links import Links
from replication.names import LEASES, lease_name

log = structlog.get_logger(__name__)

LEASE_SECONDS = 30.0
_MAX_BYTES = 4096


class LeaseTaken(KVStoreError):
    """Somebody else does the job."""


@dataclass(frozen=True, slots=True)
class Grant:
    """The lease as the bucket has it."""

    epoch: int
    holder: str
    expires: float
    """Seconds since the epoch."""


def this_process() -> str:
    return f"{socket.gethostname()}:{os.getpid()}:{os.urandom(4).hex()}"


async def current(bucket: Links, role: str) -> Grant | None:
    """Who has the lease, or had it last. Raises TierUnavailable."""
    names = sorted(found.name for found in await bucket.listing(f"{LEASES}/{role}"))
    if not names:
        return None
    epoch = int(names[-1].rpartition("/")[2].removesuffix(".json"))
    body = await bucket.read(names[-1], _MAX_BYTES)
    try:
        fields = parse_json(body or b"")
        return Grant(epoch, str(fields["holder"]), float(fields["expires"]))
    except (ValueError, TypeError, KeyError):
        return Grant(epoch, "", 0.0)


@asynccontextmanager
async def hold(bucket: Links, role: str, seconds: float = LEASE_SECONDS) -> AsyncIterator[Grant]:
    """Hold the lease for the length of the block, which is cancelled should the lease be lost.

    Raises LeaseTaken, naming the holder; TierUnavailable.
    """
    grant = await _take(bucket, role, this_process(), seconds)
    task = asyncio.current_task()
    assert task is not None
    lost = False

    async def keep() -> None:
        nonlocal lost
        while True:
            await asyncio.sleep(seconds / 3)
            if not await _renew(bucket, role, grant, seconds):
                lost = True
                task.cancel()
                return

    keeper = asyncio.create_task(keep())
    try:
        yield grant
    except asyncio.CancelledError:
        if not lost:
            raise
        task.uncancel()
        raise LeaseTaken(f"the lease for {role} was lost") from None
    finally:
        keeper.cancel()
        await asyncio.wait([keeper])
        if not lost:
            with suppress(TierUnavailable):
                await _write(bucket, role, Grant(grant.epoch, grant.holder, 0.0), create=False)


async def _take(bucket: Links, role: str, holder: str, seconds: float) -> Grant:
    last = await current(bucket, role)
    if last is not None and last.expires > time.time():
        raise LeaseTaken(f"{last.holder} has the lease for {role}")
    grant = Grant((last.epoch if last else 0) + 1, holder, time.time() + seconds)
    created = await _write(bucket, role, grant, create=True)
    now = await current(bucket, role)  # also asked because some servers ignore the condition
    if not created or now is None or now.holder != holder:
        raise LeaseTaken(f"{now.holder if now else 'somebody'} was faster to take the lease for {role}")
    if last is not None:
        await bucket.delete([lease_name(role, last.epoch)])
    return grant


async def _renew(bucket: Links, role: str, grant: Grant, seconds: float) -> bool:
    """False when the lease has another holder, or nobody can tell any more."""
    expires = time.time() + seconds
    try:
        last = await current(bucket, role)
        if last is None or last.holder != grant.holder:
            return False
        await _write(bucket, role, Grant(grant.epoch, grant.holder, expires), create=False)
    except TierUnavailable as error:
        log.warning("lease not renewed", role=role, error=str(error))
        return False
    return True


async def _write(bucket: Links, role: str, grant: Grant, create: bool) -> bool:
    body = json.dumps({"holder": grant.holder, "expires": grant.expires}).encode()
    return await bucket.put(lease_name(role, grant.epoch), body, create=create)
