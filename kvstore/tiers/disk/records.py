"""The journal's records: 64 bytes each, with a checksum of its own. Pure: bytes in, values out.

A snapshot of the index, the outcome of a replay and the outcome of a scan are all arrays of PUT records.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kvstore.envelope import HEADER_BYTES, Header, crc32c
from kvstore.identity import KEY_BYTES, NO_PARENT, BlockKey
from kvstore.index import BlockIndex

RECORD = np.dtype(
    [
        ("crc", "<u4"),  # of the 60 bytes that follow
        ("kind_hits", "<u4"),  # kind in the top 4 bits
        ("key", f"V{KEY_BYTES}"),  # of a NAMESPACE record: the digest
        ("parent", f"V{KEY_BYTES}"),
        ("slot", "<u4"),  # offset / 4 KiB
        ("length", "<u4"),
        ("depth", "<u4"),
        ("tokens", "<u2"),
        ("namespace", "<u2"),  # number given by a NAMESPACE record before
        ("accessed", "<f8"),  # seconds since the epoch
    ]
)
RECORD_BYTES = RECORD.itemsize
ADDRESSABLE_BYTES = HEADER_BYTES << 32
"""What slot numbers of 32 bits can address: 16 TiB."""

PUT, DELETE, TOUCH, NAMESPACE = 1, 2, 3, 4
MAX_NAMESPACES = 1 << 16

_KIND_SHIFT = 28
_MAX_HITS = (1 << _KIND_SHIFT) - 1
_BODY = struct.Struct("<I16s16sIIIHHd")
_CRC = struct.Struct("<I")

Records = npt.NDArray[np.void]


class Put(NamedTuple):
    """A block whose bytes are durable in a slot."""

    header: Header
    offset: int
    accessed: float


class Delete(NamedTuple):
    """A block given up; it names the slot, so that a later copy elsewhere is not meant."""

    key: BlockKey
    offset: int


class Touch(NamedTuple):
    """The use of a block so far."""

    key: BlockKey
    hits: int
    accessed: float


Entry = Put | Delete | Touch


class Blocks(NamedTuple):
    """Blocks and where they are: PUT records, the newest last, and the namespaces that they refer to by number."""

    records: Records
    namespaces: list[bytes]


def encode(entries: Iterable[Entry], namespaces: dict[bytes, int]) -> bytes:
    """Records of ``entries``. A namespace that is not in ``namespaces`` is numbered, added, and gets a record too."""
    out = []
    for entry in entries:
        match entry:
            case Put(header, offset, accessed):
                if header.namespace not in namespaces:
                    namespaces[header.namespace] = len(namespaces)
                    out.append(_namespace(header.namespace, namespaces[header.namespace]))
                out.append(
                    _record(
                        PUT,
                        header.key,
                        parent=header.parent,
                        offset=offset,
                        length=header.length,
                        depth=header.index,
                        tokens=header.tokens,
                        namespace=namespaces[header.namespace],
                        accessed=accessed,
                    )
                )
            case Delete(key, offset):
                out.append(_record(DELETE, key, offset=offset))
            case Touch(key, hits, accessed):
                out.append(_record(TOUCH, key, hits=hits, accessed=accessed))
    return b"".join(out)


def encode_blocks(blocks: Blocks) -> bytes:
    """The shortest journal that says what ``blocks`` says."""
    body = np.ascontiguousarray(blocks.records).view(np.uint8).reshape(-1, RECORD_BYTES)
    out = bytearray(body.tobytes())
    view = memoryview(out)
    for start in range(0, len(out), RECORD_BYTES):
        _CRC.pack_into(out, start, crc32c(view[start + _CRC.size : start + RECORD_BYTES]))
    return b"".join(_namespace(*named[::-1]) for named in enumerate(blocks.namespaces)) + bytes(out)


def decode(data: bytes) -> tuple[Records, bool]:
    """The records up to the first bad one, and whether nothing but a torn tail follows it."""
    records = np.frombuffer(data, RECORD, len(data) // RECORD_BYTES)
    view = memoryview(data)
    stored = records["crc"].tolist()
    good = np.fromiter(
        (
            crc == crc32c(view[start + _CRC.size : start + RECORD_BYTES])
            for crc, start in zip(stored, range(0, len(data), RECORD_BYTES), strict=False)
        ),
        dtype=bool,
        count=len(records),
    )
    end = len(records) if good.all() else int(np.argmin(good))
    return records[:end], not good[end:].any()


def kinds(records: Records) -> npt.NDArray[np.uint32]:
    return np.asarray(records["kind_hits"] >> _KIND_SHIFT)


def hits(records: Records) -> npt.NDArray[np.uint32]:
    return np.asarray(records["kind_hits"] & _MAX_HITS)


def put_word(hits: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint32]:
    """The ``kind_hits`` of PUT records."""
    return np.asarray((PUT << _KIND_SHIFT) | np.minimum(hits, _MAX_HITS), dtype=np.uint32)


def offsets(records: Records) -> npt.NDArray[np.int64]:
    return records["slot"].astype(np.int64) * HEADER_BYTES


def snapshot(index: BlockIndex) -> Blocks:
    """All blocks of an index."""
    rows = index.used()
    records = np.zeros(len(rows), RECORD)
    records["key"], records["parent"] = index.identities(rows)
    records["kind_hits"] = put_word(index.hits[rows])
    records["slot"] = index.location[rows] // HEADER_BYTES
    records["length"] = index.length[rows]
    records["depth"] = index.depth[rows]
    records["tokens"] = index.tokens[rows]
    numbers, records["namespace"] = np.unique(index.namespace[rows], return_inverse=True)
    records["accessed"] = index.accessed[rows]
    return Blocks(records, [index.namespaces[number] for number in numbers])


def _namespace(digest: bytes, number: int) -> bytes:
    return _record(NAMESPACE, BlockKey(digest), namespace=number)


def _record(
    kind: int,
    key: BlockKey,
    *,
    hits: int = 0,
    parent: BlockKey = NO_PARENT,
    offset: int = 0,
    length: int = 0,
    depth: int = 0,
    tokens: int = 0,
    namespace: int = 0,
    accessed: float = 0.0,
) -> bytes:
    body = _BODY.pack(
        kind << _KIND_SHIFT | min(hits, _MAX_HITS),
        key,
        parent,
        offset // HEADER_BYTES,
        length,
        depth,
        tokens,
        namespace,
        accessed,
    )
    return _CRC.pack(crc32c(body)) + body


assert _CRC.size + _BODY.size == RECORD_BYTES
