"""Blocks that planned loads will ask a tier for: work that the next load finds ahead of it."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from itertools import zip_longest

from kvstore.identity import BlockKey
from kvstore.tiers.base import Medium


class Promises:
    """Owned by the store's event loop. A promise ends with the block's arrival, or when its time is over."""

    def __init__(self) -> None:
        self._until: dict[BlockKey, tuple[Medium, int, float, BlockKey | None]] = {}
        """With the block promised behind it, in the same tier."""
        self._order: deque[BlockKey] = deque()
        """As first promised; a key may be in it after its promise ended."""
        self._bytes = dict.fromkeys(Medium, 0)

    def __len__(self) -> int:
        return len(self._until)

    def __contains__(self, key: object) -> bool:
        return key in self._until

    def make(self, keys: Sequence[BlockKey], medium: Medium, block_bytes: int, until: float) -> None:
        """These are to be loaded from ``medium``. A request that asks again promises its blocks once."""
        for key, following in zip_longest(keys, keys[1:]):
            if key in self._until:
                self.end(key)
            else:
                self._order.append(key)
            self._until[key] = (medium, block_bytes, until, following)
            self._bytes[medium] += block_bytes

    def end(self, key: BlockKey) -> None:
        """The block has come, or will not."""
        if (promise := self._until.pop(key, None)) is not None:
            self._bytes[promise[0]] -= promise[1]

    def behind(self, key: BlockKey, most: int) -> list[BlockKey]:
        """Up to so many blocks that are promised of the same tier behind ``key``, which is promised itself."""
        found: list[BlockKey] = []
        while len(found) < most and (promise := self._until.get(key)) is not None and promise[3] is not None:
            key = promise[3]
            found.append(key)
        return found

    def ahead_of(self, keys: Sequence[BlockKey], now: float) -> dict[Medium, int]:
        """Bytes promised to others than who asks for ``keys``, by medium."""
        for _ in range(len(self._order)):
            promise = self._until.get(self._order[0])
            if promise is not None and promise[2] > now:
                break
            self.end(self._order.popleft())
        ahead = dict(self._bytes)
        if self._until:
            for key in keys:
                if (promise := self._until.get(key)) is not None:
                    ahead[promise[0]] -= promise[1]
        return ahead
