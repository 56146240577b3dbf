"""The in-memory index of a tier: block key to a row of numpy columns.

One dict and about 60 bytes of columns per block, so that a million blocks fit in some 200 MB, and so that a policy can
rank all of them with a few vector operations. Chains are known through ``parent_row``, so that a tail can be evicted before
its head. Not thread-safe: owned by the tier's event loop.
"""

from __future__ import annotations

from collections.abc import Iterable, KeysView, Sequence
from itertools import repeat
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from kvstore.envelope import HEADER_BYTES, Header, envelope_bytes
from kvstore.identity import KEY_BYTES, NO_PARENT, BlockKey
from kvstore.tiers.base import BlockStat

Rows = npt.NDArray[np.intp]
Identities = npt.NDArray[np.void]
"""Keys as numpy values of KEY_BYTES bytes."""

_COLUMNS: dict[str, tuple[str, int]] = {  # dtype and the value of an unused row
    "location": ("i8", -1),  # where the tier keeps the bytes
    "accessed": ("f8", 0),  # seconds; which clock is the tier's choice
    "length": ("u4", 0),  # payload bytes
    "depth": ("u4", 0),  # position in the chain
    "hits": ("u4", 0),
    "namespace": ("i4", 0),  # number in BlockIndex.namespaces
    "parent_row": ("i4", -1),  # -1 while the parent is not in this index
    "children": ("i4", 0),  # rows whose parent_row is this one
    "tokens": ("u2", 0),
    "pins": ("u2", 0),  # leases and pending writes: a pinned row is no victim
}


class Listener(Protocol):
    """Told of every block that an index lists or unlists, with the bytes of its envelope. Must not block or raise."""

    def listed(self, key: BlockKey, namespace: bytes, nbytes: int) -> None: ...
    def unlisted(self, key: BlockKey, namespace: bytes, nbytes: int) -> None: ...


