"""What happened to blocks lately, so that a miss can be explained: a ring of small events, of fixed size.

An event takes 27 bytes, and some microseconds for a whole batch of keys; when the ring is full the oldest are overwritten. It is
kept in memory only, so it begins with the node. Blocks are told apart by half of their key (64 bits).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import numpy.typing as npt

from kvstore.identity import KEY_BYTES, BlockKey
from kvstore.policy.admission import Reason
from kvstore.tiers.base import Medium

EVENTS = 1 << 19
"""14 MB when full. A node that stores 100 blocks a second in three tiers fills it in about half an hour."""

PLANS_REMEMBERED = 256

EVENTS_SHOWN = 8
"""Of one block, the latest."""


class What(IntEnum):
    """Kinds of events."""

    SAVED = 1
    """An engine saved it: it is in host memory."""
    FETCHED = 2
    """Brought to host memory; the event names the tier it came from."""
    WRITTEN = 3
    """Written down to a slower tier."""
    NOT_ADMITTED = 4
    """Admission kept it from a tier; the event has the rule."""
    NO_ROOM = 5
    """The tier could make no room for it."""
    QUEUE_FULL = 6
    """Too much was waiting to be written to the tier already."""
    WRITE_FAILED = 7
    EVICTED = 8
    """Given up to make room; the event may name the block that wanted it."""
    DELETED = 9
    """By an operator or a job."""
    GONE = 10
    """The medium did not have it any more: somebody else deleted it."""
    CORRUPT = 11
    """Read, and did not verify."""
    UNAVAILABLE = 12
    """The tier did not answer."""
    DEADLINE = 13
    """Not there when an engine's patience ended."""
    RECOMPUTED = 14
    """The engine's planner preferred to compute it; the event has both estimates."""
    BURIED = 15
    """Deleted for good by a tombstone of the region."""


