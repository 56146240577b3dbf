"""What becomes of blocks when the host tier is about to give them up: the disk is asked then, and not when they are saved.

A block that was asked for once may still be asked for again while it is in memory, and most that are at all, are: the longer a
write waits the better is known what is worth it. Blocks cannot be written once they are evicted, so they are named ahead, when
as many as that will have to go soon.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator

from kvstore.envelope import Header
from kvstore.identity import NO_PARENT, BlockKey
from kvstore.tiers.host import HostTier
from kvstore.writeback import Writeback


class Leaving:
    """Names the blocks of the host tier that a slower one is to be asked about, each once. Owned by the event loop."""

    def __init__(self, host: HostTier, queue: Writeback) -> None:
        self.queue = queue
        self._host = host
        self._asked: set[BlockKey] = set()
        self._started = time.monotonic()
        self._saved_bytes = 0

    def saved(self, headers: Iterable[Header]) -> None:
        """These came into the host tier."""
        self._saved_bytes += sum(header.length for header in headers)

    @property
    def residence(self) -> float:
        """Seconds for which the slower tier would keep a block if it were given all that is saved."""
        capacity = self.queue.tier.stats().capacity_bytes
        if capacity is None or not self._saved_bytes:
            return float("inf")
        return capacity * (time.monotonic() - self._started) / self._saved_bytes

    def due(self, everything: bool = False) -> list[Header]:
        """What goes soon, or all there is, and nobody was asked about: ancestors before their descendants."""
        named = list(self._host.keys()) if everything else self._host.leaving()
        if not named:
            return []
        if len(self._asked) > 2 * len(self._host.keys()):
            self._asked &= self._host.keys()
        headers = {key: header for key in named if key not in self._asked and (header := self._header(key)) is not None}
        self._asked.update(headers)
        return list(_by_chain(headers))

    def with_ancestors(self, header: Header) -> list[Header]:
        """The block, behind those before it that the slower tier lacks; nothing if one of them is lost."""
        line = [header]
        while (parent := line[-1].parent) != NO_PARENT and not self.queue.has(parent):
            above = self._header(parent)
            if above is None:
                return []
            line.append(above)
        return line[::-1]

    def _header(self, key: BlockKey) -> Header | None:
        offset = self._host.pin(key)
        if offset is None:
            return None
        header = Header.unpack(self._host.slot(offset))
        self._host.unpin(key, offset)
        return header


def _by_chain(headers: dict[BlockKey, Header]) -> Iterator[Header]:
    children: dict[BlockKey, list[Header]] = {}
    for header in headers.values():
        children.setdefault(header.parent, []).append(header)
    follow = [header for header in headers.values() if header.parent not in headers]
    while follow:
        header = follow.pop()
        yield header
        follow += children.get(header.key, [])
