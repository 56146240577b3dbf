"""Counting many things in little memory. Keys are block keys: output of a keyed hash, so their bits need no second one.

* ``CountMin`` counts everything a little too high: by at most ``e * total / width``, but for one key in ``exp(depth)``.
* ``HeavyHitters`` (space-saving) holds the largest counts by name: each too high by at most its ``error``, and every key whose
  true count exceeds ``total / capacity`` is in it.

Both merge with one of the same shape and turn into plain values for msgpack.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kvstore.identity import KEY_BYTES, BlockKey

DEPTH = 4
_MAX_WIDTH = 1 << 24
_MAX_CAPACITY = 1 << 20


class CountMin:
    """A count-min sketch of weights, shape (4, width). About 16 bytes x width."""

    def __init__(self, width: int) -> None:
        """``width`` is rounded up to a power of two."""
        self.width = 1 << (max(2, width) - 1).bit_length()
        self.cells: npt.NDArray[np.float32] = np.zeros((DEPTH, self.width), dtype=np.float32)

    def add(self, keys: Sequence[BlockKey], weight: float) -> None:
        cells = self._cells(keys)
        for row in range(DEPTH):
            np.add.at(self.cells[row], cells[row], np.float32(weight))

    def estimate(self, keys: Sequence[BlockKey]) -> npt.NDArray[np.float64]:
        """Upper bounds of the keys' sums."""
        cells = self._cells(keys)
        sums: npt.NDArray[np.float64] = self.cells[np.arange(DEPTH)[:, None], cells].min(axis=0).astype(np.float64)
        return sums

    def merge(self, other: CountMin, factor: float = 1.0) -> None:
        """Add the sums of another sketch of the same width, times ``factor``."""
        if other.width != self.width:
            raise ValueError(f"sketches of width {self.width} and {other.width} do not merge")
        self.cells += other.cells * np.float32(factor)

    def multiply(self, factor: float) -> None:
        self.cells *= np.float32(factor)

    def _cells(self, keys: Sequence[BlockKey]) -> npt.NDArray[np.intp]:
        words = np.frombuffer(b"".join(keys), dtype="<u4").reshape(len(keys), KEY_BYTES // 4)
        return (words & np.uint32(self.width - 1)).T.astype(np.intp)

    def pack(self) -> bytes:
        return self.cells.astype("<f4").tobytes()

    @classmethod
    def unpack(cls, data: bytes) -> CountMin:
        """Raises ValueError when ``data`` is no packed sketch."""
        width, rest = divmod(len(data), 4 * DEPTH)
        if rest or not 2 <= width <= _MAX_WIDTH or width & (width - 1):
            raise ValueError(f"{len(data)} bytes are no count-min sketch")
        cells = np.frombuffer(data, dtype="<f4").reshape(DEPTH, width).copy()
        if not np.isfinite(cells).all() or (cells < 0).any():
            raise ValueError("a count-min sketch with impossible sums")
        sketch = cls(width)
        sketch.cells = cells
        return sketch


@dataclass(slots=True)
class Hitter:
    """A key's sum, and by how much that may be too high."""

    sum: float
    error: float


class HeavyHitters:
    """The largest sums, by key (Metwally's space-saving, with weights)."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.hitters: dict[BlockKey, Hitter] = {}
        self._heap: list[tuple[float, BlockKey]] = []
        """Each key once, with a sum that was its own at some time: never more than it is now."""

    def add(self, key: BlockKey, weight: float, before: float | None = None) -> BlockKey | None:
        """Count; returns the key that had to make room.

        ``before``: an upper bound of what a new key had so far. None: the stream is complete, so the bound is the sum of the
        key that makes room.
        """
        hitter = self.hitters.get(key)
        if hitter is not None:
            hitter.sum += weight
            return None
        evicted, floor = None, 0.0
        if len(self.hitters) >= self.capacity:
            evicted, floor = self._pop_least()
        floor = floor if before is None else before
        self.hitters[key] = Hitter(floor + weight, floor)
        heapq.heappush(self._heap, (floor + weight, key))
        return evicted

    def merge(self, other: Mapping[BlockKey, Hitter], full: bool, factor: float = 1.0) -> list[BlockKey]:
        """Take in another node's hitters, their sums times ``factor``; returns the keys that were dropped.

        ``full``: the other had no room left, so a key that it does not name may have had up to its least sum.
        """
        theirs = min((hitter.sum for hitter in other.values()), default=0.0) * factor if full else 0.0
        ours = min((hitter.sum for hitter in self.hitters.values()), default=0.0) if self.full else 0.0
        merged = {}
        for key in self.hitters.keys() | other.keys():
            mine = self.hitters.get(key) or Hitter(ours, ours)
            yours = other.get(key)
            scaled = Hitter(yours.sum * factor, yours.error * factor) if yours else Hitter(theirs, theirs)
            merged[key] = Hitter(mine.sum + scaled.sum, mine.error + scaled.error)
        ranked = sorted(merged, key=lambda key: (-merged[key].sum, key))
        self.hitters = {key: merged[key] for key in ranked[: self.capacity]}
        self._reheap()
        return ranked[self.capacity :]

    @property
    def full(self) -> bool:
        return len(self.hitters) >= self.capacity

    def multiply(self, factor: float) -> None:
        for hitter in self.hitters.values():
            hitter.sum *= factor
            hitter.error *= factor
        self._reheap()

    def _pop_least(self) -> tuple[BlockKey, float]:
        while True:
            known, key = self._heap[0]
            current = self.hitters[key].sum
            if current == known:
                heapq.heappop(self._heap)
                del self.hitters[key]
                return key, current
            heapq.heapreplace(self._heap, (current, key))

    def _reheap(self) -> None:
        self._heap = [(hitter.sum, key) for key, hitter in self.hitters.items()]
        heapq.heapify(self._heap)

    def pack(self) -> list[list[Any]]:
        return [[key, hitter.sum, hitter.error] for key, hitter in self.hitters.items()]

    @classmethod
    def unpack(cls, rows: Iterable[Sequence[Any]], capacity: int) -> HeavyHitters:
        """Raises ValueError for rows that ``pack`` cannot have made."""
        if not 0 < capacity <= _MAX_CAPACITY:
            raise ValueError(f"a capacity of {capacity} heavy hitters")
        hitters = cls(capacity)
        for key, total, error in rows:
            if not isinstance(key, bytes) or len(key) != KEY_BYTES or len(hitters.hitters) >= capacity:
                raise ValueError("no heavy hitters")
            if not (math.isfinite(total) and 0 <= error <= total):
                raise ValueError("a heavy hitter with an impossible sum")
            hitters.hitters[BlockKey(key)] = Hitter(float(total), float(error))
        hitters._reheap()
        return hitters
