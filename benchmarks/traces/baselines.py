"""The eviction policies of the literature, as small caches of block numbers.

Each holds at most ``capacity`` blocks. ``access`` is called for every block of a request, tail first, after the hits of
the request were counted; it inserts the block when it is not there.
"""

from __future__ import annotations

import heapq
import math
from abc import ABC, abstractmethod
from collections import OrderedDict, deque


class Baseline(ABC):
    """A cache of block numbers."""

    name: str

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity

    @abstractmethod
    def __contains__(self, block: object) -> bool: ...

    @abstractmethod
    def access(self, block: int, depth: int, now: float) -> None:
        """Use a block, inserting it at the expense of others when it is missing."""


class LRU(Baseline):
    name = "lru"

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self._order: OrderedDict[int, None] = OrderedDict()

    def __contains__(self, block: object) -> bool:
        return block in self._order

    def access(self, block: int, depth: int, now: float) -> None:
        if block in self._order:
            self._order.move_to_end(block)
            return
        if len(self._order) >= self.capacity:
            self._order.popitem(last=False)
        self._order[block] = None


class _Scored(Baseline):
    """Gives up the lowest score, deepest block first. A score changes only when its block is used."""

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self._scores: dict[int, tuple[float, int, int]] = {}
        self._heap: list[tuple[tuple[float, int, int], int]] = []

    def __contains__(self, block: object) -> bool:
        return block in self._scores

    @abstractmethod
    def score(self, block: int, now: float) -> tuple[float, int]:
        """Score after a use, and what decides among equals before depth does."""

    def forget(self, block: int) -> None:
        """The block was evicted."""

    def access(self, block: int, depth: int, now: float) -> None:
        if block not in self._scores and len(self._scores) >= self.capacity:
            while True:
                entry, victim = heapq.heappop(self._heap)
                if self._scores.get(victim) == entry:
                    break
            del self._scores[victim]
            self.forget(victim)
        score, tie = self.score(block, now)
        self._scores[block] = entry = (score, tie, -depth)
        heapq.heappush(self._heap, (entry, block))


class LFU(_Scored):
    """Uses since the block was inserted; least recently used among equals."""

    name = "lfu"

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self._counts: dict[int, int] = {}
        self._clock = 0

    def score(self, block: int, now: float) -> tuple[float, int]:
        self._clock += 1
        count = self._counts[block] = self._counts.get(block, 0) + 1
        return float(count), self._clock

    def forget(self, block: int) -> None:
        del self._counts[block]


class DecayedCount(_Scored):
    """log2 of a count with a half life of 10 minutes, in a form that does not change with time. Counts outlive the block."""

    name = "decayed count"
    half_life = 600.0

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self._counts: dict[int, tuple[float, float]] = {}

    def score(self, block: int, now: float) -> tuple[float, int]:
        count, then = self._counts.get(block, (0.0, now))
        count = count * 2.0 ** ((then - now) / self.half_life) + 1.0
        self._counts[block] = count, now
        return math.log2(count) + now / self.half_life, 0


