"""How fast a tier delivers, learnt as it runs: seconds = latency + bytes / bandwidth, the bytes ahead in its queue included.

A tier that has become slow is known by what has not come yet, before anything comes late: while a transfer is overdue, all behind
it are expected to come as much later. Not so when one that began later has come: then it is a straggler that others pass. What
came far too late may have been an accident or the first of many: until another comes in time, half of that is expected again.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvstore.policy.fit import OnlineFit
from kvstore.policy.planner import Speed
from kvstore.tiers.base import Medium

MEMORY = 40.0
"""Timings. A disk or a network changes within seconds, and an engine asks for several transfers a second."""

CHANGE = 5
"""Timings. A window gives two, so this is three windows of an ill-used tier, and one that was unlucky is none."""

FAR = 2.0
"""Times what was expected: of a transfer that came so late the next one will as likely come as late as in time."""

PRIORS = {
    Medium.HOST: (0.002, 1 / 10e9),
    Medium.DISK: (0.001, 1 / 2e9),
    Medium.OBJECT: (0.03, 1 / 1e9),
    Medium.REMOTE: (0.1, 1 / 1e9),
}
"""Seconds, and seconds per byte: only their ratio is used, until transfers of several sizes tell the two apart."""


class SpeedMeter:
    """One tier. Owned by the node's event loop."""

    def __init__(self, medium: Medium, window: int) -> None:
        """``window``: blocks that are asked for together."""
        self._fit = OnlineFit(PRIORS[medium], MEMORY, CHANGE)
        self._window = window
        self._under_way: dict[int, float] = {}
        """When transfers are expected."""
        self._begun = self._passed = 0
        """The last that began, and the last of those that ended."""
        self._late = 0.0
        """Seconds by which the latest timing was beyond what was expected, if it was far beyond."""

    @property
    def known(self) -> bool:
        return self._fit.observations > 0

    @property
    def spread(self) -> float:
        """Usual relative error."""
        return self._fit.spread

    def pack(self) -> list[Any]:
        """What was learnt, as plain values."""
        return self._fit.pack()

    def load(self, packed: Any) -> None:
        """What ``pack`` gave. Raises ValueError for what it cannot have given."""
        self._fit.load(packed)

    def observe(self, nbytes: int, seconds: float) -> None:
        """So many bytes came in so many seconds: those asked for, and those that were ahead of them."""
        if nbytes > 0:
            self._learn(nbytes, seconds, FAR)

    def at_least(self, nbytes: int, seconds: float) -> None:
        """After so many seconds not even these bytes had come."""
        if nbytes > 0 and self._fit.seconds((1.0, nbytes)) < seconds:
            self._learn(nbytes, seconds, 1.0)

    def begin(self, nbytes: int, now: float) -> int:
        """So many bytes are on their way, those ahead of them included; a name for ``end``."""
        self._begun += 1
        if self.known:
            self._under_way[self._begun] = now + self._fit.seconds((1.0, nbytes)) * self._fit.mean
        return self._begun

    def end(self, transfer: int) -> None:
        """They came, or never will."""
        self._under_way.pop(transfer, None)
        self._passed = max(self._passed, transfer)

    def describe(self) -> Mapping[str, float]:
        """For people: what was learnt."""
        speed = self.speed()
        return {
            "transfers": self._fit.observations,
            "latency_seconds": speed.latency,
            "bytes_per_second": speed.bandwidth,
            "spread": self.spread,
        }

    def speed(self, queued_bytes: int = 0, now: float | None = None) -> Speed:
        """What is to be expected behind so many bytes: the mean of timings that scatter, some far, which is more than usual.

        What is overdue at the time ``now`` counts as so many bytes more.
        """
        latency, per_byte = self._fit.coefficients
        mean = self._fit.mean
        bandwidth = 1 / max(per_byte * mean, 1e-15)
        overdue = 0.0 if now is None else max(self._overdue(now), self._late / 2)
        return Speed(latency * mean, bandwidth, self._window, queued_bytes + int(overdue * bandwidth))

    def _learn(self, nbytes: int, seconds: float, far: float) -> None:
        expected = self._fit.seconds((1.0, nbytes)) * self._fit.mean
        self._late = seconds - expected if self.known and seconds > far * expected else 0.0
        self._fit.observe((1.0, nbytes), seconds)

    def _overdue(self, now: float) -> float:
        """Seconds since some transfer was expected."""
        late = (now - due for transfer, due in self._under_way.items() if transfer > self._passed)
        return max(0.0, max(late, default=0.0))
