"""Slots that clients are writing: reserved, filled by one or several of them, then sealed.

A slot is not used for anything else while a client that was given it has neither committed, aborted nor disconnected,
because it may still be writing, however long ago. Parts that nobody comes for, with all other writers gone, are waited for
a while and no longer.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from kvstore.envelope import HEADER_BYTES, Header, crc32c, envelope_bytes, payload
from kvstore.errors import BlockTooLarge
from kvstore.identity import BlockKey
from kvstore.node.api import Miss
from kvstore.tiers.host import HostTier

UNCLAIMED_SECONDS = 30.0
"""How long the parts of a block may be apart: a rank that dropped its save never comes."""


@dataclass(slots=True, eq=False)
class Reservation:
    """One slot being written."""

    header: Header
    offset: int
    unclaimed: set[int]
    """Parts that nobody has been given."""
    missing: set[int]
    """Parts that have not been committed."""
    parts: int
    """Into how many parts whoever asked first cut the block."""
    holders: set[object] = field(default_factory=set)
    aborted: bool = False


class Reservations:
    """All slots being written, by block key. A holder is any hashable that stands for a client."""

    def __init__(self, host: HostTier) -> None:
        self._host = host
        self._open: dict[BlockKey, Reservation] = {}

    def __contains__(self, key: object) -> bool:
        return key in self._open

    def held_by(self, holder: object) -> Iterator[BlockKey]:
        return (key for key, reservation in self._open.items() if holder in reservation.holders)

    def open(self, holder: object, header: Header, part: int, parts: int) -> int | Miss:
        """Payload offset for the holder's part of a new block, or of one that others already write their parts of."""
        reservation = self._open.get(header.key)
        if reservation is None:
            try:
                offset = self._host.allocate(envelope_bytes(header.length), header.key)
            except BlockTooLarge:
                return Miss.NO_ROOM
            if offset is None:
                return Miss.NO_ROOM
            every = range(parts)
            reservation = self._open[header.key] = Reservation(header, offset, set(every), set(every), parts)
        if parts != reservation.parts or part not in reservation.unclaimed:
            return Miss.PRESENT  # a part of another size would leave a hole
        if holder in reservation.holders or reservation.aborted:
            return Miss.PRESENT
        reservation.unclaimed.discard(part)
        reservation.holders.add(holder)
        return reservation.offset + HEADER_BYTES

    def commit(self, holder: object, key: BlockKey, part: int) -> Reservation | None:
        """Note a part as written. The reservation, to be sealed, when it was the last part."""
        reservation = self._open.get(key)
        if reservation is None or holder not in reservation.holders:
            return None
        reservation.missing.discard(part)
        reservation.holders.remove(holder)
        if not reservation.missing and not reservation.aborted:
            return reservation
        if reservation.aborted:
            self._free_if_unheld(reservation)
        elif not reservation.holders:
            asyncio.get_running_loop().call_later(UNCLAIMED_SECONDS, self._expire, reservation)
        return None

    def abort(self, holder: object, key: BlockKey) -> bool:
        """The holder's part will never come. True when the holder had one."""
        reservation = self._open.get(key)
        if reservation is None or holder not in reservation.holders:
            return False
        reservation.holders.remove(holder)
        reservation.aborted = True
        self._free_if_unheld(reservation)
        return True

    async def seal(self, reservation: Reservation) -> Header | None:
        """Checksum the payload, write the header and publish the block; None when the key was published meanwhile."""
        slot = self._host.slot(reservation.offset)
        length = reservation.header.length
        crc = await asyncio.to_thread(crc32c, payload(slot, length))
        now = time.time()
        header = replace(reservation.header, crc=crc, created=now, generation=int(now * 1e9))
        del self._open[header.key]
        if header.key in self._host.keys():
            self._host.discard(reservation.offset)
            return None
        header.pack_into(slot)
        self._host.publish(header, reservation.offset)
        return header

    def _expire(self, reservation: Reservation) -> None:
        if self._open.get(reservation.header.key) is reservation and reservation.missing:
            reservation.aborted = True
            self._free_if_unheld(reservation)

    def _free_if_unheld(self, reservation: Reservation) -> None:
        if not reservation.holders:
            del self._open[reservation.header.key]
            self._host.discard(reservation.offset)
