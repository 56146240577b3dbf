"""The envelope: what goes in comes out, and anything else is told apart."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.envelope import (
    HEADER_BYTES,
    MAX_PAYLOAD_BYTES,
    Header,
    crc32c,
    envelope_bytes,
    payload,
    verify,
)
from kvstore.errors import BlockCorrupt
from kvstore.identity import BlockKey

sixteen = st.binary(min_size=16, max_size=16)
headers = st.builds(
    Header,
    key=sixteen.map(BlockKey),
    namespace=sixteen,
    parent=sixteen.map(BlockKey),
    index=st.integers(0, 2**32 - 1),
    tokens=st.integers(0, 2**32 - 1),
    length=st.integers(0, MAX_PAYLOAD_BYTES),
    crc=st.integers(0, 2**32 - 1),
    generation=st.integers(0, 2**64 - 1),
    created=st.integers(0, 2**32 * 10**6).map(lambda microseconds: microseconds / 1e6),
    codecs=st.lists(st.integers(1, 255), max_size=8).map(tuple),
)


def sealed(body: bytes) -> tuple[BlockKey, bytearray]:
    key = BlockKey(b"k" * 16)
    header = Header(key=key, namespace=b"n" * 16, index=0, tokens=64, length=len(body), crc=crc32c(body))
    buffer = bytearray(envelope_bytes(len(body)))
    header.pack_into(buffer)
    payload(buffer, len(body))[:] = body
    return key, buffer


@given(headers)
def test_a_header_comes_back_as_it_was_packed(header: Header) -> None:
    buffer = bytearray(HEADER_BYTES)
    header.pack_into(buffer)
    assert Header.unpack(buffer) == header


@given(headers)
def test_packing_again_gives_the_same_bytes(header: Header) -> None:
    first, second = bytearray(HEADER_BYTES), bytearray(b"\xff" * HEADER_BYTES)
    header.pack_into(first)
    Header.unpack(first).pack_into(second)
    assert first == second


@given(headers, st.integers(0, HEADER_BYTES * 8 - 1))
def test_any_flipped_bit_of_a_header_is_noticed(header: Header, bit: int) -> None:
    buffer = bytearray(HEADER_BYTES)
    header.pack_into(buffer)
    buffer[bit // 8] ^= 1 << bit % 8
    with pytest.raises(BlockCorrupt):
        Header.unpack(buffer)


@given(st.binary(max_size=2 * HEADER_BYTES))
def test_other_bytes_are_no_header(data: bytes) -> None:
    with pytest.raises(BlockCorrupt):
        Header.unpack(data)


@given(st.binary(max_size=10_000), st.data())
def test_any_flipped_bit_of_a_payload_is_noticed(body: bytes, data: st.DataObject) -> None:
    key, buffer = sealed(body)
    assert verify(buffer, key).length == len(body)
    if body:
        bit = data.draw(st.integers(0, len(body) * 8 - 1))
        buffer[HEADER_BYTES + bit // 8] ^= 1 << bit % 8
        with pytest.raises(BlockCorrupt, match="payload checksum"):
            verify(buffer, key)


@given(st.binary(min_size=1, max_size=10_000), st.data())
def test_a_short_payload_is_noticed(body: bytes, data: st.DataObject) -> None:
    key, buffer = sealed(body)
    end = data.draw(st.integers(0, HEADER_BYTES + len(body) - 1))
    with pytest.raises(BlockCorrupt):
        verify(memoryview(buffer)[:end], key)


def test_another_block_is_noticed() -> None:
    _, buffer = sealed(b"payload")
    with pytest.raises(BlockCorrupt, match="another block"):
        verify(buffer, BlockKey(b"x" * 16))


def test_a_length_beyond_the_bound_is_refused() -> None:
    header = Header(
        key=BlockKey(b"k" * 16), namespace=b"n" * 16, index=0, tokens=1, length=MAX_PAYLOAD_BYTES + 1, crc=0
    )
    buffer = bytearray(HEADER_BYTES)
    header.pack_into(buffer)
    with pytest.raises(BlockCorrupt, match="bound"):
        Header.unpack(buffer)


def test_crc32c_is_the_castagnoli_polynomial() -> None:
    """Check value of RFC 3720, which S3 uses too."""
    assert crc32c(b"123456789") == 0xE3069283
    assert crc32c(b"6789", crc32c(b"12345")) == 0xE3069283


@given(st.integers(0, MAX_PAYLOAD_BYTES))
def test_an_envelope_is_whole_pages(length: int) -> None:
    size = envelope_bytes(length)
    assert size % HEADER_BYTES == 0
    assert 0 <= size - HEADER_BYTES - length < HEADER_BYTES
