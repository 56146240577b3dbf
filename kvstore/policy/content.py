"""What a prompt consists of, wherever in the prompt it stands: keyed hashes of pieces that its content cuts.

A piece begins where the hash of the next ``GRAM`` tokens is the least among its ``REACH`` neighbours on both sides (local-minimum
chunking, the selection rule of winnowing: Schleimer, Wilkerson and Aiken, SIGMOD 2003). So the same text is cut in the same
way whatever comes before it, but for its first and last piece. Pieces have more than ``REACH`` tokens, 33 on average.

Hashes are keyed with a secret: without it nobody can test whether a text is in a prompt.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

GRAM = 8
REACH = 16  # a power of two

_ODD = np.uint64(0x9E3779B97F4A7C15)
_MIX = np.uint64(0xBF58476D1CE4E5B9)

Words = npt.NDArray[np.uint64]
Starts = npt.NDArray[np.uint32]


@dataclass(frozen=True, slots=True)
class Pieces:
    """The pieces of a prompt, in order. Arrays of one length."""

    starts: Starts
    """First token of each piece; 0 for the first."""
    hashes: Words
    tokens: int
    """Of the whole prompt."""

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Tokens of each piece."""
        return np.diff(self.starts.astype(np.int64), append=self.tokens)


def pieces(tokens: Sequence[int] | npt.NDArray[np.uint32], secret: bytes) -> Pieces:
    """Cut and hash a prompt. 4,000 tokens take about 0.3 ms, 128,000 some 15 ms; may be called in any thread."""
    ids = np.ascontiguousarray(tokens, dtype="<u4")
    key = hashlib.blake2b(key=secret[:64], digest_size=32, person=b"kvstore.content").digest()
    starts = _starts(ids, int.from_bytes(key[:8], "little"))
    keyed, data = hashlib.blake2b(key=key, digest_size=8), ids.data.cast("B")
    digests = []
    for start, end in pairwise([*starts.tolist(), len(ids)]):
        hasher = keyed.copy()
        hasher.update(data[4 * start : 4 * end])
        digests.append(hasher.digest())
    return Pieces(starts, np.frombuffer(b"".join(digests), dtype="<u8"), len(ids))


def _starts(ids: npt.NDArray[np.uint32], key: int) -> Starts:
    """Where pieces begin. Empty for no tokens."""
    if not len(ids):
        return np.zeros(0, dtype=np.uint32)
    places = len(ids) - GRAM + 1
    if places < 3:
        return np.zeros(1, dtype=np.uint32)
    grams = _grams(ids, key, places)
    worst = np.full(REACH, np.iinfo(np.uint64).max, dtype=np.uint64)
    least = np.concatenate([worst, grams, worst])
    for step in (1 << power for power in range(REACH.bit_length() - 1)):
        least = np.minimum(least[:-step], least[step:])
    before, after = least[:places], least[REACH + 1 : REACH + 1 + places]
    inside = np.flatnonzero((grams < before) & (grams <= after))
    inside = inside[inside > 0]
    return np.concatenate([np.zeros(1, dtype=np.uint32), inside.astype(np.uint32)])


def _grams(ids: npt.NDArray[np.uint32], key: int, places: int) -> Words:
    words = (ids.astype(np.uint64) + np.uint64(1)) * _ODD
    words ^= words >> np.uint64(29)
    grams = np.full(places, key, dtype=np.uint64)
    for offset in range(GRAM):
        grams = grams * _MIX + words[offset : offset + places]
    grams ^= grams >> np.uint64(32)
    return grams * _ODD
