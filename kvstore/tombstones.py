"""Tombstones: what was deleted for good, so that no copy and no stale manifest brings it back.

A tombstone buries the blocks that match all its fields and were created at or before its time. The time of creation stands in
a block's header and is the same in every copy, so a block copied late is as dead as the one it was copied from, and a block
that an engine computes anew after the purge is alive.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

from kvstore.errors import IdentityError
from kvstore.identity import KEY_BYTES, NO_PARENT, BlockKey
from kvstore.parsing import parse_json

_MAX_NAME = 512


class Labelled(Protocol):
    """Whose blocks a namespace holds."""

    @property
    def model(self) -> str: ...
    @property
    def tenant(self) -> str: ...


class Dated(Protocol):
    """A block in its chain."""

    @property
    def key(self) -> BlockKey: ...
    @property
    def parent(self) -> BlockKey: ...
    @property
    def namespace(self) -> bytes: ...
    @property
    def created(self) -> float: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Tombstone:
    """Empty fields match everything; at least one is not empty."""

    time: float
    """Seconds since the epoch."""
    tenant: str = ""
    model: str = ""
    namespace: bytes = b""
    prefix: bytes = b""
    """Key of a block: it and all that continue its chain."""

    def __post_init__(self) -> None:
        if not (self.tenant or self.model or self.namespace or self.prefix):
            raise IdentityError("a tombstone names a tenant, a model, a namespace or a prefix")
        if not math.isfinite(self.time) or self.time < 0:
            raise IdentityError(f"a tombstone's time is {self.time!r}; it is in seconds since the epoch")
        for field in (self.namespace, self.prefix):
            if field and len(field) != KEY_BYTES:
                raise IdentityError(f"a tombstone names a digest of {len(field)} bytes, not {KEY_BYTES}")
        if self.prefix == NO_PARENT:
            raise IdentityError("a tombstone's prefix is no block")
        if len(self.tenant) > _MAX_NAME or len(self.model) > _MAX_NAME:
            raise IdentityError("a tombstone's tenant or model is too long")

    @property
    def identity(self) -> str:
        """32 hexadecimal digits; equal tombstones have the same."""
        return hashlib.blake2b(self.to_json().encode(), digest_size=16).hexdigest()

    def covers(self, namespace: bytes, label: Labelled | None) -> bool:
        """Whether blocks of the namespace can be meant; one without a label has no known tenant or model."""
        if self.namespace and self.namespace != namespace:
            return False
        if self.tenant and (label is None or label.tenant != self.tenant):
            return False
        return not self.model or (label is not None and label.model == self.model)

    def to_json(self) -> str:
        fields = {
            "time": self.time,
            "tenant": self.tenant,
            "model": self.model,
            "namespace": self.namespace.hex(),
            "prefix": self.prefix.hex(),
        }
        return json.dumps(fields, sort_keys=True)

    @classmethod
    def from_json(cls, text: str | bytes) -> Tombstone:
        """Raises IdentityError."""
        try:
            fields = parse_json(text)
            return cls(
                time=float(fields["time"]),
                tenant=str(fields["tenant"]),
                model=str(fields["model"]),
                namespace=bytes.fromhex(fields["namespace"]),
                prefix=bytes.fromhex(fields["prefix"]),
            )
        except (ValueError, TypeError, KeyError) as error:
            raise IdentityError(f"not a tombstone: {error}") from None


def end_of_second(now: float) -> float:
    """The time for a tombstone that is made now.

    It ends with a second, because the catalog knows only the second in which a block was created: so what the catalog and
    what a header says of a block come to the same.
    """
    return math.floor(now) + 1 - 1e-6


class Graves:
    """Judges blocks one by one. Not thread-safe."""

    MOST_BELOW = 1 << 20
    """Blocks below purged prefixes that are remembered; beyond it only the prefixes themselves are."""

    def __init__(self, label: Callable[[bytes], Labelled | None], stones: Iterable[Tombstone] = ()) -> None:
        """``label`` says whose blocks a namespace holds, as far as that is known."""
        self._label = label
        self._stones: dict[Tombstone, None] = {}
        self._until: dict[bytes, float] = {}
        """By namespace: when the last tombstone that buries all of it was made."""
        self._below: dict[bytes, tuple[Tombstone, ...]] = {}
        """Tombstones of a prefix that a block belongs to."""
        self.add(stones)

    def __iter__(self) -> Iterator[Tombstone]:
        return iter(self._stones)

    def __len__(self) -> int:
        return len(self._stones)

    def add(self, stones: Iterable[Tombstone]) -> None:
        self._until.clear()
        for stone in stones:
            if stone.prefix and stone not in self._stones:
                self._below[stone.prefix] = (*self._below.get(stone.prefix, ()), stone)
            self._stones[stone] = None

    def dead(self, block: Dated) -> bool:
        """Whether a block is buried. Of a prefix's continuation, ask for parents first."""
        return block.created <= max(self._buried_until(block.namespace), self._buried_with_prefix(block))

    def _buried_until(self, namespace: bytes) -> float:
        if (until := self._until.get(namespace)) is not None:
            return until
        label = self._label(namespace)
        until = max((s.time for s in self._stones if not s.prefix and s.covers(namespace, label)), default=-math.inf)
        if label is not None:
            self._until[namespace] = until
        return until

    def _buried_with_prefix(self, block: Dated) -> float:
        stones = (*self._below.get(block.parent, ()), *self._below.get(block.key, ())) if self._below else ()
        if not stones:
            return -math.inf
        if block.key not in self._below and len(self._below) >= self.MOST_BELOW:
            self._below = {stone.prefix: (stone,) for stone in self._stones if stone.prefix}
        self._below[block.key] = tuple(dict.fromkeys(stones))
        label = self._label(block.namespace)
        return max((s.time for s in stones if s.covers(block.namespace, label)), default=-math.inf)


def buried(blocks: Iterable[Dated], labels: Mapping[bytes, Labelled], tombstones: Iterable[Tombstone]) -> set[BlockKey]:
    """Keys of the dead among ``blocks``, which come parents first."""
    graves = Graves(labels.get, tombstones)
    return {block.key for block in blocks if graves.dead(block)}
