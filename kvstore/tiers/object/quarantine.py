"""Where blocks go that failed verification."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from dataclasses import dataclass

import structlog

from kvstore.errors import BlockCorrupt, TierUnavailable
from kvstore.identity import BlockKey
from kvstore.tiers.object.names import block_name, quarantine_name
from kvstore.tiers.object.objects import Found, Objects

log = structlog.get_logger(__name__)

KEPT = 32
PENDING = 256
"""Moves that may wait; beyond, a bad object stays where it is until a put overwrites it."""


@dataclass(frozen=True, slots=True)
class BadBlock:
    """A block that failed verification."""

    key: BlockKey
    namespace: bytes
    reason: str
    found: float
    """Seconds since the epoch."""


class BadObject(BlockCorrupt):
    """The object's bytes are not its block."""

    def __init__(self, reason: str, found: Found) -> None:
        super().__init__(reason)
        self.found = found


class Quarantine:
    """Moves bad objects aside in the background, and remembers which ones a put must overwrite."""

    def __init__(self, objects: Objects) -> None:
        self._objects = objects
        self._bad: set[BlockKey] = set()
        self._moves: dict[BlockKey, asyncio.Task[None]] = {}
        self.count = 0
        self.last: deque[BadBlock] = deque(maxlen=KEPT)
        """The latest ones, oldest first."""

    def __contains__(self, key: object) -> bool:
        """Whether a bad object may still have this block's name."""
        return key in self._bad

    def add(self, namespace: bytes, key: BlockKey, etag: str | None, reason: str) -> None:
        """Count a bad block that is in no index any more, and start to move it aside."""
        self.count += 1
        self.last.append(BadBlock(key, namespace, reason, time.time()))
        log.warning("bad block", namespace=namespace.hex(), block=key.hex(), reason=reason)
        self._bad.add(key)
        if key not in self._moves and len(self._moves) < PENDING:
            task = self._moves[key] = asyncio.create_task(self._move(namespace, key, etag))
            task.add_done_callback(lambda _: self._moves.pop(key, None))

    async def settled(self, key: BlockKey) -> None:
        """Wait until nothing moves this block's object."""
        if (task := self._moves.get(key)) is not None:
            await asyncio.wait([task])

    def healed(self, key: BlockKey) -> None:
        """The bad object was overwritten."""
        self._bad.discard(key)

    async def close(self) -> None:
        if self._moves:
            await asyncio.wait(list(self._moves.values()))

    async def _move(self, namespace: bytes, key: BlockKey, etag: str | None) -> None:
        target = quarantine_name(namespace, key, time.time_ns() // 1000)
        try:
            await self._objects.move(block_name(namespace, key), target, etag)
        except TierUnavailable as error:
            log.warning("bad block stays in place", block=key.hex(), error=str(error))
        else:
            self._bad.discard(key)
