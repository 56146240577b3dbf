"""The signed list of a region's hot blocks, which other regions pull.

It carries keyed hashes, sizes and scores, and the name of model and tenant of each namespace: nothing that tells what is in
a prompt. It is signed with Ed25519 rather than with a shared secret, because who can check a shared secret can also forge
with it: one mirror that is broken into must not be able to speak for the source.

    8 bytes magic | u32 length of the body | body (msgpack) | 64 bytes signature of all before

A block takes 38 bytes in the body, so the bound of 16 MiB holds some 440,000 blocks: 3 TB of an 8B model.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgpack
import numpy as np
import numpy.typing as npt
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from kvstore.envelope import MAX_PAYLOAD_BYTES, envelope_bytes
from kvstore.errors import IdentityError, KVStoreError
from kvstore.identity import KEY_BYTES, NO_PARENT, BlockKey
from kvstore.tombstones import Tombstone

MAX_MANIFEST_BYTES = 16 << 20
MAX_TOMBSTONES = 10_000
MAX_NAMESPACES = 10_000

_MAGIC = b"KVHOT\x00\x00\x01"
_PREFIX = struct.Struct("<8sI")
_SIGNATURE_BYTES = 64
_ROW = np.dtype(
    [
        ("key", f"V{KEY_BYTES}"),
        ("parent", "<i4"),
        ("namespace", "<u2"),
        ("length", "<u4"),
        ("created", "<f8"),
        ("score", "<f4"),
    ]
)
BLOCK_BYTES = _ROW.itemsize
"""What one block takes in a manifest."""

Rows = npt.NDArray[np.void]
"""Blocks as a structured array: ``key``, ``parent`` (a row, -1 for none), ``namespace`` (a place among the labels),
``length``, ``created`` and ``score`` as in ``HotBlock``."""


class ManifestRefused(KVStoreError):
    """A manifest that must not be believed; the message says why."""

    def __init__(self, reason: str, detail: str) -> None:
        """``reason`` is one of a few words, for counting."""
        super().__init__(f"{reason}: {detail}")
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Label:
    """What people call a namespace."""

    digest: bytes
    model: str
    tenant: str
    block_tokens: int


@dataclass(frozen=True, slots=True)
class HotBlock:
    """A block worth copying."""

    key: BlockKey
    parent: BlockKey
    namespace: bytes
    length: int
    """Payload bytes."""
    created: float
    """Seconds since the epoch, from the block's header."""
    score: float
    """Prefill seconds that this block is expected to save; never negative."""

    @property
    def nbytes(self) -> int:
        """Size of the object."""
        return envelope_bytes(self.length)


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What one region had to offer at one time."""

    region: str
    sequence: int
    """Grows with every publication."""
    published: float
    """Seconds since the epoch."""
    labels: Mapping[bytes, Label]
    """Of every namespace among the blocks, by digest."""
    blocks: Sequence[HotBlock]
    """Every block after its parent; a parent is listed or ``NO_PARENT``."""
    tombstones: Sequence[Tombstone] = ()

    def sealed(self, key: Ed25519PrivateKey) -> bytes:
        """The signed form. Raises ManifestRefused when it would be larger than any reader accepts."""
        places = {digest: place for place, digest in enumerate(self.labels)}
        rows = {block.key: row for row, block in enumerate(self.blocks)}
        table = np.array(
            [(b.key, rows.get(b.parent, -1), places[b.namespace], b.length, b.created, b.score) for b in self.blocks],
            dtype=_ROW,
        )
        body = msgpack.packb(
            [
                self.region,
                self.sequence,
                self.published,
                [[label.digest, label.model, label.tenant, label.block_tokens] for label in self.labels.values()],
                table.tobytes(),
                [stone.to_json() for stone in self.tombstones],
            ]
        )
        text: bytes = _PREFIX.pack(_MAGIC, len(body)) + body
        if len(text) + _SIGNATURE_BYTES > MAX_MANIFEST_BYTES:
            raise ManifestRefused("oversize", f"{len(text)} bytes are more than the bound of {MAX_MANIFEST_BYTES}")
        return text + key.sign(text)


@dataclass(frozen=True, slots=True)
class Table:
    """A manifest as it is packed: 38 bytes a block, where objects take hundreds."""

    region: str
    sequence: int
    published: float
    labels: Sequence[Label]
    rows: Rows
    """Every block after its parent."""
    tombstones: Sequence[Tombstone]


def open_manifest(raw: bytes, region: str, key: Ed25519PublicKey, newest: int = 0) -> Manifest:
    """Check and read a manifest that says it comes from ``region``.

    ``newest`` is the highest sequence seen from there. Raises ManifestRefused: truncated, oversize, forged, of another
    region, replayed, or not well-formed.
    """
    return _manifest(open_table(raw, region, key, newest))


def open_table(raw: bytes, region: str, key: Ed25519PublicKey, newest: int = 0) -> Table:
    """The same, as arrays."""
    body = _body(raw)
    try:
        key.verify(raw[-_SIGNATURE_BYTES:], raw[:-_SIGNATURE_BYTES])
    except InvalidSignature:
        raise ManifestRefused("forged", f"the signature is not that of region {region!r}") from None
    table = _table(body)
    if table.region != region:
        raise ManifestRefused("misplaced", f"it speaks for region {table.region!r}, not {region!r}")
    if table.sequence < newest:
        raise ManifestRefused("replayed", f"its sequence {table.sequence} is older than {newest}")
    return table


def read_trusted(raw: bytes) -> Manifest:
    """Read a manifest from a bucket that is ours, where it was checked before it was kept. Raises ManifestRefused."""
    return _manifest(_table(_body(raw)))


def _body(raw: bytes) -> memoryview:
    if len(raw) > MAX_MANIFEST_BYTES:
        raise ManifestRefused("oversize", f"{len(raw)} bytes are more than the bound of {MAX_MANIFEST_BYTES}")
    if len(raw) < _PREFIX.size + _SIGNATURE_BYTES:
        raise ManifestRefused("truncated", f"only {len(raw)} bytes")
    magic, length = _PREFIX.unpack_from(raw)
    if magic != _MAGIC:
        raise ManifestRefused("unknown", "not a manifest, or of another version")
    expected = _PREFIX.size + length + _SIGNATURE_BYTES
    if len(raw) != expected:
        raise ManifestRefused("truncated", f"{len(raw)} bytes where {expected} were announced")
    return memoryview(raw)[_PREFIX.size : -_SIGNATURE_BYTES]


def _manifest(table: Table) -> Manifest:
    return Manifest(
        region=table.region,
        sequence=table.sequence,
        published=table.published,
        labels={label.digest: label for label in table.labels},
        blocks=_blocks(table.rows, table.labels),
        tombstones=table.tombstones,
    )


def _table(body: memoryview) -> Table:
    try:
        match msgpack.unpackb(body):
            case [str(region), int(sequence), float(published), list(names), bytes(rows), list(stones)]:
                labels = [_label(name) for name in names]
                return Table(region, sequence, published, labels, _rows(rows, labels), _tombstones(stones))
    except (ValueError, TypeError, OverflowError, IdentityError, msgpack.UnpackException) as error:
        raise ManifestRefused("malformed", str(error)) from None
    raise ManifestRefused("malformed", "not the fields of a manifest")


def _label(fields: Any) -> Label:
    match fields:
        case [bytes(digest), str(model), str(tenant), int(block_tokens)] if len(digest) == KEY_BYTES:
            return Label(digest, model, tenant, block_tokens)
    raise ManifestRefused("malformed", "not a namespace")


def _tombstones(texts: list[Any]) -> list[Tombstone]:
    if len(texts) > MAX_TOMBSTONES:
        raise ManifestRefused("malformed", f"{len(texts)} tombstones")
    return [Tombstone.from_json(text) for text in texts]


def _rows(raw: bytes, labels: Sequence[Label]) -> Rows:
    if len(labels) > MAX_NAMESPACES:
        raise ManifestRefused("malformed", f"{len(labels)} namespaces")
    table = np.frombuffer(raw, dtype=_ROW)
    parents = table["parent"]
    sound = (
        np.all((parents >= -1) & (parents < np.arange(len(table))))
        and np.all(table["namespace"] < len(labels))
        and np.all(table["length"] <= MAX_PAYLOAD_BYTES)
        and np.all(np.isfinite(table["created"]))
        and np.all(np.isfinite(table["score"]) & (table["score"] >= 0))
    )
    if not sound:
        raise ManifestRefused("malformed", "a block that cannot be")
    return table


def _blocks(table: Rows, labels: Sequence[Label]) -> list[HotBlock]:
    keys = [BlockKey(key.tobytes()) for key in table["key"]]
    if len(set(keys)) != len(keys):
        raise ManifestRefused("malformed", "a block is listed twice")
    columns = (table[name].tolist() for name in ("parent", "namespace", "length", "created", "score"))
    return [
        HotBlock(key, keys[parent] if parent >= 0 else NO_PARENT, labels[place].digest, length, created, score)
        for key, parent, place, length, created, score in zip(keys, *columns, strict=True)
    ]
