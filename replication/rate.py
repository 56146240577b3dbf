"""A token bucket: so many bytes per second, on average and over every longer while."""

from __future__ import annotations

import asyncio
import time


class RateLimit:
    """Limits bytes per second. A request larger than what is saved up goes at once, and the next ones wait for it."""

    BURST_SECONDS = 0.25
    """How much may be saved up: enough to hide the event loop's delays, too little to notice on the link."""

    def __init__(self, bytes_per_second: float | None) -> None:
        """None: no limit."""
        self._rate = bytes_per_second
        self._saved = 0.0
        self._at = time.monotonic()

    async def take(self, nbytes: int) -> bool:
        """Wait until ``nbytes`` may be sent; always True. Served in order of arrival."""
        if (seconds := self.reserve(nbytes)) > 0:
            await asyncio.sleep(seconds)
        return True

    def reserve(self, nbytes: int) -> float:
        """Take ``nbytes`` now; the seconds to wait before they are sent."""
        if self._rate is None:
            return 0.0
        now = time.monotonic()
        self._saved = min(self._saved + (now - self._at) * self._rate, self._rate * self.BURST_SECONDS)
        self._at = now
        debt = -self._saved
        self._saved -= nbytes
        return max(0.0, debt / self._rate)
