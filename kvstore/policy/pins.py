"""Pins: an operator's or a job's wish to keep chains until a deadline. Wishes, not locks: they end by themselves, and a tier
that has nothing else to give up gives up pinned blocks too."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import msgpack
import numpy as np

from kvstore.identity import KEY_BYTES, BlockKey
from kvstore.index import BlockIndex, Rows
from kvstore.policy.eviction import EvictionPolicy, Values

LONGEST = 24 * 3600.0
"""Seconds that a pin may last. One that is still wanted is renewed; one that was forgotten ends."""

MOST = 1 << 20
"""Pinned blocks at most."""

_VERSION = 1


class Pins:
    """Deadlines by block. Not thread-safe."""

    def __init__(self, most: int = MOST) -> None:
        self._most = most
        self._until: dict[BlockKey, float] = {}

    def __len__(self) -> int:
        return len(self._until)

    def pin(self, keys: Iterable[BlockKey], until: float, now: float) -> int:
        """Keep blocks until a time (seconds, at most ``LONGEST`` from now); returns how many were taken.

        Name whole chains from their head: when there is room for no more, the rest is left out.
        """
        self.expire(now)
        until = min(until, now + LONGEST)
        taken = 0
        for key in keys:
            if until <= now or (len(self._until) >= self._most and key not in self._until):
                break
            self._until[key] = max(until, self._until.get(key, until))
            taken += 1
        return taken

    def unpin(self, keys: Iterable[BlockKey]) -> None:
        for key in keys:
            self._until.pop(key, None)

    def hold(self, keys: Sequence[BlockKey], now: float) -> list[bool]:
        """Whether each block is pinned now."""
        until = self._until
        return [until.get(key, now) > now for key in keys] if until else [False] * len(keys)

    def expire(self, now: float) -> None:
        """Forget pins that have ended."""
        self._until = {key: until for key, until in self._until.items() if until > now}

    def ends(self, keys: Sequence[BlockKey], now: float) -> list[float | None]:
        """When the pin of each block ends; None for those that are not pinned now."""
        return [until if (until := self._until.get(key, now)) > now else None for key in keys]

    def by_end(self, now: float) -> dict[float, list[BlockKey]]:
        """Pinned blocks by when their pin ends, in the order in which they were pinned: so a pinned chain stays together."""
        groups: dict[float, list[BlockKey]] = {}
        for key, until in self._until.items():
            if until > now:
                groups.setdefault(until, []).append(key)
        return groups

    def pack(self) -> bytes:
        """All of it, for a file: 24 bytes a pin."""
        until = np.fromiter(self._until.values(), dtype="<f8", count=len(self._until))
        packed: bytes = msgpack.packb([_VERSION, b"".join(self._until), until.tobytes()])
        return packed

    @classmethod
    def unpack(cls, data: bytes, now: float, most: int = MOST) -> Pins:
        """What ``pack`` made, less what has ended. Raises ValueError for bytes that it cannot have made."""
        if len(data) > most * (KEY_BYTES + 8) + 64:
            raise ValueError("too much for pins")
        try:
            version, keys, packed = msgpack.unpackb(data)
            if version != _VERSION:
                raise ValueError("not pins of this version")
            until = np.frombuffer(packed, dtype="<f8")
            names = np.frombuffer(keys, dtype=f"V{KEY_BYTES}").tolist()
        except (TypeError, msgpack.UnpackException) as error:
            raise ValueError("not pins") from error
        if len(names) != len(until) or not np.isfinite(until).all():
            raise ValueError("not pins")
        pins = cls(most)
        ends = zip(names, until.tolist(), strict=True)
        pins._until = {BlockKey(key): min(end, now + LONGEST) for key, end in ends if end > now}
        return pins


class PinnedLast(EvictionPolicy):
    """Ranks as another policy does, but gives up pinned blocks last."""

    def __init__(self, policy: EvictionPolicy, pins: Pins) -> None:
        self.name = policy.name
        self._policy = policy
        self._pins = pins

    def values(self, index: BlockIndex, rows: Rows, now: float) -> Values:
        values = self._policy.values(index, rows, now)
        if not len(self._pins) or not len(rows):
            return values
        pinned = np.array(self._pins.hold([index.key(row) for row in rows.tolist()], now))
        above = float(values.max() - values.min()) + 1.0
        return np.where(pinned, values + above, values)
