"""Manifests: what goes in comes out, and whatever is not the publisher's word is refused by name."""

from __future__ import annotations

import random
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st
from region_cases import KEY, chain, hot, manifest_of

from kvstore.errors import IdentityError
from kvstore.identity import BlockKey
from kvstore.tombstones import Tombstone, buried
from replication.manifest import (
    BLOCK_BYTES,
    MAX_MANIFEST_BYTES,
    HotBlock,
    Label,
    Manifest,
    ManifestRefused,
    open_manifest,
    read_trusted,
)

PUBLIC = KEY.public_key()
LABELS = {b"n" * 16: Label(b"n" * 16, "llama", "bank", 64)}


@pytest.fixture(scope="module")
def raw() -> bytes:
    blocks = hot(chain(random.Random(1), 5))
    return manifest_of(blocks, sequence=7, tombstones=[Tombstone(time=3.0, tenant="gone")]).sealed(KEY)


@st.composite
def forests(draw: st.DrawFn) -> list[HotBlock]:
    """Blocks with parents first."""
    count = draw(st.integers(0, 12))
    keys = draw(st.lists(st.binary(min_size=16, max_size=16).filter(any), min_size=count, max_size=count, unique=True))
    blocks: list[HotBlock] = []
    for place, key in enumerate(keys):
        parent = draw(st.integers(-1, place - 1))
        above = BlockKey(keys[parent]) if parent >= 0 else BlockKey(bytes(16))
        score = draw(st.floats(0, 1e6, width=32))
        blocks.append(HotBlock(BlockKey(key), above, b"n" * 16, draw(st.integers(0, 1 << 30)), 1.5, score))
    return blocks


@given(forests(), st.text(max_size=20), st.integers(0, 2**60))
def test_what_is_sealed_is_read(blocks: list[HotBlock], model: str, sequence: int) -> None:
    labels = {b"n" * 16: Label(b"n" * 16, model, "tenant", 64)}
    stones = (Tombstone(time=1.0, prefix=b"p" * 16, tenant="t"),)
    manifest = Manifest(
        region="na", sequence=sequence, published=2.0, labels=labels, blocks=blocks, tombstones=list(stones)
    )
    sealed = manifest.sealed(KEY)
    assert open_manifest(sealed, "na", PUBLIC) == manifest
    assert read_trusted(sealed) == manifest


@given(st.data())
def test_any_changed_byte_is_refused(raw: bytes, data: st.DataObject) -> None:
    place = data.draw(st.integers(0, len(raw) - 1))
    forged = bytearray(raw)
    forged[place] ^= data.draw(st.integers(1, 255))
    with pytest.raises(ManifestRefused):
        open_manifest(bytes(forged), "na", PUBLIC)


@given(st.binary(max_size=300))
def test_arbitrary_bytes_are_refused_and_nothing_else_is_raised(body: bytes) -> None:
    with pytest.raises(ManifestRefused):
        read_trusted(body)
    with pytest.raises(ManifestRefused):
        read_trusted(b"KVHOT\x00\x00\x01" + len(body).to_bytes(4, "little") + body + bytes(64))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda raw: raw[:-1], "truncated"),
        (lambda raw: raw[:40], "truncated"),
        (lambda raw: raw + bytes(1), "truncated"),
        (lambda raw: raw + bytes(MAX_MANIFEST_BYTES), "oversize"),
        (lambda raw: b"x" + raw[1:], "not a manifest"),
        (lambda raw: raw[:-64] + Ed25519PrivateKey.generate().sign(raw[:-64]), "forged"),
    ],
)
def test_the_reason_of_a_refusal_is_named(raw: bytes, change, reason: str) -> None:
    with pytest.raises(ManifestRefused, match=reason):
        open_manifest(change(raw), "na", PUBLIC)


def test_an_older_sequence_is_a_replay_and_the_same_one_is_not(raw: bytes) -> None:
    assert open_manifest(raw, "na", PUBLIC, newest=7).sequence == 7
    with pytest.raises(ManifestRefused, match="replayed"):
        open_manifest(raw, "na", PUBLIC, newest=8)


