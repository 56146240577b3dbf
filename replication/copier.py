"""Copies blocks from one bucket to another, in the order of a plan.

A block is created in the destination only after its bytes were checked, only if it is not there, and only when its parent did
not fail. What the destination lists is the progress: a copier that was killed goes on where it was, and two copiers do no harm.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Protocol

import structlog

from kvstore import tracing
from kvstore.catalog.base import Entry
from kvstore.envelope import HEADER_BYTES, Header, verify
from kvstore.errors import BlockCorrupt, BlockTooLarge, TierUnavailable
from kvstore.identity import NO_PARENT, BlockKey
from kvstore.tiers.object import ObjectSettings
from kvstore.tiers.object.budget import ByteBudget
from kvstore.tiers.object.names import block_name
from kvstore.tiers.object.objects import Found
from replication.links import Links
from replication.manifest import HotBlock, Manifest

log = structlog.get_logger(__name__)

COPIES_AT_ONCE = 32
"""As many as ``Objects`` has threads: 32 blocks of 1 MiB under way fill 5 Gbit/s at a round trip of 50 ms."""
MEMORY_BYTES = 256 << 20
"""Blocks held in memory at a time, at most."""
FIRST_BYTES = 2 << 20
LATENCY_SECONDS = 2.0
"""How long a block may take: more than any round trip, less than it takes for a link to look dead."""


class Window(ByteBudget):
    """Bytes on their way: as many as arrive within ``LATENCY_SECONDS``, whether the link is fast or slow.

    Grows with every block that is quicker and shrinks with every block that is slower, so that a long fast link is filled and
    a slow one is not flooded until its requests time out.
    """

    def __init__(self, most: int = MEMORY_BYTES) -> None:
        super().__init__(min(FIRST_BYTES, most))
        self._most = most

    def learn(self, nbytes: int, seconds: float) -> None:
        """A block of ``nbytes`` took so long."""
        change = nbytes if seconds < LATENCY_SECONDS else -nbytes // 2
        self.resize(max(nbytes, min(self.total + change, self._most)))


class Outcome(Enum):
    """What became of a block."""

    COPIED = "copied"
    PRESENT = "present"
    GONE = "gone"
    """The source does not have it any more."""
    CORRUPT = "corrupt"
    """Its bytes did not verify, twice; nothing was created."""
    UNPAID = "unpaid"
    """The money ran out: damaged bytes were paid for, too."""
    ORPHANED = "orphaned"
    """Not created, because an ancestor failed."""


FAILED = (Outcome.GONE, Outcome.CORRUPT, Outcome.UNPAID, Outcome.ORPHANED)


class Transfer(Protocol):
    """A way to bring one block over."""

    async def __call__(self, block: HotBlock, parent: Awaitable[bool]) -> Outcome:
        """Create the block once ``parent`` says that its parent is there; ORPHANED when it says no.

        Raises TierUnavailable when source or destination does not answer.
        """


@dataclass
class Copied:
    """What a run did."""

    outcomes: dict[Outcome, int] = field(default_factory=dict)
    nbytes: int = 0
    """Created in the destination."""

    def add(self, block: HotBlock, outcome: Outcome) -> None:
        self.outcomes[outcome] = self.outcomes.get(outcome, 0) + 1
        self.nbytes += block.nbytes * (outcome is Outcome.COPIED)


async def copy(
    blocks: Sequence[HotBlock],
    transfer: Transfer,
    done: Callable[[HotBlock, Outcome], None] = lambda block, outcome: None,
) -> None:
    """Copy in order, ``COPIES_AT_ONCE`` at a time; ``done`` is told of each block. Raises TierUnavailable."""
    there: dict[BlockKey, asyncio.Future[bool]] = {}
    """Whether a block arrived, once that is known. Blocks start in order, so a parent never waits for its child."""
    waiting = iter(blocks)

    async def work() -> None:
        for block in waiting:
            parent = there.get(block.parent) or _known(True)
            mine = there[block.key] = asyncio.get_running_loop().create_future()
            if parent.done() and not parent.result():
                outcome = Outcome.ORPHANED
            else:
                with tracing.span("replication copy", block=block.key, bytes=block.nbytes) as span:
                    outcome = await transfer(block, parent)
                    span.set(outcome=outcome.value)
            mine.set_result(outcome not in FAILED)
            if outcome in FAILED:
                log.warning("block not copied", block=block.key.hex(), reason=outcome.value)
            done(block, outcome)

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(min(COPIES_AT_ONCE, len(blocks))):
                group.create_task(work())
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None


class Pace(Protocol):
    """Leave to send bytes."""

    async def take(self, nbytes: int) -> bool:
        """Wait until they may be sent; False when they may not at all."""


class Streamed:
    """Through this process: read, check, create."""

    def __init__(self, source: Links, destination: Links, pace: Pace, window: Window) -> None:
        self._source = source
        self._destination = destination
        self._pace = pace
        self._window = window

    async def __call__(self, block: HotBlock, parent: Awaitable[bool]) -> Outcome:
        name = block_name(block.namespace, block.key)
        async with self._window.taken(block.nbytes):
            there = await self._destination.head(name)
            if there is not None and there.size == block.nbytes:
                return Outcome.PRESENT
            envelope = memoryview(bytearray(block.nbytes))
            if (failure := await self._fetch(block, name, envelope)) is not None:
                return failure
            if not await parent:
                return Outcome.ORPHANED
            stump = there is not None
            created = await self._destination.put(name, envelope, create=not stump)
        return Outcome.COPIED if created else Outcome.PRESENT

    async def _fetch(self, block: HotBlock, name: str, into: memoryview) -> Outcome | None:
        """Fill ``into`` with bytes that verify; what was damaged on the way is asked for once more."""
        for attempt in (1, 2):
            if not await self._pace.take(block.nbytes):
                return Outcome.UNPAID
            started = time.monotonic()
            try:
                header = await self._source.get(name, into, lambda found, body: checked(block, found, body))
            except (BlockCorrupt, BlockTooLarge) as error:
                log.warning("bad bytes from the source", block=block.key.hex(), attempt=attempt, error=str(error))
            else:
                self._window.learn(block.nbytes, time.monotonic() - started)
                return Outcome.GONE if header is None else None
        return Outcome.CORRUPT


class ServerSide:
    """Within one provider: the server copies, and only the header passes through this process.

    The payload is not seen here: as with every block, whoever loads it verifies it.
    """

    def __init__(
        self,
        client: Any,
        source: Links,
        source_is: ObjectSettings,
        destination: Links,
        destination_is: ObjectSettings,
        pace: Pace,
    ) -> None:
        """``client`` is boto3's, at the destination."""
        self._client = client
        self._source = source
        self._source_is = source_is
        self._destination = destination
        self._destination_is = destination_is
        self._pace = pace

    async def __call__(self, block: HotBlock, parent: Awaitable[bool]) -> Outcome:
        name = block_name(block.namespace, block.key)
        there = await self._destination.head(name)
        if there is not None and there.size == block.nbytes:
            return Outcome.PRESENT
        found = await self._source.head(name)
        start = await self._source.start_of(name, HEADER_BYTES)
        if found is None or start is None:
            return Outcome.GONE
        try:
            header = Header.unpack(start)
        except BlockCorrupt:
            return Outcome.CORRUPT
        if header.key != block.key or header.namespace != block.namespace or header.envelope_bytes != found.size:
            return Outcome.CORRUPT
        if not await parent:
            return Outcome.ORPHANED
        if not await self._pace.take(block.nbytes):
            return Outcome.UNPAID
        return await asyncio.to_thread(self._copy, name, found)

    def _copy(self, name: str, found: Found) -> Outcome:
        import botocore.exceptions

        source, destination = self._source_is, self._destination_is
        try:
            self._client.copy_object(
                Bucket=destination.bucket,
                Key=f"{destination.prefix}/{name}".lstrip("/"),
                CopySource={"Bucket": source.bucket, "Key": f"{source.prefix}/{name}".lstrip("/")},
                CopySourceIfMatch=found.etag or "",
            )
        except self._client.exceptions.ClientError as error:
            code = str(error.response.get("Error", {}).get("Code", ""))
            if code in ("NoSuchKey", "404", "PreconditionFailed", "412"):
                return Outcome.GONE
            raise TierUnavailable(f"server-side copy: {code}") from error
        except botocore.exceptions.BotoCoreError as error:
            raise TierUnavailable(f"server-side copy: {error}") from error
        return Outcome.COPIED


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


def _known(answer: bool) -> asyncio.Future[bool]:
    future: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
    future.set_result(answer)
    return future


def checked(block: HotBlock, found: Found, envelope: memoryview) -> Header:
    """The header of a block whose bytes are what the manifest promised. Raises BlockCorrupt. Any thread."""
    header = verify(envelope, block.key)
    if header.namespace != block.namespace:
        raise BlockCorrupt(f"header names namespace {header.namespace.hex()}")
    if found.size != header.envelope_bytes or header.length != block.length:
        raise BlockCorrupt(f"object has {found.size} bytes where {block.nbytes} were promised")
    if header.parent != block.parent:
        raise BlockCorrupt(f"header names parent {header.parent.hex()}")
    return header
