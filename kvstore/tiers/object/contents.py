"""What an object tier knows to be in its bucket: the index and the bytes that count against the capacity."""

from __future__ import annotations

import time

from kvstore.envelope import HEADER_BYTES, Header, envelope_bytes
from kvstore.identity import NO_PARENT, BlockKey
from kvstore.index import BlockIndex, Rows
from kvstore.policy.eviction import EvictionPolicy, eviction_order
from kvstore.tiers.object.objects import Found

EVICTED_AT_ONCE = 1 / 64
"""Share given up when full: ranking is a pass over the whole index, so it pays to rank rarely."""


def plausible_size(size: int) -> bool:
    """Whether an envelope can have this size."""
    return size >= HEADER_BYTES and size % HEADER_BYTES == 0


def size_only(namespace: bytes, key: BlockKey, found: Found) -> Header:
    """What an object's size and age tell of the block in it."""
    length = found.size - HEADER_BYTES
    return Header(key=key, namespace=namespace, index=0, tokens=0, length=length, crc=0, created=found.modified)


class Contents:
    """Pure bookkeeping; the tier's event loop is the only caller."""

    def __init__(self, policy: EvictionPolicy, capacity: int | None, max_blocks: int) -> None:
        self.index = BlockIndex()
        self.policy = policy
        self.capacity = capacity
        self.max_blocks = max_blocks
        self.used_bytes = 0
        """Bytes of listed blocks, of blocks being written, and of blocks being deleted."""
        self.unlisted_bytes = 0
        """Bytes of blocks in the bucket beyond those."""

    @property
    def full(self) -> bool:
        """Whether the index has as many rows as it may."""
        return len(self.index) >= self.max_blocks

    def fits(self, nbytes: int) -> bool:
        return self.capacity is None or self.used_bytes + self.unlisted_bytes + nbytes <= self.capacity

    def namespace(self, key: BlockKey) -> bytes | None:
        row = self.index.row(key)
        return None if row is None else self.index.namespaces[self.index.namespace[row]]

    def knows_header(self, key: BlockKey) -> bool:
        """Whether a listed block's header has been read, not only its size."""
        row = self.index.row(key)
        return row is not None and bool(self.index.tokens[row])

    def agrees(self, header: Header) -> bool:
        """Whether a block is listed with the namespace and size of ``header``, and with all else that it knows."""
        row = self.index.row(header.key)
        if row is None or self.index.namespaces[self.index.namespace[row]] != header.namespace:
            return False
        length = int(self.index.length[row])
        if not header.tokens:
            return envelope_bytes(length) == header.envelope_bytes
        return length == header.length and bool(self.index.tokens[row])

    def note(self, namespace: bytes, key: BlockKey, found: Found) -> Header:
        """List a block of which only the object's size is known. Its place in a chain stays unknown until it is read."""
        header = size_only(namespace, key, found)
        self.add(header, found.modified)
        return header

    def add(self, header: Header, accessed: float) -> None:
        """List a block, or correct what is known of it; its count of hits stays."""
        row = self.index.row(header.key)
        hits = 0
        if row is not None:
            hits = int(self.index.hits[row])
            accessed = max(accessed, float(self.index.accessed[row]))
            self.used_bytes -= envelope_bytes(int(self.index.length[row]))
        row = self.index.add(header, 0, accessed)
        self.index.hits[row] = hits
        self.used_bytes += header.envelope_bytes

    def forget(self, key: BlockKey) -> Header | None:
        """Unlist a block whose object is gone, or not ours to keep any more; what was known of it."""
        header = self.unlist(key)
        if header is not None:
            self.used_bytes -= header.envelope_bytes
        return header

    def unlist(self, key: BlockKey) -> Header | None:
        """Unlist a block that is about to be deleted: its bytes still count."""
        row = self.index.row(key)
        if row is None:
            return None
        stat = self.index.stat(row)
        self.index.remove(key)
        return Header(
            key=key,
            namespace=stat.namespace,
            parent=stat.parent or NO_PARENT,
            index=stat.index,
            tokens=stat.tokens,
            length=stat.length,
            crc=0,
        )

    def victims(self, nbytes: int) -> list[BlockKey]:
        """Least valuable blocks that make room for ``nbytes``, or a share of the capacity; tails of chains first."""
        assert self.capacity is not None, "a tier without a capacity evicts nothing"
        goal = max(self.used_bytes + self.unlisted_bytes + nbytes - self.capacity, int(self.capacity * EVICTED_AT_ONCE))
        chosen: list[BlockKey] = []
        for row in self._ranking():
            if goal <= 0:
                break
            chosen.append(self.index.key(int(row)))
            goal -= envelope_bytes(int(self.index.length[row]))
        return chosen

    def least_valuable(self) -> list[BlockKey]:
        """A share of the index, to make room in it."""
        share = max(1, int(self.max_blocks * EVICTED_AT_ONCE))
        return [self.index.key(int(row)) for row in self._ranking()[:share]]

    def _ranking(self) -> Rows:
        return eviction_order(self.index, self.policy, self.index.used(), time.time())
