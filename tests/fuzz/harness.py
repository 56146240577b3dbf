"""Coverage-guided fuzzing of what is read from outside: ``python tests/fuzz/harness.py TARGET [CORPUS] [libFuzzer options]``.

Each target takes any bytes and may raise only what its callers handle; anything else ends the run, with the input in a file.
So does an input that takes long (``-timeout``) or allocates beyond a bound.
"""

from __future__ import annotations

import logging
import resource
import sys
import tempfile
from collections.abc import Callable, Coroutine
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import atheris
import structlog

with atheris.instrument_imports(include=["kvstore", "replication"]):
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from journal_cases import journal, one_journal

    from kvstore.catalog.cursors import SourceCursor
    from kvstore.catalog.documents import Document
    from kvstore.catalog.presence import Presence
    from kvstore.config import load
    from kvstore.envelope import HEADER_BYTES, MAX_PAYLOAD_BYTES, Header, crc32c
    from kvstore.errors import BlockCorrupt, ConfigError, IdentityError, ProtocolError
    from kvstore.identity import Namespace
    from kvstore.node.protocol import FrameDecoder, encode, split_keys
    from kvstore.parsing import parse_json
    from kvstore.policy.hotness import Hotness
    from kvstore.policy.pins import Pins, Wish
    from kvstore.policy.reuse import Traffic
    from kvstore.tenants.book import TenantBook
    from kvstore.tiers.object.hotness import HotnessSnapshot
    from kvstore.tiers.object.objects import Found
    from kvstore.tombstones import Tombstone
    from kvstore.warmth import read_warmth
    from replication.cursor import Cursor
    from replication.duties import read_standing
    from replication.manifest import Manifest, ManifestRefused, open_manifest, read_trusted
    from replication.pause import read_pauses
    from replication.receipts import _read_receipt
    from replication.retiring import read_retired
    from replication.topology import load_topology

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
SIGNATURE_BYTES = 64
MAX_DATA_BYTES = 1 << 30
"""Beyond it Python raises MemoryError, which no target expects. libFuzzer's own bound on resident memory cannot be used: it reads
the peak of the process, which the kernel hands down from whoever started it, and a test suite that has loaded torch is large."""


def protocol(data: bytes) -> None:
    """Frames as they come from a socket, in two pieces."""
    decoder = FrameDecoder()
    half = len(data) // 2
    with suppress(ProtocolError):
        for piece in (data[:half], data[half:]):
            for message in decoder.feed(piece):
                split_keys(message)


def envelope(data: bytes) -> None:
    """A block's header as it is, and with its checksum made good, so that its fields are read."""
    page = bytearray(data[:HEADER_BYTES].ljust(HEADER_BYTES, b"\x00"))
    with suppress(BlockCorrupt):
        Header.unpack(page)
    page[-4:] = crc32c(page[:-4]).to_bytes(4, "little")
    with suppress(BlockCorrupt):
        header = Header.unpack(page)
        if header.length > MAX_PAYLOAD_BYTES:
            raise AssertionError("a length beyond the bound")


def manifest(data: bytes) -> None:
    """Of another region, forged; and signed by a region that turned hostile."""
    with suppress(ManifestRefused):
        open_manifest(data, "na", KEY.public_key())
    with suppress(ManifestRefused):
        open_manifest(data[:-SIGNATURE_BYTES] + KEY.sign(data[:-SIGNATURE_BYTES]), "na", KEY.public_key())
    with suppress(ManifestRefused):
        read_trusted(data)


def documents(data: bytes) -> None:
    """What lies in a bucket, a catalog or a node's directory beside blocks and manifests."""
    with suppress(IdentityError):
        Tombstone.from_json(data)
    with suppress(ValueError, IdentityError):
        Namespace.from_dict(parse_json(data))
    with suppress(ProtocolError):
        HotnessSnapshot.unpack(data)
    with suppress(ValueError):
        Wish.unpack(data)
    document = Document("folder/name", data, 1, 2.0)
    Presence.unpack(document)
    SourceCursor.unpack(document)
    bucket: Any = OneObject(data)
    for reading in (
        Cursor.load(bucket, "na"), read_pauses(bucket), read_standing(bucket, "evictor"), read_retired(bucket),
        _read_receipt(bucket, Found("receipts/x/y.json", 1, None, 1.0)),
    ):  # fmt: skip
        ended(reading)
    with suppress(ValueError):
        Hotness.unpack(data)
    with suppress(ValueError):
        Traffic.unpack(data, 1.0)
    with suppress(ValueError):
        Pins.unpack(data, 1.0)
    (scratch() / "warmth.json").write_bytes(data)
    read_warmth(scratch())


@cache
def scratch() -> Path:
    return Path(tempfile.mkdtemp(prefix="fuzz-"))


class OneObject:
    """A bucket in which every object is this one."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    async def read(self, name: str, most: int) -> bytes:
        return self._data[:most]


def ended(work: Coroutine[Any, Any, object]) -> None:
    """Run what waits for nothing."""
    with suppress(StopIteration):
        work.send(None)


def configuration(data: bytes) -> None:
    """Files that an operator writes, and the same text as an override."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(data)
        file.flush()
        path = Path(file.name)
        with suppress(ConfigError):
            load(path, [], environ={}).settings()
        with suppress(ConfigError):
            load_topology(path)
        with suppress(ConfigError):
            TenantBook(path).tenants()
    with suppress(ConfigError):
        load(None, [data.decode("utf-8", "replace")], environ={}).settings()


TARGETS: dict[str, Callable[[bytes], None]] = {
    target.__name__: target for target in (protocol, envelope, journal, manifest, documents, configuration)
}


def seed(target: str) -> bytes:
    """A good input to begin with."""
    match target:
        case "protocol":
            return encode({"protocol": 1, "name": "x", "pid": 1}) + encode([1, "lookup", {"keys": bytes(32)}])
        case "envelope":
            page = bytearray(HEADER_BYTES)
            header = Header(key=bytes(range(16)), namespace=bytes(16), index=1, tokens=64, length=5, crc=7, created=1.0)  # type: ignore[arg-type]
            header.pack_into(page)
            return bytes(page)
        case "journal":
            return one_journal()
        case "manifest":
            stone = Tombstone(time=1.0, tenant="acme")
            offer = Manifest(region="na", sequence=1, published=1.0, labels={}, blocks=[], tombstones=[stone])
            return offer.sealed(KEY)
        case "documents":
            return Tombstone(time=1.0, tenant="acme").to_json().encode()
    return b'[host]\nbytes = "4GiB"\n[node]\nallow_uids = [1000]\n[api]\nlisten = "127.0.0.1:7070"\n'


def main() -> None:
    name, *options = sys.argv[1:]
    resource.setrlimit(resource.RLIMIT_DATA, (MAX_DATA_BYTES, MAX_DATA_BYTES))
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "seed").write_bytes(seed(name))
        atheris.Setup([sys.argv[0], "-rss_limit_mb=0", *options, folder], TARGETS[name])
        atheris.Fuzz()


if __name__ == "__main__":
    main()