class S3FIFO(Baseline):
    """Yang et al., SOSP 2023: a small FIFO of 10%, left for the main one after more than one use; a main FIFO with second
    chances; a ghost FIFO as long as the cache."""

    name = "s3-fifo"

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self._small_size = max(1, capacity // 10)
        self._small: deque[int] = deque()
        self._main: deque[int] = deque()
        self._ghost: OrderedDict[int, None] = OrderedDict()
        self._uses: dict[int, int] = {}

    def __contains__(self, block: object) -> bool:
        return block in self._uses

    def access(self, block: int, depth: int, now: float) -> None:
        if block in self._uses:
            self._uses[block] = min(3, self._uses[block] + 1)
            return
        while len(self._uses) >= self.capacity:
            self._evict()
        self._uses[block] = 0
        if block in self._ghost:
            del self._ghost[block]
            self._main.append(block)
        else:
            self._small.append(block)

    def _evict(self) -> None:
        if len(self._small) > self._small_size or not self._main:
            block = self._small.popleft()
            if self._uses[block] > 1:
                self._uses[block] = 0
                self._main.append(block)
                return
            del self._uses[block]
            self._ghost[block] = None
            if len(self._ghost) > self.capacity:
                self._ghost.popitem(last=False)
            return
        block = self._main.popleft()
        if self._uses[block]:
            self._uses[block] -= 1
            self._main.append(block)
        else:
            del self._uses[block]


class SIEVE(Baseline):
    """Zhang et al., NSDI 2024: one FIFO, a visited bit, a hand that moves from old to new."""

    name = "sieve"

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self._visited: dict[int, bool] = {}
        self._newer: dict[int, int] = {}
        self._older: dict[int, int] = {}
        self._head = self._tail = self._hand = -1

    def __contains__(self, block: object) -> bool:
        return block in self._visited

    def access(self, block: int, depth: int, now: float) -> None:
        if block in self._visited:
            self._visited[block] = True
            return
        if len(self._visited) >= self.capacity:
            self._evict()
        self._visited[block] = False
        self._older[block], self._newer[block] = self._head, -1
        if self._head >= 0:
            self._newer[self._head] = block
        else:
            self._tail = block
        self._head = block

    def _evict(self) -> None:
        hand = self._hand if self._hand >= 0 else self._tail
        while self._visited[hand]:
            self._visited[hand] = False
            hand = self._newer[hand] if self._newer[hand] >= 0 else self._tail
        older, newer = self._older.pop(hand), self._newer.pop(hand)
        self._hand = newer
        if older >= 0:
            self._newer[older] = newer
        else:
            self._tail = newer
        if newer >= 0:
            self._older[newer] = older
        else:
            self._head = older
        del self._visited[hand]


class ARC(Baseline):
    """Megiddo and Modha, FAST 2003."""

    name = "arc"

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self._target = 0.0
        self._once: OrderedDict[int, None] = OrderedDict()
        self._often: OrderedDict[int, None] = OrderedDict()
        self._once_ghost: OrderedDict[int, None] = OrderedDict()
        self._often_ghost: OrderedDict[int, None] = OrderedDict()

    def __contains__(self, block: object) -> bool:
        return block in self._once or block in self._often

    def access(self, block: int, depth: int, now: float) -> None:
        once, often, once_ghost, often_ghost = self._once, self._often, self._once_ghost, self._often_ghost
        if block in once:
            del once[block]
            often[block] = None
        elif block in often:
            often.move_to_end(block)
        elif block in once_ghost:
            self._target = min(self.capacity, self._target + max(len(often_ghost) / len(once_ghost), 1.0))
            self._replace(False)
            del once_ghost[block]
            often[block] = None
        elif block in often_ghost:
            self._target = max(0.0, self._target - max(len(once_ghost) / len(often_ghost), 1.0))
            self._replace(True)
            del often_ghost[block]
            often[block] = None
        else:
            if len(once) + len(once_ghost) >= self.capacity:
                if len(once) < self.capacity:
                    once_ghost.popitem(last=False)
                    self._replace(False)
                else:
                    once.popitem(last=False)
            else:
                total = len(once) + len(often) + len(once_ghost) + len(often_ghost)
                if total >= 2 * self.capacity:
                    often_ghost.popitem(last=False)
                self._replace(False)
            once[block] = None

    def _replace(self, in_often_ghost: bool) -> None:
        if len(self._once) + len(self._often) < self.capacity:
            return
        size = len(self._once)
        if size and (size > self._target or (in_often_ghost and size == self._target) or not self._often):
            self._once_ghost[self._once.popitem(last=False)[0]] = None
        else:
            self._often_ghost[self._often.popitem(last=False)[0]] = None


class WTinyLFU(Baseline):
    """Einziger et al., TOS 2017: a window of 1%, a segmented LRU, admission by an aged count (kept exactly here, where the
    original approximates it by a sketch)."""

    name = "w-tinylfu"

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self._window_size = max(1, capacity // 100)
        self._main_size = max(1, capacity - self._window_size)
        self._protected_size = self._main_size * 4 // 5
        self._window: OrderedDict[int, None] = OrderedDict()
        self._probation: OrderedDict[int, None] = OrderedDict()
        self._protected: OrderedDict[int, None] = OrderedDict()
        self._counts: dict[int, int] = {}
        self._samples = 0

    def __contains__(self, block: object) -> bool:
        return block in self._window or block in self._probation or block in self._protected

    def access(self, block: int, depth: int, now: float) -> None:
        self._count(block)
        if block in self._window:
            self._window.move_to_end(block)
        elif block in self._protected:
            self._protected.move_to_end(block)
        elif block in self._probation:
            del self._probation[block]
            self._protected[block] = None
            if len(self._protected) > self._protected_size:
                self._probation[self._protected.popitem(last=False)[0]] = None
        else:
            self._window[block] = None
            if len(self._window) > self._window_size:
                self._admit(self._window.popitem(last=False)[0])

    def _admit(self, candidate: int) -> None:
        if len(self._probation) + len(self._protected) < self._main_size:
            self._probation[candidate] = None
            return
        victims = self._probation or self._protected
        victim = next(iter(victims))
        if self._counts.get(candidate, 0) > self._counts.get(victim, 0):
            del victims[victim]
            self._probation[candidate] = None

    def _count(self, block: int) -> None:
        self._counts[block] = self._counts.get(block, 0) + 1
        self._samples += 1
        if self._samples >= 10 * self.capacity:
            self._samples //= 2
            self._counts = {key: count // 2 for key, count in self._counts.items() if count > 1}


ONLINE: tuple[type[Baseline], ...] = (LRU, LFU, ARC, S3FIFO, SIEVE, WTinyLFU, DecayedCount)
