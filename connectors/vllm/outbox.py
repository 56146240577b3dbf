"""What a worker has to tell the scheduler's side: put down by any of its threads, sent with the results of a step."""

from __future__ import annotations

import threading

from connectors.vllm.plan import Told


class Outbox:
    """Of one rank. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._told = Told()

    def tell(self, told: Told) -> None:
        """Send this with the results of the next step."""
        with self._lock:
            self._told = self._told.aggregate(told)

    def take(self) -> Told | None:
        """All that was told since the last call; None if nothing was."""
        with self._lock:
            told, self._told = self._told, Told()
        return None if told == Told() else told