def test_a_manifest_of_another_region_is_refused_under_this_name(raw: bytes) -> None:
    with pytest.raises(ManifestRefused, match="speaks for region 'na'"):
        open_manifest(raw, "eu", PUBLIC)


def test_a_block_before_its_parent_or_listed_twice_is_refused() -> None:
    blocks = hot(chain(random.Random(2), 3))
    with pytest.raises(ManifestRefused, match="cannot be"):
        open_manifest(manifest_of(blocks[::-1]).sealed(KEY), "na", PUBLIC)
    with pytest.raises(ManifestRefused, match="twice"):
        open_manifest(manifest_of([blocks[0], blocks[0]]).sealed(KEY), "na", PUBLIC)


def test_a_manifest_that_no_reader_would_take_is_not_sealed() -> None:
    count = MAX_MANIFEST_BYTES // BLOCK_BYTES + 1
    block = hot(chain(random.Random(2), 1))[0]
    with pytest.raises(ManifestRefused, match="bound"):
        manifest_of([block] * count).sealed(KEY)


class TestTombstones:
    def block(self, key: bytes, parent: bytes = bytes(16), created: float = 5.0) -> HotBlock:
        return HotBlock(BlockKey(key * 16), BlockKey((parent * 16)[:16]), b"n" * 16, 10, created, 1.0)

    def chain(self) -> list[HotBlock]:
        return [self.block(b"a"), self.block(b"b", b"a"), self.block(b"c", b"b"), self.block(b"x")]

    @pytest.mark.parametrize(
        ("stone", "dead"),
        [
            (Tombstone(time=9.0, tenant="bank"), "abcx"),
            (Tombstone(time=9.0, tenant="bank", model="llama"), "abcx"),
            (Tombstone(time=9.0, tenant="bank", model="qwen"), ""),
            (Tombstone(time=9.0, tenant="other"), ""),
            (Tombstone(time=9.0, namespace=b"n" * 16), "abcx"),
            (Tombstone(time=9.0, prefix=b"b" * 16), "bc"),
            (Tombstone(time=9.0, prefix=b"b" * 16, tenant="other"), ""),
            (Tombstone(time=5.0, tenant="bank"), "abcx"),
            (Tombstone(time=4.9, tenant="bank"), ""),
        ],
    )
    def test_what_a_tombstone_buries(self, stone: Tombstone, dead: str) -> None:
        assert buried(self.chain(), LABELS, [stone]) == {BlockKey(c.encode() * 16) for c in dead}

    def test_what_was_computed_anew_lives(self) -> None:
        blocks = [self.block(b"a", created=5.0), self.block(b"b", b"a", created=10.0)]
        assert buried(blocks, LABELS, [Tombstone(time=9.0, model="llama")]) == {BlockKey(b"a" * 16)}

    def test_several_tombstones_over_one_chain(self) -> None:
        stones = [Tombstone(time=4.0, prefix=b"a" * 16), Tombstone(time=9.0, prefix=b"c" * 16)]
        assert buried(self.chain(), LABELS, stones) == {BlockKey(b"c" * 16)}

    @pytest.mark.parametrize(
        "fields",
        [{}, {"prefix": bytes(16)}, {"prefix": b"short"}, {"tenant": "x" * 1000}, {"model": "m", "time": -1.0}],
    )
    def test_a_tombstone_that_names_nothing_or_everything_is_refused(self, fields: dict[str, Any]) -> None:
        with pytest.raises(IdentityError):
            Tombstone(**{"time": 1.0, **fields})

    def test_json_and_back(self) -> None:
        stone = Tombstone(time=1.25, tenant="t", prefix=b"p" * 16)
        assert Tombstone.from_json(stone.to_json()) == stone
        assert stone.identity == Tombstone.from_json(stone.to_json()).identity
