"""Documents that are sound but for some fields: what a fuzzer of bytes hardly ever makes."""

from __future__ import annotations

import asyncio
import copy
import json
from collections.abc import Callable, Coroutine
from typing import Any

import msgpack
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvstore.catalog.cursors import SourceCursor
from kvstore.catalog.documents import Document
from kvstore.catalog.presence import Presence
from kvstore.errors import IdentityError, ProtocolError
from kvstore.identity import NO_PARENT, BlockKey, Namespace
from kvstore.parsing import parse_json
from kvstore.policy.hotness import Hotness
from kvstore.policy.pins import Pins, Wish
from kvstore.tiers.object.hotness import HotnessSnapshot
from kvstore.tiers.object.objects import Found
from kvstore.tombstones import Tombstone
from replication.cursor import Cursor
from replication.lease import current
from replication.manifest import (
    _MAGIC,
    _PREFIX,
    _SIGNATURE_BYTES,
    HotBlock,
    Label,
    Manifest,
    ManifestRefused,
    open_manifest,
    open_table,
)
from replication.pause import read_pauses
from replication.receipts import _read_receipt

KEYS = [BlockKey(bytes([number]) * 16) for number in (1, 2, 3)]
NAMESPACE = Namespace(
    model="m", weights="1", dtype="float32", layers=1, kv_heads=1, head_dim=1, attention="gqa", rope="",
    block_tokens=16, layout="opaque:test",
)  # fmt: skip
SCALARS = (
    st.none() | st.booleans() | st.integers(-(1 << 63), (1 << 64) - 1) | st.floats() | st.text(max_size=8)
    | st.sampled_from([10**400, -1, 0, 1e308, "", "9" * 30])
)  # fmt: skip
ANYTHING = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)
PACKABLE = ANYTHING.filter(lambda value: "0" * 100 not in repr(value)) | st.binary(max_size=40)


def hotness() -> bytes:
    known = Hotness(60.0, prefixes=4, width=16)
    known.observe(KEYS, 1.0, 16, 4096)
    return known.pack()


def pins() -> bytes:
    known = Pins()
    known.heed(Wish(1.0, 2e9, b"".join(KEYS)), 1.0)
    return known.pack()


class OneObject:
    """A bucket in which every object is this one."""

    def __init__(self, body: bytes) -> None:
        self._body = body

    async def read(self, name: str, most: int) -> bytes:
        return self._body[:most]

    async def listing(self, prefix: str) -> list[Found]:
        return [Found(f"{prefix}/00000001.json", len(self._body), None, 1.0)]


def of_bucket(reading: Callable[[Any], Coroutine[Any, Any, object]]) -> Callable[[bytes], object]:
    return lambda body: asyncio.run(reading(OneObject(body)))


def of_catalog(unpack: Callable[[Document], object]) -> Callable[[bytes], object]:
    return lambda body: unpack(Document("folder/name", body, 1, 2.0))


NOWHERE: tuple[type[Exception], ...] = ()
JSON: dict[str, tuple[dict[str, Any], Callable[[bytes], object], tuple[type[Exception], ...]]] = {
    "tombstone": (json.loads(Tombstone(time=1.0, tenant="a").to_json()), Tombstone.from_json, (IdentityError,)),
    "namespace": (
        dict(NAMESPACE.to_dict()),
        lambda body: Namespace.from_dict(parse_json(body)),
        (ValueError, IdentityError),
    ),
    "presence": (json.loads(Presence.here("n", "eu", "").pack()), of_catalog(Presence.unpack), NOWHERE),
    "cursor": (
        {"source": "na", "sequence": 1, "published": 1.0, "caught_up": 1.0, "blocks": 1, "nbytes": 1, "updated": 1.0,
         "problem": ""},
        of_catalog(SourceCursor.unpack), NOWHERE,
    ),
    "cursor in the bucket": (
        {"source": "na", "sequence": 1, "spent": {"f": {"month": "2026-01", "nbytes": 1}}},
        of_bucket(lambda bucket: Cursor.load(bucket, "na")), NOWHERE,
    ),
    "pauses": ({"na": {"since": 1.0, "by": "me"}}, of_bucket(read_pauses), NOWHERE),
    "lease": ({"holder": "me", "expires": 2.0}, of_bucket(lambda bucket: current(bucket, "evictor")), NOWHERE),
    "receipt": (
        {"node": "n", "time": 1.0, "blocks": 2},
        of_bucket(lambda bucket: _read_receipt(bucket, Found("receipts/a/b.json", 1, None, 1.0))), NOWHERE,
    ),
}  # fmt: skip
PACKED: dict[str, tuple[bytes, Callable[[bytes], object], tuple[type[Exception], ...]]] = {
    "hotness": (hotness(), Hotness.unpack, (ValueError,)),
    "hotness in the bucket": (
        HotnessSnapshot(1.0, 60.0, {KEYS[0]: 1.0}, {KEYS[0]: 2.0}).pack(), HotnessSnapshot.unpack, (ProtocolError,)
    ),
    "wish": (Wish(1.0, 2.0, b"".join(KEYS)).pack(), Wish.unpack, (ValueError,)),
    "pins": (pins(), lambda body: Pins.unpack(body, 3.0), (ValueError,)),
}  # fmt: skip


def spoiled(draw: Any, sound: Any, values: st.SearchStrategy[Any]) -> Any:
    """With up to three of its parts replaced."""
    whole = [copy.deepcopy(sound)]
    for _ in range(draw(st.integers(1, 3))):
        holder: Any = whole
        place: Any = 0
        while isinstance(holder[place], list | dict) and holder[place] and draw(st.booleans()):
            holder = holder[place]
            place = draw(st.sampled_from(sorted(holder) if isinstance(holder, dict) else range(len(holder))))
        holder[place] = draw(values)
    return whole[0]


@pytest.mark.parametrize("kind", JSON)
@settings(max_examples=60, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_a_document_is_read_or_refused(kind: str, data: Any) -> None:
    sound, read, refusals = JSON[kind]
    read(json.dumps(sound).encode())
    try:
        read(json.dumps(spoiled(data.draw, sound, ANYTHING)).encode())
    except refusals:
        pass


@pytest.mark.parametrize("kind", PACKED)
@settings(max_examples=60, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_a_packed_document_is_read_or_refused(kind: str, data: Any) -> None:
    sound, read, refusals = PACKED[kind]
    read(sound)
    try:
        read(msgpack.packb(spoiled(data.draw, msgpack.unpackb(sound, strict_map_key=False), PACKABLE)))
    except refusals:
        pass


@settings(max_examples=60, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_a_manifest_is_read_or_refused(data: Any) -> None:
    """One that its region signed, so that only its fields speak against it."""
    key = Ed25519PrivateKey.generate()
    label = Label(NAMESPACE.digest, "m", "acme", 16)
    block = HotBlock(KEYS[0], NO_PARENT, label.digest, 4096, 1.0, 0.5)
    whole = Manifest(
        region="na", sequence=1, published=1.0, labels={label.digest: label}, blocks=[block],
        tombstones=[Tombstone(time=1.0, tenant="a")],
    ).sealed(key)  # fmt: skip
    start, end = _PREFIX.size, len(whole) - _SIGNATURE_BYTES
    body = msgpack.packb(spoiled(data.draw, msgpack.unpackb(whole[start:end]), PACKABLE))
    text = _PREFIX.pack(_MAGIC, len(body)) + body
    for raw in (whole, text + key.sign(text)):
        try:
            open_manifest(raw, "na", key.public_key())
            open_table(raw, "na", key.public_key())
        except ManifestRefused:
            assert raw is not whole
