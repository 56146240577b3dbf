"""Learning what the bucket holds: a listing at the start, and questions about single blocks later."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine, Iterable, Sequence
from typing import Any, TypeVar

from kvstore.envelope import HEADER_BYTES, Header
from kvstore.errors import BlockCorrupt
from kvstore.identity import BlockKey
from kvstore.tiers.object.contents import Contents, plausible_size
from kvstore.tiers.object.names import BLOCKS, block_name, parse_block_name
from kvstore.tiers.object.objects import Found, Objects
from kvstore.tiers.object.peers import Peers
from kvstore.tiers.object.quarantine import Quarantine

T = TypeVar("T")

QUESTIONS = 16
"""Requests under way at a time."""
MAX_PROBED = 256
"""Blocks asked for in one call."""
ABSENT_SECONDS = 15.0
"""How long a block that was not there is not asked for again."""
MAX_ABSENT = 65_536


class Survey:
    """Fills ``contents`` from the bucket."""

    def __init__(self, objects: Objects, contents: Contents, quarantine: Quarantine, peers: Peers) -> None:
        self._objects = objects
        self._contents = contents
        self._quarantine = quarantine
        self._peers = peers
        self._questions = asyncio.Semaphore(QUESTIONS)
        self._absent: dict[BlockKey, float] = {}
        """Until when a block counts as not there; the oldest come first."""
        self._vanished: set[BlockKey] | None = None
        """Blocks that went while a listing was under way: it may still show them."""

    def vanished(self, key: BlockKey) -> None:
        """A block was deleted, or found to be gone."""
        if self._vanished is not None:
            self._vanished.add(key)

    def appeared(self, key: BlockKey) -> None:
        """A block was written, or found."""
        self._absent.pop(key, None)
        if self._vanished is not None:
            self._vanished.discard(key)

    async def take_stock(self) -> None:
        """List all blocks, until the index is full. Raises TierUnavailable; then it may be called again."""
        self._vanished = set()
        try:
            async for page in self._objects.walk(BLOCKS):
                for found in page:
                    self._learn(found)
                if self._contents.full:
                    return
        finally:
            self._vanished = None

    async def read_headers(self) -> None:
        """Read the headers of listed blocks, so that chains are known before something is evicted."""
        unread = [key for key in list(self._contents.index.keys()) if not self._contents.knows_header(key)]
        for start in range(0, len(unread), MAX_PROBED):
            await _all(self._read_header(key) for key in unread[start : start + MAX_PROBED])

    async def probe(self, keys: Iterable[BlockKey], namespaces: Sequence[bytes]) -> int:
        """See ``ObjectTier.probe``."""
        now = time.monotonic()
        unknown = [key for key in keys if key not in self._contents.index and self._absent.get(key, now) <= now]
        unknown = unknown[:MAX_PROBED]
        return sum(await _all(self._ask(key, namespaces) for key in unknown))

    async def _ask(self, key: BlockKey, namespaces: Sequence[bytes]) -> bool:
        for namespace in namespaces:
            async with self._questions:
                found = await self._objects.head(block_name(namespace, key))
            if found is not None and plausible_size(found.size) and key not in self._quarantine:
                self.appeared(key)
                if key not in self._contents.index:
                    self._peers.stored(self._contents.note(namespace, key, found))
                return True
        self._absent.pop(key, None)
        self._absent[key] = time.monotonic() + ABSENT_SECONDS
        while len(self._absent) > MAX_ABSENT:
            del self._absent[next(iter(self._absent))]
        return False

    def _learn(self, found: Found) -> None:
        parsed = parse_block_name(found.name)
        if parsed is None:
            return
        namespace, key = parsed
        if key in self._contents.index or key in self._quarantine or key in (self._vanished or ()):
            return
        if plausible_size(found.size):
            self._contents.note(namespace, key, found)
        else:
            self._quarantine.add(namespace, key, found.etag, f"no envelope has {found.size} bytes")

    async def _read_header(self, key: BlockKey) -> None:
        namespace = self._contents.namespace(key)
        if namespace is None:
            return
        name = block_name(namespace, key)
        async with self._questions:
            start = await self._objects.start_of(name, HEADER_BYTES)
        if key not in self._contents.index or self._contents.knows_header(key):
            return
        if start is None:
            self._contents.forget(key)
            return
        try:
            header = Header.unpack(start)
        except BlockCorrupt:
            return  # found again, and judged on all its bytes, when the block is read
        if header.key == key and header.namespace == namespace:
            self._contents.add(header, 0.0)
            self._peers.stored(header)


async def _all(work: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Run all at once; the first error ends the others."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one) for one in work]
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [task.result() for task in tasks]
