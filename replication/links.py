"""A region's bucket over several links, with failover in seconds."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Self, TypeVar

import structlog

from kvstore.errors import TierUnavailable
from kvstore.tiers.object.objects import Found, Objects

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from kvstore.tiers.object import ObjectSettings

T = TypeVar("T")

log = structlog.get_logger(__name__)

FIRST_RETRY_SECONDS, LAST_RETRY_SECONDS = 1.0, 30.0


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
    def usable(self) -> bool:
        """It answered the last time, or it is time that one request tries it again."""
        return not self._delay or (not self._trying and time.monotonic() >= self._retry_at)

    async def ask(self, request: Callable[[Objects], Awaitable[T]]) -> T:
        """Send a request and learn from it. Raises TierUnavailable."""
        self._trying = bool(self._delay)
        try:
            answer = await request(self.objects)
        except TierUnavailable as error:
            if time.monotonic() >= self._retry_at:  # requests that were under way fail together: count them once
                self._delay = min(2 * self._delay, LAST_RETRY_SECONDS) or FIRST_RETRY_SECONDS
                self._retry_at = time.monotonic() + self._delay
                log.warning("link does not answer", link=self.name, retry_seconds=self._delay, error=str(error))
            raise
        finally:
            self._trying = False
        if self._delay:
            log.info("link answers again", link=self.name)
            self._delay = 0.0
        return answer


class Links:
    """Verbs on the objects of one bucket, each over the best link that answers. All raise TierUnavailable if none does."""

    def __init__(self, links: Sequence[Link]) -> None:
        """``links``: best first."""
        self.links = tuple(links)

    @classmethod
    @asynccontextmanager
    async def open(cls, settings: Sequence[ObjectSettings]) -> AsyncIterator[Self]:
        """Links with these settings, closed at the end. No request is made yet."""
        links = []
        for one in settings:
            objects = await asyncio.to_thread(Objects.connect, one)
            links.append(Link(one.endpoint or one.url, objects))
        try:
            yield cls(links)
        finally:
            for link in links:
                await link.objects.close()

    async def ask(self, request: Callable[[Objects], Awaitable[T]]) -> T:
        """The answer of the first link that gives one."""
        error = TierUnavailable(f"no link to {self.links[0].name} is due for a try")
        for link in self.links:
            if not link.usable:
                continue
            try:
                return await link.ask(request)
            except TierUnavailable as failure:
                error = failure
        raise error

    async def get(self, name: str, into: memoryview, check: Callable[[Found, memoryview], T]) -> T | None:
        """See ``Objects.get``."""
        return await self.ask(lambda objects: objects.get(name, into, check))

    async def start_of(self, name: str, nbytes: int) -> bytes | None:
        """See ``Objects.start_of``."""
        return await self.ask(lambda objects: objects.start_of(name, nbytes))

    async def read(self, name: str, limit: int) -> bytes | None:
        """A small object whole, or None if it is missing. Raises BlockTooLarge when it has more than ``limit`` bytes."""
        found = await self.ask(lambda objects: objects.head(name))
        if found is None:
            return None
        into = memoryview(bytearray(min(found.size, limit)))
        return await self.get(name, into, lambda _, body: bytes(body))
