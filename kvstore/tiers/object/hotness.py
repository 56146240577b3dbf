"""What a node tells its region of the prompts that are asked for most: one small object, overwritten now and then.

It names the deepest block of each hot prefix; the ancestors are found through the blocks' headers. Scores decay with time, so snapshots of different age are brought to one moment before they are added up.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Self

import msgpack
import numpy as np

from kvstore.errors import ProtocolError
from kvstore.identity import KEY_BYTES, BlockKey
from kvstore.policy.hotness import Hotness

MAX_BLOCKS = 200_000
"""20 bytes each: 4 MB."""
MAX_SNAPSHOT_BYTES = MAX_BLOCKS * 20 + 4096

_VERSION = 1


@dataclass(frozen=True, slots=True)
class HotnessSnapshot:
    """A node's hottest prefixes at one time."""

    taken: float
    """Seconds since the epoch."""
    half_life: float
    """Seconds in which a score falls to half."""
    scores: Mapping[BlockKey, float]
    """Prefill seconds that each block of the prefix is expected to save, by the key of the deepest; never negative."""

    @classmethod
    def of(cls, hotness: Hotness, now: float, prefill_seconds: Callable[[int], float], most: int = 4096) -> Self:
        """The best ``most`` prefixes; ``prefill_seconds`` as for ``Hotness.top``."""
        chains = hotness.top(most, now, prefill_seconds)
        return cls(now, hotness.half_life, {c.key: c.hits * c.seconds_saved / c.extent.blocks for c in chains})

    def pack(self) -> bytes:
        """At most ``MAX_BLOCKS``; beyond, the coldest are left out."""
        hottest = sorted(self.scores.items(), key=lambda item: -item[1])[:MAX_BLOCKS]
        keys = b"".join(key for key, _ in hottest)
        scores = np.array([score for _, score in hottest], dtype="<f4").tobytes()
        packed: bytes = msgpack.packb([_VERSION, self.taken, self.half_life, keys, scores])
        return packed

    @classmethod
    def unpack(cls, raw: bytes) -> HotnessSnapshot:
        """Read what another process wrote. Raises ProtocolError."""
        if len(raw) > MAX_SNAPSHOT_BYTES:
            raise ProtocolError(f"a snapshot of {len(raw)} bytes is beyond the bound of {MAX_SNAPSHOT_BYTES}")
        try:
            match msgpack.unpackb(raw):
                case [int(version), float(taken), float(half_life), bytes(keys), bytes(scores)]:
                    values = np.frombuffer(scores, dtype="<f4")
                case _:
                    raise ProtocolError("not a hotness snapshot")
        except (ValueError, TypeError, msgpack.UnpackException) as error:
            raise ProtocolError(f"not a hotness snapshot: {error}") from None
        if version != _VERSION:
            raise ProtocolError(f"hotness snapshot of version {version}, not {_VERSION}")
        sound = np.all(np.isfinite(values) & (values >= 0)) and math.isfinite(taken) and half_life > 0
        if not sound or len(keys) != KEY_BYTES * len(values):
            raise ProtocolError("a hotness snapshot with impossible values")
        cut = (BlockKey(keys[i : i + KEY_BYTES]) for i in range(0, len(keys), KEY_BYTES))
        return cls(taken, half_life, dict(zip(cut, values.tolist(), strict=True)))


def merged(snapshots: Iterable[HotnessSnapshot], now: float) -> dict[BlockKey, float]:
    """Scores of all nodes together, as of ``now``."""
    total: dict[BlockKey, float] = {}
    for snapshot in snapshots:
        decay = 0.5 ** (max(0.0, now - snapshot.taken) / snapshot.half_life)
        for key, score in snapshot.scores.items():
            total[key] = total.get(key, 0.0) + score * decay
    return total
