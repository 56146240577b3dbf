"""Which prompts are hot: decayed hits per chain, in bounded memory.

Every block of every request is counted in a count-min sketch. Where a request's chain stops being shared with others (its deepest
block with a second sighting) ends a *hot prefix*; those with most hits are held by name and counted exactly from then on,
system prompts as well as conversations that go on.

Sums decay without being rewritten: a use at ``now`` adds ``2 ** (now / half_life)`` of a unit that shrinks with time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import msgpack
import numpy as np
import numpy.typing as npt

from kvstore.identity import BlockKey
from kvstore.policy.sketch import CountMin, HeavyHitters

_VERSION = 1
_REBASE_AFTER = 32
"""Half lives after which sums are rescaled: 2**32 times a count is well inside a float32."""
_MAX_PACKED = 1 << 28


@dataclass(frozen=True, slots=True)
class Extent:
    """How long a prefix is, from the head of its chain."""

    blocks: int
    tokens: int
    bytes: int


@dataclass(frozen=True, slots=True)
class HotChain:
    """A prefix that is used often. ``key`` is its deepest block's; its ancestors belong to it."""

    key: BlockKey
    extent: Extent
    hits: float
    """Decayed."""
    error: float
    """By how much ``hits`` may be too high."""
    last_used: float
    """Seconds."""
    seconds_saved: float
    """Prefill of the whole prefix, once."""

    @property
    def score(self) -> float:
        """Prefill seconds saved per byte kept, over the whole chain."""
        return self.hits * self.seconds_saved / max(self.extent.bytes, 1)


class Hotness:
    """Hits by prefix. One per node; not thread-safe; ``merge`` adds what other nodes saw.

    Memory: 16 bytes x ``width`` and about 400 bytes x ``prefixes``.
    """

    def __init__(self, half_life: float = 3600.0, prefixes: int = 4096, width: int = 1 << 18) -> None:
        """``half_life`` in seconds. ``width`` should be some times the blocks that are used in a half life."""
        self.half_life = half_life
        self._counts = CountMin(width)
        self._hot = HeavyHitters(prefixes)
        self._about: dict[BlockKey, tuple[Extent, float]] = {}
        """Extent and last use of each hot prefix."""
        self._origin: float | None = None

    def observe(self, keys: Sequence[BlockKey], now: float, block_tokens: int, block_bytes: int) -> None:
        """A request asks for this chain, from its head; ``now`` in seconds since the epoch, the same on every node."""
        if not keys:
            return
        unit = self._unit(now)
        before = self._counts.estimate(keys)
        self._counts.add(keys, unit)
        hitters = self._hot.hitters
        for key in keys:
            if key in hitters:
                self._hot.add(key, unit)
                self._about[key] = self._about[key][0], now
        shared = np.flatnonzero(before > 0)
        if not len(shared):
            return
        blocks = int(shared[-1]) + 1
        end = keys[blocks - 1]
        if end not in hitters:
            dropped = self._hot.add(end, unit, before=float(before[blocks - 1]))
            if dropped is not None:
                del self._about[dropped]
            self._about[end] = Extent(blocks, blocks * block_tokens, blocks * block_bytes), now

    def hits(self, keys: Sequence[BlockKey], now: float) -> npt.NDArray[np.float64]:
        """Decayed hits of blocks, at most a little too high."""
        if not keys:
            return np.zeros(0)
        return self._counts.estimate(keys) / self._unit(now)

    def top(self, n: int, now: float, prefill_seconds: Callable[[int], float]) -> list[HotChain]:
        """The ``n`` prefixes with the highest score. ``prefill_seconds``: what a prefix of so many tokens costs."""
        unit = self._unit(now)
        chains = []
        for key, hitter in self._hot.hitters.items():
            extent, used = self._about[key]
            saved = prefill_seconds(extent.tokens)
            chains.append(HotChain(key, extent, hitter.sum / unit, hitter.error / unit, used, saved))
        return sorted(chains, key=lambda chain: (-chain.score, chain.key))[:n]

    def merge(self, other: Hotness) -> None:
        """Add what another node counted. Both must have the same half life and sketch width (else ValueError)."""
        if other.half_life != self.half_life:
            raise ValueError(f"half lives of {self.half_life} and {other.half_life} s do not merge")
        if other._origin is None:
            return
        self._unit(other._origin)
        assert self._origin is not None
        factor = 2.0 ** ((other._origin - self._origin) / self.half_life)
        self._counts.merge(other._counts, factor)
        dropped = set(self._hot.merge(other._hot.hitters, other._hot.full, factor))
        for key, (extent, used) in other._about.items():
            mine = self._about.get(key, (extent, used))
            self._about[key] = extent, max(used, mine[1])
        for key in dropped & self._about.keys():
            del self._about[key]

    def pack(self) -> bytes:
        """All of it, for a file or the catalog."""
        about = [
            [extent.blocks, extent.tokens, extent.bytes, used]
            for extent, used in (self._about[key] for key in self._hot.hitters)
        ]
        fields: list[Any] = [_VERSION, self.half_life, self._origin, self._counts.pack(), self._hot.capacity]
        packed: bytes = msgpack.packb([*fields, self._hot.pack(), about])
        return packed

    @classmethod
    def unpack(cls, data: bytes) -> Hotness:
        """Raises ValueError for bytes that ``pack`` cannot have made."""
        if len(data) > _MAX_PACKED:
            raise ValueError("too much for a hotness")
        try:
            version, half_life, origin, counts, capacity, hitters, about = msgpack.unpackb(data)
            if version != _VERSION or not 0 < half_life < 1e12 or len(hitters) != len(about):
                raise ValueError("not a hotness of this version")
            hotness = cls(half_life, 1, 2)
            hotness._origin = None if origin is None else float(origin)
            hotness._counts = CountMin.unpack(counts)
            hotness._hot = HeavyHitters.unpack(hitters, capacity)
            for key, (blocks, tokens, nbytes, used) in zip(hotness._hot.hitters, about, strict=True):
                hotness._about[key] = Extent(int(blocks), int(tokens), int(nbytes)), float(used)
        except (TypeError, OverflowError, msgpack.UnpackException) as error:
            raise ValueError("not a hotness") from error
        return hotness

    def _unit(self, now: float) -> float:
        """What one use at ``now`` adds to a sum."""
        if self._origin is None:
            self._origin = now
        if now - self._origin > _REBASE_AFTER * self.half_life:
            factor = 0.5 ** ((now - self._origin) / self.half_life)
            self._counts.multiply(factor)
            self._hot.multiply(factor)
            self._origin = now
        return float(2.0 ** ((now - self._origin) / self.half_life))
