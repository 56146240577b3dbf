"""Answers that are kept for a moment, so that many who ask at a time cost the node one call."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Cached(Generic[T]):
    """The result of a call, for ``seconds``. Whoever asks while the call is under way waits for it. One event loop."""

    def __init__(self, call: Callable[[], Coroutine[Any, Any, T]], seconds: float) -> None:
        self._call = call
        self._seconds = seconds
        self._flight: asyncio.Task[T] | None = None
        self._done_at = 0.0

    async def __call__(self) -> T:
        """Raises what the call raises; a failure is not kept."""
        flight = self._flight
        if flight is None or (flight.done() and (time.monotonic() - self._done_at > self._seconds or _failed(flight))):
            flight = self._flight = asyncio.create_task(self._call())
            flight.add_done_callback(self._note)
        return await asyncio.shield(flight)

    def forget(self) -> None:
        """What is known, or is being asked, is out of date."""
        self._flight = None

    def _note(self, flight: asyncio.Task[T]) -> None:
        if flight is self._flight:
            self._done_at = time.monotonic()
        _failed(flight)  # so that a failure that nobody waits for any more is not reported as lost


def _failed(flight: asyncio.Task[Any]) -> bool:
    return flight.cancelled() or flight.exception() is not None
