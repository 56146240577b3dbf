"""What was seen of recent blocks, stored or not: a table of fixed size, indexed by the bits of the block key.

Keys are output of a keyed hash, so their bits place them evenly: no second hash is needed. A bucket has a few ways; a new block
takes the place of the one in its bucket that was seen longest ago. One call handles all blocks of a request.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kvstore.identity import KEY_BYTES

WAYS = 8

Slots = npt.NDArray[np.intp]
Words = npt.NDArray[np.uint64]


def words_of(keys: bytes) -> Words:
    """Two 64-bit words of each of some joined keys, shape (n, 2)."""
    return np.frombuffer(keys, dtype="<u8").reshape(-1, KEY_BYTES // 8)


@dataclass(frozen=True, slots=True)
class Displaced:
    """Blocks that were forgotten to make room."""

    slots: Slots
    seen: npt.NDArray[np.float64]
    kind: npt.NDArray[np.uint16]


class Sightings:
    """Per block the time it was seen last, how often (up to 255), and a small number that its owner chooses.

    21 bytes per entry. Not thread-safe. Slots are positions in the columns and stay valid until the next ``insert``.
    """

    def __init__(self, entries: int) -> None:
        """``entries`` is rounded up to a power of two."""
        self.buckets = max(1, 1 << (max(1, -(-entries // WAYS)) - 1).bit_length())
        size = self.buckets * WAYS
        self._tag = np.zeros((self.buckets, WAYS), dtype=np.uint64)
        self.seen: npt.NDArray[np.float64] = np.full(size, -np.inf)
        self.kind: npt.NDArray[np.uint16] = np.zeros(size, dtype=np.uint16)
        self.count: npt.NDArray[np.uint8] = np.zeros(size, dtype=np.uint8)

    def find(self, words: Words) -> Slots:
        """Slot of each block, -1 where it is not known. ``words`` as from ``words_of``."""
        bucket, tag = self._place(words)
        match = self._tag[bucket] == tag[:, None]
        slots: Slots = np.where(match.any(axis=1), bucket * WAYS + match.argmax(axis=1), -1)
        return slots

    def insert(self, words: Words, now: float) -> tuple[Slots, Displaced]:
        """Slots for blocks that ``find`` does not know, with a count of 0, seen now; and what they displaced.

        When more blocks than ways meet in one bucket, the last ones stay.
        """
        bucket, tag = self._place(words)
        by_bucket = np.argsort(bucket, kind="stable")
        ordered = bucket[by_bucket]
        starts = np.flatnonzero(np.diff(ordered, prepend=-1))
        rank = np.arange(len(ordered)) - np.repeat(starts, np.diff(np.append(starts, len(ordered))))
        oldest_first = np.argsort(self.seen.reshape(-1, WAYS)[ordered], axis=1, kind="stable")
        slots = np.empty(len(words), dtype=np.intp)
        slots[by_bucket] = ordered * WAYS + oldest_first[np.arange(len(ordered)), rank % WAYS]
        taken = np.unique(slots)
        taken = taken[np.isfinite(self.seen[taken])]
        displaced = Displaced(taken, self.seen[taken], self.kind[taken])
        self._tag.reshape(-1)[slots] = tag
        self.seen[slots] = now
        self.count[slots] = 0
        self.kind[slots] = 0
        return slots, displaced

    def pack(self) -> list[Any]:
        """Plain values for msgpack."""
        return [
            self._tag.astype("<u8", copy=False).tobytes(),
            self.seen.astype("<f8", copy=False).tobytes(),
            self.kind.astype("<u2", copy=False).tobytes(),
            self.count.tobytes(),
        ]

    @classmethod
    def unpack(cls, columns: Sequence[bytes], now: float) -> Sightings:
        """What ``pack`` made; times ahead of ``now`` become ``now``. Raises ValueError, TypeError for anything else."""
        tag, seen, kind, count = columns
        sightings = cls(len(count))
        size = sightings.buckets * WAYS
        if [len(tag), len(seen), len(kind), len(count)] != [8 * size, 8 * size, 2 * size, size]:
            raise ValueError("not a table of sightings")
        sightings._tag = np.frombuffer(tag, dtype="<u8").reshape(-1, WAYS).copy()
        sightings.seen = np.minimum(np.frombuffer(seen, dtype="<f8"), now)
        sightings.kind = np.frombuffer(kind, dtype="<u2").copy()
        sightings.count = np.frombuffer(count, dtype="u1").copy()
        if np.isnan(sightings.seen).any():
            raise ValueError("a table of sightings with impossible times")
        return sightings

    def _place(self, words: Words) -> tuple[Slots, Words]:
        bucket = (words[:, 0] & np.uint64(self.buckets - 1)).astype(np.intp)
        return bucket, words[:, 1] | np.uint64(1)  # 0 marks an unused way
