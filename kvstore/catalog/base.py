"""The interface of a catalog.

A catalog is the shared index of a region's bucket. The bucket is the truth: a catalog may be lost, late or wrong, and nothing
worse than a miss comes of it. What every implementation promises:

* The changes of one ``record`` are applied together and in order; a change that changes nothing leaves no trace.
* A reader that calls ``follow`` again and again sees the whole index once, then every change in order. One that was away for
  longer than changes are kept is sent through the whole index again, and told so.
* ``epoch`` names one life of the index. It changes when the index is dropped, on purpose or not.
* Memory is bounded by the number of blocks: the latest ``CHANGES_KEPT`` changes are kept, expired claims are not.

All methods are called in one event loop, raise CatalogUnavailable within a few seconds when the catalog does not answer, and
work again by themselves once it does. Each is one round trip.
"""

from __future__ import annotations

import re
import struct
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from kvstore.catalog.documents import Documents
from kvstore.envelope import MAX_PAYLOAD_BYTES, Header, envelope_bytes
from kvstore.identity import KEY_BYTES, BlockKey

CHANGES_KEPT = 100_000
"""Changes a follower may lag behind: minutes of a busy region, some 10 MB."""
BATCH = 500
"""Changes or keys in one call. Larger ones keep other nodes waiting: a server runs one script at a time."""

_VALUE = struct.Struct("<I16sHI16sI")
_NAME = re.compile(r"[\w.:/-]{1,200}", re.ASCII)


class Entry(NamedTuple):
    """A block in the bucket. A tuple, because lookups make hundreds of them at a time."""

    key: BlockKey
    length: int
    """Payload bytes."""
    namespace: bytes
    tokens: int
    """0 while only the object's size is known, not its header."""
    depth: int
    """Position of the block in its chain, from 0."""
    parent: BlockKey
    stored: int
    """When, in seconds since the epoch: what a node goes by that does not know the block's uses."""

    @classmethod
    def of(cls, header: Header) -> Entry:
        return cls(
            key=header.key,
            namespace=header.namespace,
            parent=header.parent,
            depth=header.index,
            tokens=min(header.tokens, 0xFFFF),
            length=header.length,
            stored=min(int(header.created), 0xFFFFFFFF),
        )

    @property
    def header(self) -> Header:
        """What of the block's header is known; the checksum is not."""
        return Header(
            key=self.key,
            namespace=self.namespace,
            parent=self.parent,
            index=self.depth,
            tokens=self.tokens,
            length=self.length,
            crc=0,
            created=float(self.stored),
        )

    @property
    def envelope_bytes(self) -> int:
        return envelope_bytes(self.length)

    def pack(self) -> bytes:
        """All but the key, in the form that catalogs store."""
        return _VALUE.pack(self.length, self.namespace, self.tokens, self.depth, self.parent, self.stored)

    @classmethod
    def unpack(cls, key: bytes, value: bytes) -> Entry | None:
        """None for what cannot be an entry: it counts as absent, and the next ``record`` of the key replaces it."""
        if len(key) != KEY_BYTES or len(value) != _VALUE.size:
            return None
        entry = cls._make((key, *_VALUE.unpack(value)))
        return entry if 0 < entry.length <= MAX_PAYLOAD_BYTES else None


def adds_nothing(after: Entry, before: bytes) -> bool:
    """Whether an entry says no more than the packed one that is there: see ``Catalog.record``."""
    known = Entry.unpack(after.key, before)
    if known is None or known.namespace != after.namespace:
        return False
    if not after.tokens:
        return known.envelope_bytes == after.envelope_bytes
    return after == known._replace(stored=after.stored)


Changes = Mapping[BlockKey, Entry | None]
"""The latest state of each block that changed, in order; None: it was removed."""


@dataclass(frozen=True, slots=True)
class Cursor:
    """How far a reader has come. Made by ``follow``; of no meaning to the reader."""

    epoch: str = ""
    since: int = 0
    """Number of the last change seen."""
    page: str | None = ""
    """Position in the index while it is read as a whole, from ``""``; then None."""


START = Cursor()


@dataclass(frozen=True, slots=True)
class Batch:
    """What ``follow`` brought."""

    changes: Changes
    cursor: Cursor
    """For the next call."""
    restarted: bool
    """The whole index is read from its start. A block known from earlier and not seen again until ``caught_up`` is gone, if
    the catalog is ``complete``."""
    caught_up: bool
    """There is nothing more at the moment."""
    complete: bool
    """Whether the index is known to cover the whole bucket."""
    used_bytes: int
    """Bytes of all envelopes in the index."""


@dataclass(frozen=True, slots=True)
class Claim:
    """A name that one holder has until a time: a role that must be played once."""

    name: str
    holder: str
    token: int
    """Grows with each change of holder: of two who believe to hold the claim, the one with the larger token does."""
    expires: float
    """Seconds since the epoch, by the catalog's clock."""


@dataclass(frozen=True, slots=True)
class CatalogStatus:
    epoch: str
    complete: bool
    blocks: int
    used_bytes: int
    changes: int
    """Number of changes in this epoch."""
    claims: tuple[Claim, ...]
    """Those that have not expired, by name."""


class Catalog(ABC):
    """The shared index of one bucket."""

    documents: Documents
    """What the processes of the region tell each other beside it."""

    @abstractmethod
    async def record(self, changes: Changes) -> None:
        """Add, correct and remove blocks; at most ``BATCH``.

        An entry that differs only in ``stored`` is no change; nor is one of which only the size is known, where there is one
        of the same namespace and envelope size.
        """

    @abstractmethod
    async def follow(self, cursor: Cursor, limit: int = BATCH) -> Batch:
        """What comes after ``cursor``, about ``limit`` blocks at most. Begin with ``START``."""

    @abstractmethod
    async def lookup(self, keys: Sequence[BlockKey]) -> list[Entry | None]:
        """The entries of at most ``BATCH`` keys, in their order."""

    @abstractmethod
    async def claim(self, name: str, holder: str, seconds: float) -> Claim | None:
        """Take a claim that is free, or renew one's own, for ``seconds``; 0 gives it back.

        None: somebody else has it, or it was given back. ``name`` and ``holder`` are short and printable (``check_name``).
        """

    @abstractmethod
    async def status(self) -> CatalogStatus:
        """Totals, and who holds what."""

    @abstractmethod
    async def reset(self) -> str:
        """Drop the index and begin a new epoch, which is not complete; its name. Claims and documents stay."""

    @abstractmethod
    async def complete(self, epoch: str) -> bool:
        """Say that the index covers the whole bucket. False when ``epoch`` is over."""

    @abstractmethod
    async def close(self) -> None:
        """Close connections and files. Calling it again does no harm."""


def check_name(name: str) -> str:
    """``name``, if it can name a claim or a holder. Raises ValueError."""
    if not _NAME.fullmatch(name):
        raise ValueError(f"{name!r} is not 1 to 200 letters, digits and ._:/-")
    return name


def read_changes(rows: Sequence[tuple[bytes, bytes | None]]) -> Changes:
    """Changes from stored keys and values, the latest of each key; what cannot be read is left out."""
    changes: dict[BlockKey, Entry | None] = {}
    for key, value in rows:
        entry = Entry.unpack(key, value) if value else None
        if entry is not None or not value:
            changes.pop(BlockKey(key), None)
            changes[BlockKey(key)] = entry
    return changes
