"""The interface of a tier.

A tier stores sealed envelopes (``kvstore.envelope``) by block key. What every implementation promises:

* ``get`` never returns bytes that do not verify. A block that fails is dropped from the index first, then quarantined; the
  next ``put`` of the key heals it.
* The index never runs ahead of the bytes: a key is listed after its bytes are durable, unlisted before they are deleted.
* ``used_bytes`` never exceeds the capacity, and is right again after a restart.
* Nothing is written to a buffer before the block is known to fit in it.

All methods are called in one event loop; bytes are moved in the tier's own threads. ``keys`` and ``stat`` do no I/O.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from enum import Enum

from kvstore.envelope import Header
from kvstore.identity import BlockKey


class Medium(Enum):
    """Kinds of tier, fastest first."""

    HOST = "host"
    DISK = "disk"
    OBJECT = "object"
    REMOTE = "remote"
    """Another region's bucket: read from, never written to."""


class PutResult(Enum):
    """What became of a block that was offered."""

    STORED = "stored"
    PRESENT = "present"
    """The tier already held it; nothing was written."""
    REFUSED = "refused"
    """No room that could be made, or the medium is full: the block was dropped. Not an error."""


@dataclass(frozen=True, slots=True)
class BlockStat:
    """What a tier's index knows of a block. Fields a listing cannot tell are 0 or empty."""

    key: BlockKey
    length: int
    namespace: bytes = b""
    parent: BlockKey | None = None
    index: int = 0
    tokens: int = 0
    hits: int = 0
    accessed: float = 0.0
    """Seconds since the epoch."""


@dataclass(frozen=True, slots=True)
class TierStats:
    """Fill of a tier, and its blocks that failed verification since the start."""

    medium: Medium
    blocks: int
    used_bytes: int
    capacity_bytes: int | None
    """None: without a limit of its own."""
    quarantined: int = 0
    evicted: int = 0
    refused: int = 0


@dataclass(frozen=True, slots=True)
class Slot:
    """Where a block's envelope lies in a file."""

    path: str
    """Absolute; readable past the page cache (O_DIRECT)."""
    offset: int
    """Of the header, a multiple of 4 KiB."""
    length: int
    """Bytes of the payload."""


OnEvict = Callable[[Medium, Sequence[BlockKey], BlockKey | None], None]


class Tier(ABC):
    """A place for blocks."""

    medium: Medium
    on_evict: OnEvict | None = None
    """Told of blocks that were given up to make room, and for which block where that is known. Must not block or raise; set on
    the tier itself, not on a wrapper."""

    @abstractmethod
    def keys(self) -> AbstractSet[BlockKey]:
        """Live view of what the tier holds; membership costs one hash probe."""

    @abstractmethod
    def stat(self, key: BlockKey) -> BlockStat | None:
        """What the index knows of a block."""

    @abstractmethod
    def touch(self, keys: Iterable[BlockKey]) -> None:
        """Count a use of each of these blocks that is here."""

    @abstractmethod
    def stats(self) -> TierStats:
        """Fill and counters."""

    @abstractmethod
    async def put(self, header: Header, envelope: memoryview) -> PutResult:
        """Store a sealed envelope (``header.envelope_bytes`` long, 4 KiB-aligned in memory). Durable on return.

        ``envelope`` must not change until the call returns, also when it is cancelled: the bytes may still be on their way.
        Raises TierUnavailable when the medium failed.
        """

    @abstractmethod
    async def get(self, key: BlockKey, into: memoryview) -> Header:
        """Read and verify a block's envelope into ``into`` (4 KiB-aligned in memory).

        Raises BlockNotFound, BlockCorrupt (dropped and quarantined), BlockTooLarge (nothing was written), TierUnavailable.
        After any of them the content of ``into`` is undefined, unless BlockTooLarge. A cancelled call returns only when
        nothing writes to ``into`` any more.
        """

    def locate(self, key: BlockKey) -> Slot | None:
        """Where somebody else may read the block by himself; None if that must be left to ``get``.

        A slot is given to other blocks in time: who reads it verifies it, key and checksum, as ``get`` does. No I/O.
        """
        return None

    @abstractmethod
    async def delete(self, keys: Iterable[BlockKey]) -> int:
        """Forget blocks, index first; returns how many there were."""

    @abstractmethod
    async def close(self) -> None:
        """Finish what was started, sync, release files and threads. The tier is of no use afterwards."""
