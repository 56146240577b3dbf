"""Pins: an operator's or a job's wish to keep chains until a deadline. Wishes, not locks: they end by themselves, and a tier
that has nothing else to give up gives up pinned blocks too.

What is pinned follows from the wishes that were made, on this node or on others of its region (``kvstore.catalog.pins``): nodes
that know of the same wishes pin the same blocks, in whatever order they heard of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import msgpack
import numpy as np

from kvstore.identity import KEY_BYTES, BlockKey
from kvstore.index import BlockIndex, Rows
from kvstore.policy.eviction import EvictionPolicy, Values

LONGEST = 24 * 3600.0
"""Seconds that a pin may last. One that is still wanted is renewed; one that was forgotten ends."""

MOST = 1 << 20
"""Pinned blocks at most."""

_VERSION = 2


@dataclass(frozen=True, slots=True)
class Wish:
    """That a chain be kept until a time, or no more. Made on some node; the latest about a chain counts."""

    at: float
    """When it was made, in seconds since the epoch."""
    until: float
    """0: the chain need not be kept any more."""
    keys: bytes
    """Of the chain's blocks from its head, joined."""

    @property
    def last(self) -> BlockKey:
        """The chain's last block, which names it: a key covers all blocks before its own."""
        return BlockKey(self.keys[-KEY_BYTES:])

    @property
    def blocks(self) -> list[BlockKey]:
        return [BlockKey(self.keys[i : i + KEY_BYTES]) for i in range(0, len(self.keys), KEY_BYTES)]

    @property
    def ends(self) -> float:
        """When it means nothing any more: no pin that it took back would last longer."""
        return self.until or self.at + LONGEST

    def pack(self) -> bytes:
        packed: bytes = msgpack.packb([_VERSION, self.at, self.until, self.keys])
        return packed

    @classmethod
    def unpack(cls, data: bytes) -> Wish:
        """Raises ValueError for bytes that ``pack`` cannot have made."""
        try:
            match msgpack.unpackb(data):
                case [int(version), float(at), float(until) | int(until), bytes(keys)] if version == _VERSION:
                    pass
                case _:
                    raise ValueError("not a wish of this version")
        except (TypeError, msgpack.UnpackException) as error:
            raise ValueError("not a wish") from error
        if not (math.isfinite(at) and math.isfinite(until) and until >= 0 and keys and len(keys) % KEY_BYTES == 0):
            raise ValueError("a wish with impossible values")
        return cls(at, float(until), keys)


class Pins:
    """Deadlines by block, as the wishes about them come to, in the order in which they were made. Not thread-safe."""

    def __init__(self, most: int = MOST) -> None:
        self._most = most
        self._wishes: dict[BlockKey, Wish] = {}
        self._until: dict[BlockKey, float] = {}
        """What the wishes come to."""
        self._latest = 0.0

    def __len__(self) -> int:
        return len(self._until)

    def pin(self, keys: Sequence[BlockKey], until: float, now: float) -> int:
        """Keep blocks until a time (seconds, at most ``LONGEST`` from now); returns how many were taken.

        Name whole chains from their head: when there is room for no more, the rest is left out. A shorter pin does not
        shorten one.
        """
        self.expire(now)
        until = min(until, now + LONGEST)
        taken = keys[: self._room(keys)] if until > now else []
        if taken:
            before = self._wishes.get(taken[-1])
            self._take(Wish(self._next(now), max(until, before.until if before else 0.0), b"".join(taken)))
        return len(taken)

    def unpin(self, keys: Sequence[BlockKey], now: float) -> int:
        """End the pins of blocks; of how many."""
        pinned = sum(self.hold(keys, now))
        if pinned:
            self._take(Wish(self._next(now), 0.0, b"".join(keys)))
        return pinned

    def heed(self, wish: Wish, now: float) -> bool:
        """Take a wish that was made elsewhere; whether it is news."""
        self.expire(now)
        wish = replace(wish, until=min(wish.until, now + LONGEST))
        known = self._wishes.get(wish.last)
        news = now < wish.ends and wish.at <= now + LONGEST and (known is None or known.at < wish.at)
        if news and self._room(wish.blocks) * KEY_BYTES < len(wish.keys):
            return False
        if news:
            self._take(wish)
        return news

    def ending_in(self, last: BlockKey) -> list[BlockKey]:
        """The blocks of the chain that was pinned with this one as its last; none if none was."""
        wish = self._wishes.get(last)
        return [] if wish is None else wish.blocks

    def wishes(self, now: float) -> list[Wish]:
        """What still means something, in the order in which it was made."""
        return sorted((wish for wish in self._wishes.values() if wish.ends > now), key=lambda wish: wish.at)

    def hold(self, keys: Sequence[BlockKey], now: float) -> list[bool]:
        """Whether each block is pinned now."""
        until = self._until
        return [until.get(key, now) > now for key in keys] if until else [False] * len(keys)

    def expire(self, now: float) -> None:
        """Forget what has ended."""
        self._wishes = {last: wish for last, wish in self._wishes.items() if wish.ends > now}
        self._until = {key: until for key, until in self._until.items() if until > now}

    def held(self, now: float) -> set[BlockKey]:
        """Every block that is pinned now."""
        return {key for key, until in self._until.items() if until > now}

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
        """All of it, for a file: 16 bytes a block, and some for each wish."""
        wishes = [[wish.at, wish.until, wish.keys] for wish in self._wishes.values()]
        packed: bytes = msgpack.packb([_VERSION, wishes])
        return packed

    @classmethod
    def unpack(cls, data: bytes, now: float, most: int = MOST) -> Pins:
        """What ``pack`` made, less what has ended. Raises ValueError for bytes that it cannot have made."""
        if len(data) > most * (KEY_BYTES + 32) + 64:
            raise ValueError("too much for pins")
        try:
            version, packed = msgpack.unpackb(data)
            if version != _VERSION:
                raise ValueError("not pins of this version")
            wishes = [Wish.unpack(msgpack.packb([_VERSION, *one])) for one in packed]
        except (TypeError, msgpack.UnpackException) as error:
            raise ValueError("not pins") from error
        pins = cls(most)
        for wish in sorted(wishes, key=lambda wish: wish.at):
            pins.heed(replace(wish, at=min(wish.at, now)), now)
        return pins

    def _room(self, keys: Sequence[BlockKey]) -> int:
        """How many of the chain's blocks fit; those of a wish that would be replaced do not count."""
        taken = sum(len(wish.keys) for wish in self._wishes.values()) // KEY_BYTES
        known = self._wishes.get(keys[-1]) if keys else None
        return max(0, min(len(keys), self._most - taken + (len(known.keys) // KEY_BYTES if known else 0)))

    def _next(self, now: float) -> float:
        """The time of a wish that is made now: later than all that are known, whatever other machines' clocks say."""
        return max(now, self._latest + 1e-6)

    def _take(self, wish: Wish) -> None:
        in_order = wish.at > self._latest and wish.last not in self._wishes
        self._wishes[wish.last] = wish
        self._latest = max(self._latest, wish.at)
        if in_order:
            self._apply(wish)
            return
        self._until = {}
        for each in sorted(self._wishes.values(), key=lambda each: each.at):
            self._apply(each)

    def _apply(self, wish: Wish) -> None:
        for key in wish.blocks:
            if wish.until:
                self._until[key] = max(wish.until, self._until.get(key, 0.0))
            else:
                self._until.pop(key, None)


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
