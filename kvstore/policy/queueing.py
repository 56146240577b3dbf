"""What a piece of work costs those who wait behind it: the engine and every tier are lines that one joins.

Work of s seconds makes each of those who wait now s seconds later, and those who will come while it still shows. For a server
that a share b of its time is busy, with u seconds of work before it and r requests a second, the latter is
r * s * (u + s / 2) / (1 - b) seconds of all of them together: the difference of the relative values of an M/G/1 queue, by which
dispatchers choose between servers (Krishnan 1990, "Joining the right queue"; Hyytiä et al. 2012, "Size- and state-aware
dispatching problem"). That is so for requests that come at random. Those that come evenly seldom meet, so nobody is later for
it: as waits do in general, the charge goes with the squared variation of the gaps (Kingman 1961, "The single server queue in
heavy traffic").
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt

REMEMBERED = 16
"""Requests over which a flow is averaged: a burst shows at once, one request does not."""

BUSIEST = 0.9
"""Nobody plans beyond this: a rate that is known from some dozen requests says no more than that there are too many."""


@dataclass(frozen=True, slots=True, order=True)
class Work:
    """What a server is to do."""

    comes: float
    """Seconds from now."""
    seconds: float


@dataclass(frozen=True, slots=True)
class Line:
    """Who waits for a server, and who will."""

    waiting: float = 0.0
    """Requests that wait now, behind the one that is decided about."""
    backlog: float = 0.0
    """Seconds of work before the server, theirs included."""
    rate: float = 0.0
    """Requests per second that come."""
    busy: float = 0.0
    """Share of its time that the server works, 0 to 1."""
    variation: float = 1.0
    """How much those who come wait for each other: 0 when they come evenly, 1 at random."""
    coming: tuple[Work, ...] = ()
    """Work that is on its way to the server, by when it comes."""

    def cost(self, work: Work) -> float:
        """Seconds until this work is done, and by which all others together are later."""
        position = bisect_left(self.coming, work)
        known = _done(self.coming)
        joined = _done((*self.coming[:position], work, *self.coming[position:]))
        unknown = self.variation * self.rate * (self.backlog + work.seconds / 2) / (1 - min(self.busy, BUSIEST))
        return joined - known + work.seconds * (self.waiting + unknown)


def _done(works: Sequence[Work]) -> float:
    """Sum of the times at which these are done, one after the other as they come."""
    now = total = 0.0
    for work in works:
        now = max(now, work.comes) + work.seconds
        total += now
    return total


EMPTY = Line()


class Flow:
    """How many requests come to a server, and how much work they are. One server; not thread-safe."""

    def __init__(self) -> None:
        self._last: float | None = None
        self._requests = self._work = self._span = 0.0
        self._gap_squares = 0.0

    def add(self, now: float, seconds: float) -> None:
        """A request with so many seconds of work."""
        keep = 1 - 1 / REMEMBERED
        if self._last is not None:
            gap = max(now - self._last, 0.0)
            self._requests = keep * self._requests + 1
            self._span = keep * self._span + gap
            self._gap_squares = keep * self._gap_squares + gap * gap
            self._work = keep * self._work + seconds
        self._last = now

    def rate(self, now: float) -> float:
        """Requests per second; fewer the longer none has come."""
        span = self._span + max(now - self._last, 0.0) if self._last is not None else 0.0
        return self._requests / span if span else 0.0

    def line(self, now: float, waiting: float = 0.0, ahead: float = 0.0, coming: Sequence[Work] = ()) -> Line:
        """The server's line with so many requests waiting, of usual size, behind ``ahead`` seconds of work and ``coming``."""
        usual = self._work / self._requests if self._requests else 0.0
        backlog = ahead + waiting * usual + sum(work.seconds for work in coming)
        rate = self.rate(now)
        return Line(waiting, backlog, rate, rate * usual, self._variation(), tuple(sorted(coming)))

    def _variation(self) -> float:
        """By the upper bound of what some dozen gaps say (two standard errors of a variance), and at most 1, for requests at
        random: only what is surely even is charged less."""
        square = self._span * self._span
        if not square > 0:
            return 1.0
        variance = max(self._gap_squares * self._requests / square - 1, 0.0)
        return min(variance * (1 + 2 * sqrt(2 / self._requests)), 1.0)