MEDIA = tuple(Medium)
REASONS = tuple(Reason)


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened to a block."""

    at: float
    """Seconds since the epoch."""
    what: What
    medium: Medium | None = None
    reason: Reason | None = None
    """Of admission."""
    newcomer: bytes = b""
    """First half of the key of the block that an evicted one made room for."""
    estimates: tuple[float, float] | None = None
    """Seconds to load and seconds to compute, as the planner saw them."""


BAD_REMEMBERED = 50
"""Bad blocks, the latest."""

Listener = Callable[[What, Sequence[BlockKey], Medium | None], None]


class History:
    """The ring. Owned by the node's event loop."""

    def __init__(self, events: int = EVENTS) -> None:
        self.listener: Listener | None = None
        """Told of everything that is recorded, at once; must not block or raise."""
        self.bad: deque[tuple[float, BlockKey, Medium | None]] = deque(maxlen=BAD_REMEMBERED)
        """Blocks that did not verify: when, which, and in which tier. Latest last."""
        self._size = events
        self._written = 0
        self._began = time.time()
        self._planned: dict[tuple[BlockKey, BlockKey, int], int] = {}
        """Where the latest plans to recompute are in the ring, by the blocks that they are about."""
        self._word: npt.NDArray[np.uint64] = np.zeros(events, dtype=np.uint64)
        self._at: npt.NDArray[np.float64] = np.zeros(events)
        self._what: npt.NDArray[np.uint8] = np.zeros(events, dtype=np.uint8)
        self._medium: npt.NDArray[np.int8] = np.zeros(events, dtype=np.int8)
        self._reason: npt.NDArray[np.int8] = np.zeros(events, dtype=np.int8)
        self._detail: npt.NDArray[np.uint64] = np.zeros(events, dtype=np.uint64)
        """The newcomer, or two 32-bit floats."""

    def __len__(self) -> int:
        return min(self._written, self._size)

    @property
    def since(self) -> float:
        """From when on nothing is forgotten; seconds since the epoch."""
        return float(self._at[self._written % self._size]) if self._written > self._size else self._began

    def record(
        self,
        what: What,
        keys: Sequence[BlockKey],
        medium: Medium | None = None,
        reason: Reason | None = None,
        newcomer: BlockKey | None = None,
        estimates: tuple[float, float] | None = None,
    ) -> None:
        """The same happened to each of ``keys``, now."""
        keys = keys[-self._size :]
        if not keys:
            return
        if self.listener is not None:
            self.listener(what, keys, medium)
        if what is What.CORRUPT:
            self.bad.extend((time.time(), key, medium) for key in keys)
        place = self._places(what, keys)
        self._word[place] = _words(keys)
        self._at[place] = time.time()
        self._what[place] = what
        self._medium[place] = -1 if medium is None else MEDIA.index(medium)
        self._reason[place] = -1 if reason is None else REASONS.index(reason)
        if estimates is not None:
            self._detail[place] = np.array(estimates, dtype="<f4").view(np.uint64)[0]
        else:
            self._detail[place] = 0 if newcomer is None else _words([newcomer])[0]

    def _places(self, what: What, keys: Sequence[BlockKey]) -> npt.NDArray[np.intp]:
        """Where in the ring to write: behind the last event, or over what was said before.

        An engine that cannot admit a request yet asks again and again, and gets the same plan: that is one event.
        """
        start = self._written
        if what is What.RECOMPUTED:
            said = keys[0], keys[-1], len(keys)
            start = self._planned.pop(said, start)
            if start + self._size < self._written + len(keys):  # overwritten meanwhile
                start = self._written
            self._planned[said] = start
            if len(self._planned) > PLANS_REMEMBERED:
                del self._planned[next(iter(self._planned))]
        if start == self._written:
            self._written += len(keys)
        return np.arange(start, start + len(keys)) % self._size

    def evicted(self, medium: Medium, keys: Sequence[BlockKey], newcomer: BlockKey | None) -> None:
        """A tier gave blocks up; see ``kvstore.tiers.base.Tier.on_evict``."""
        self.record(What.EVICTED, keys, medium, newcomer=newcomer)

    def of(self, keys: Sequence[BlockKey]) -> list[list[Event]]:
        """For each key the latest ``EVENTS_SHOWN`` events, oldest first. A pass over the ring: see ``copy``."""
        if not keys:
            return []
        words = _words(keys)
        wanted = np.unique(words)
        ring = self._word[: len(self)]
        near = np.searchsorted(wanted, ring).clip(max=len(wanted) - 1)
        found = np.flatnonzero(wanted[near] == ring)
        oldest_first = found[np.argsort((found - self._written) % self._size)]
        by_word: dict[int, deque[int]] = {word: deque(maxlen=EVENTS_SHOWN) for word in wanted.tolist()}
        for place, word in zip(oldest_first.tolist(), ring[oldest_first].tolist(), strict=True):
            by_word[word].append(place)
        return [[self._event(at) for at in by_word[word]] for word in words.tolist()]

    def copy(self) -> History:
        """As it is now, for another thread: searching a full ring takes some 50 ms, copying it a few."""
        copied = copy(self)
        for column in ("_word", "_at", "_what", "_medium", "_reason", "_detail"):
            setattr(copied, column, getattr(self, column)[: len(self)].copy())
        return copied

    def _event(self, place: int) -> Event:
        what = What(int(self._what[place]))
        medium, reason = int(self._medium[place]), int(self._reason[place])
        detail = self._detail[place : place + 1]
        load, compute = detail.view("<f4").tolist()
        return Event(
            at=float(self._at[place]),
            what=what,
            medium=None if medium < 0 else MEDIA[medium],
            reason=None if reason < 0 else REASONS[reason],
            newcomer=detail.tobytes() if what is What.EVICTED and detail[0] else b"",
            estimates=(load, compute) if what is What.RECOMPUTED else None,
        )


def _words(keys: Sequence[BlockKey]) -> npt.NDArray[np.uint64]:
    """The first 8 bytes of each key."""
    return np.frombuffer(b"".join(keys), dtype="<u8")[:: KEY_BYTES // 8]
