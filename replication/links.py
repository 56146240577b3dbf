"""A region's bucket over several links, with failover in seconds."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Self, TypeVar

import structlog

from kvstore.errors import TierRefused, TierUnavailable
from kvstore.tiers.object import ObjectSettings
from kvstore.tiers.object.objects import Found, Objects

T = TypeVar("T")

log = structlog.get_logger(__name__)

FIRST_RETRY_SECONDS, LAST_RETRY_SECONDS = 1.0, 30.0
PATIENCE_SECONDS = 10.0
"""How long a request waits for some link to come back, before it fails."""
POLL_SECONDS = 0.05


class Link:
    """One endpoint, and whether it answers."""

    def __init__(self, name: str, objects: Objects) -> None:
        self.name = name
        self.objects = objects
        self._retry_at = 0.0
        self._delay = 0.0
        """0 while it answers."""
        self._trying = False

    @property
    def answers(self) -> bool:
        """It did the last time."""
        return not self._delay

    @property
    def usable(self) -> bool:
        """It answered the last time, or it is time that one request tries it again."""
        return not self._delay or (not self._trying and time.monotonic() >= self._retry_at)

    async def ask(self, request: Callable[[Objects], Awaitable[T]]) -> T:
        """Send a request and learn from it. Raises TierUnavailable."""
        first = bool(self._delay)
        self._trying |= first
        try:
            answer = await request(self.objects)
        except TierRefused:
            self._delay = 0.0
            raise
        except TierUnavailable as error:
            if time.monotonic() >= self._retry_at:  # requests that were under way fail together: count them once
                self._delay = min(2 * self._delay, LAST_RETRY_SECONDS) or FIRST_RETRY_SECONDS
                self._retry_at = time.monotonic() + self._delay
                log.warning("link does not answer", link=self.name, retry_seconds=self._delay, error=str(error))
            raise
        finally:
            if first:
                self._trying = False
        if self._delay:
            log.info("link answers again", link=self.name)
            self._delay = 0.0
        return answer


class Links:
    """Verbs on the objects of one bucket, each over the best link that answers. All raise TierUnavailable if none does."""

    def __init__(self, links: Sequence[Link], patience: float = PATIENCE_SECONDS) -> None:
        """``links``: best first."""
        self.links = tuple(links)
        self._patience = patience

    @classmethod
    @asynccontextmanager
    async def open(cls, settings: Sequence[ObjectSettings], patience: float = PATIENCE_SECONDS) -> AsyncIterator[Self]:
        """Links with these settings, closed at the end. No request is made yet."""
        links = []
        for one in settings:
            objects = await asyncio.to_thread(Objects.connect, one)
            links.append(Link(one.endpoint or one.url, objects))
        try:
            yield cls(links, patience)
        finally:
            for link in links:
                await link.objects.close()

    async def ask(self, request: Callable[[Objects], Awaitable[T]]) -> T:
        """The answer of the first link that gives one."""
        deadline = time.monotonic() + self._patience
        error = TierUnavailable(f"no link to {self.links[0].name} answers")
        while True:
            refusals = 0
            for link in self.links:
                if not link.usable:
                    continue
                try:
                    return await link.ask(request)
                except TierUnavailable as failure:
                    error = failure
                    refusals += isinstance(failure, TierRefused)
            if refusals == len(self.links) or time.monotonic() >= deadline:
                raise error
            await asyncio.sleep(POLL_SECONDS)

    async def get(self, name: str, into: memoryview, check: Callable[[Found, memoryview], T]) -> T | None:
        """See ``Objects.get``."""
        return await self.ask(lambda objects: objects.get(name, into, check))

    async def put(self, name: str, body: memoryview | bytes, *, create: bool) -> bool:
        """See ``Objects.put``."""
        return await self.ask(lambda objects: objects.put(name, body, create=create))

    async def head(self, name: str) -> Found | None:
        """See ``Objects.head``."""
        return await self.ask(lambda objects: objects.head(name))

    async def start_of(self, name: str, nbytes: int) -> bytes | None:
        """See ``Objects.start_of``."""
        return await self.ask(lambda objects: objects.start_of(name, nbytes))

    async def delete(self, names: Sequence[str]) -> None:
        """See ``Objects.delete``."""
        await self.ask(lambda objects: objects.delete(names))

    async def read(self, name: str, limit: int) -> bytes | None:
        """A small object whole, or None if it is missing. Raises BlockTooLarge when it has more than ``limit`` bytes."""
        found = await self.head(name)
        if found is None:
            return None
        into = memoryview(bytearray(min(found.size, limit)))
        return await self.get(name, into, lambda _, body: bytes(body))

    async def listing(self, prefix: str) -> list[Found]:
        """All objects below the folder ``prefix``."""

        async def collect(objects: Objects) -> list[Found]:
            return [found async for page in objects.walk(prefix) for found in page]

        return await self.ask(collect)