class BlockIndex:
    """Rows of blocks. ``index.accessed[row]`` and the other columns are plain arrays, open to policies."""

    location: npt.NDArray[np.int64]
    accessed: npt.NDArray[np.float64]
    length: npt.NDArray[np.uint32]
    depth: npt.NDArray[np.uint32]
    hits: npt.NDArray[np.uint32]
    namespace: npt.NDArray[np.int32]
    parent_row: npt.NDArray[np.int32]
    children: npt.NDArray[np.int32]
    tokens: npt.NDArray[np.uint16]
    pins: npt.NDArray[np.uint16]

    def __init__(self) -> None:
        self._rows: dict[BlockKey, int] = {}
        self._keys: list[BlockKey | None] = []
        self._free: list[int] = []
        self._waiting: dict[BlockKey, set[int]] = {}
        """Rows whose parent is not here, by that parent's key."""
        self._parents: Identities = np.zeros(0, dtype=f"V{KEY_BYTES}")
        for name, (dtype, _) in _COLUMNS.items():
            setattr(self, name, np.zeros(0, dtype=dtype))
        self.listener: Listener | None = None
        self.namespaces: list[bytes] = []
        self._namespace_numbers: dict[bytes, int] = {}

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, key: object) -> bool:
        return key in self._rows

    def keys(self) -> KeysView[BlockKey]:
        """Live view; membership is one dict probe."""
        return self._rows.keys()

    def row(self, key: BlockKey) -> int | None:
        return self._rows.get(key)

    def rows(self, keys: Iterable[BlockKey]) -> Rows:
        """Rows of those keys that are present, in the given order."""
        rows = np.fromiter(map(self._rows.get, keys, repeat(-1)), dtype=np.intp)
        return rows[rows >= 0]

    def used(self) -> Rows:
        """All rows in use."""
        return np.flatnonzero(self.location >= 0)

    def in_namespace(self, digest: bytes) -> Rows:
        """Rows in use of one namespace: a pass over the index."""
        number = self._namespace_numbers.get(digest, -1)
        return np.flatnonzero((self.namespace == number) & (self.location >= 0))

    def key(self, row: int) -> BlockKey:
        key = self._keys[row]
        assert key is not None, f"row {row} is not in use"
        return key

    def key_bytes(self, rows: Rows) -> bytes:
        """Keys of used rows, one after the other; a million takes about 0.1 s."""
        keys = self._keys
        return b"".join([keys[row] or b"" for row in rows.tolist()])

    def parent(self, row: int) -> BlockKey:
        return BlockKey(self._parents[row].tobytes())

    def stat(self, row: int) -> BlockStat:
        return BlockStat(
            key=self.key(row),
            length=int(self.length[row]),
            namespace=self.namespaces[self.namespace[row]],
            parent=self.parent(row),
            index=int(self.depth[row]),
            tokens=int(self.tokens[row]),
            hits=int(self.hits[row]),
            accessed=float(self.accessed[row]),
        )

    def identities(self, rows: Rows) -> tuple[Identities, Identities]:
        """Keys and parents of used rows, as arrays."""
        keys = b"".join([key for row in rows.tolist() if (key := self._keys[row]) is not None])
        return np.frombuffer(keys, dtype=self._parents.dtype), self._parents[rows]

    def load(
        self,
        keys: Identities,
        parents: Identities,
        namespaces: Sequence[bytes],
        namespace: npt.NDArray[np.integer[Any]],
        **columns: npt.NDArray[Any],
    ) -> None:
        """Fill an empty index with blocks of distinct keys; a million takes about a second.

        ``namespace`` numbers the entries of ``namespaces``; ``columns`` are ``location``, ``accessed``, ``length``,
        ``depth``, ``hits`` and ``tokens``.
        """
        assert not self._keys, "only an empty index can be loaded"
        count = len(keys)
        self._grow(count)
        known = _split(keys)
        self._keys = list(known)
        self._rows = dict(zip(known, range(count), strict=True))
        self._parents[:count] = parents
        for name, values in columns.items():
            getattr(self, name)[:count] = values
        numbers = np.array([self._number(digest) for digest in namespaces], dtype=np.int32)
        self.namespace[:count] = numbers[namespace] if count else 0
        parent_keys = _split(parents)
        get = self._rows.get
        found = np.fromiter((get(key, -1) for key in parent_keys), dtype=np.int32, count=count)
        self.parent_row[:count] = found
        np.add.at(self.children, found[found >= 0], 1)
        for row in np.flatnonzero(found < 0).tolist():
            if parent_keys[row] != NO_PARENT:
                self._waiting.setdefault(parent_keys[row], set()).add(row)

    def add(self, header: Header, location: int, now: float) -> int:
        """Insert a block, or replace what is known of it; returns its row."""
        if header.key in self._rows:
            self.remove(header.key)
        row = self._take_row()
        self._rows[header.key] = row
        self._keys[row] = header.key
        self._parents[row] = np.void(header.parent)
        self.location[row] = location
        self.accessed[row] = now
        self.length[row] = header.length
        self.depth[row] = header.index
        self.hits[row] = 0
        self.namespace[row] = self._number(header.namespace)
        self.tokens[row] = header.tokens
        self.pins[row] = 0
        self._link(row, header)
        if self.listener is not None:
            self.listener.listed(header.key, header.namespace, header.envelope_bytes)
        return row

    def remove(self, key: BlockKey) -> int | None:
        """Forget a block; returns the location it had."""
        row = self._rows.pop(key, None)
        if row is None:
            return None
        self._unlink(row, key)
        location = int(self.location[row])
        self._keys[row] = None
        self.location[row] = -1
        self._free.append(row)
        if self.listener is not None:
            namespace, nbytes = self.namespaces[self.namespace[row]], envelope_bytes(int(self.length[row]))
            self.listener.unlisted(key, namespace, nbytes)
        return location

    def touch(self, keys: Iterable[BlockKey], now: float) -> None:
        """Count a hit for each present key."""
        rows = self.rows(keys)
        self.accessed[rows] = now
        self.hits[rows] += 1

    def _link(self, row: int, header: Header) -> None:
        """Join the row to its parent and to the children that came before it."""
        self.parent_row[row] = -1
        children = self._waiting.pop(header.key, set())
        self.children[row] = len(children)
        self.parent_row[list(children)] = row
        if header.parent == NO_PARENT:
            return
        parent = self._rows.get(header.parent)
        if parent is None:
            self._waiting.setdefault(header.parent, set()).add(row)
        else:
            self.parent_row[row] = parent
            self.children[parent] += 1

    def _unlink(self, row: int, key: BlockKey) -> None:
        if self.children[row]:
            orphans = np.flatnonzero((self.parent_row == row) & (self.location >= 0))
            self.parent_row[orphans] = -1
            self._waiting[key] = set(orphans.tolist())
        parent = int(self.parent_row[row])
        if parent >= 0:
            self.children[parent] -= 1
            self.parent_row[row] = -1
            return
        waiting = self._waiting.get(self.parent(row))
        if waiting is not None:
            waiting.discard(row)
            if not waiting:
                del self._waiting[self.parent(row)]

    def _number(self, namespace: bytes) -> int:
        number = self._namespace_numbers.get(namespace)
        if number is None:
            number = self._namespace_numbers[namespace] = len(self.namespaces)
            self.namespaces.append(namespace)
        return number

    def _take_row(self) -> int:
        if self._free:
            return self._free.pop()
        row = len(self._keys)
        if row == len(self._parents):
            self._grow(max(1024, row // 4))
        self._keys.append(None)
        return row

    def _grow(self, more: int) -> None:
        self._parents = np.concatenate([self._parents, np.zeros(more, dtype=self._parents.dtype)])
        for name, (dtype, unused) in _COLUMNS.items():
            setattr(self, name, np.concatenate([getattr(self, name), np.full(more, unused, dtype=dtype)]))


def _split(identities: Identities) -> list[BlockKey]:
    return [BlockKey(identity) for identity in np.ascontiguousarray(identities).tolist()]


def slot_sizes(lengths: npt.NDArray[np.uint32]) -> npt.NDArray[np.int64]:
    """``kvstore.envelope.envelope_bytes`` of many payload lengths."""
    return (-(-lengths.astype(np.int64) // HEADER_BYTES) + 1) * HEADER_BYTES
