"""A bound on bytes in flight."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class ByteBudget:
    """A semaphore that counts bytes; served in order of arrival, so that a large request is never starved."""

    def __init__(self, nbytes: int) -> None:
        self.total = nbytes
        self._free = nbytes
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    @property
    def used(self) -> int:
        return self.total - self._free

    @asynccontextmanager
    async def taken(self, nbytes: int) -> AsyncIterator[None]:
        """Hold ``nbytes`` (at most all of them: what is larger goes alone) for the length of the block."""
        nbytes = min(nbytes, self.total)
        await self._take(nbytes)
        try:
            yield
        finally:
            self._give(nbytes)

    def resize(self, nbytes: int) -> None:
        """Change the bound. What is taken stays taken, and a waiting request larger than all of it goes alone."""
        self._free += nbytes - self.total
        self.total = nbytes
        self._serve()

    async def _take(self, nbytes: int) -> None:
        if not self._waiting and nbytes <= self._free:
            self._free -= nbytes
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((nbytes, turn))
        try:
            await turn
        except asyncio.CancelledError:
            if turn.cancelled():
                self._serve()
            else:
                self._give(nbytes)
            raise

    def _give(self, nbytes: int) -> None:
        self._free += nbytes
        self._serve()

    def _serve(self) -> None:
        while self._waiting:
            nbytes, turn = self._waiting[0]
            if not turn.cancelled():
                if nbytes > self._free and self.used:
                    return
                self._free -= nbytes
                turn.set_result(None)
            self._waiting.popleft()
