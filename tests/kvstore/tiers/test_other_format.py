"""Nodes of two versions on one bucket: what the other one wrote is a miss, and stays."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from kvstore.envelope import HEADER_BYTES, Header, crc32c
from kvstore.errors import BlockNotFound, OtherFormat
from kvstore.testing.blocks import aligned_buffer, random_block
from kvstore.testing.conformance import PAYLOAD_BYTES, put
from kvstore.tiers.object import ObjectSettings, ObjectTier

VERSION_AT, CRC_BYTES = 8, 4


def of_a_later_version(path: Path) -> None:
    """Have a stored block say so, in a header that is whole."""
    data = bytearray(path.read_bytes())
    data[VERSION_AT] += 1
    data[HEADER_BYTES - CRC_BYTES : HEADER_BYTES] = crc32c(data[: HEADER_BYTES - CRC_BYTES]).to_bytes(
        CRC_BYTES, "little"
    )
    path.write_bytes(data)


async def test_a_block_of_another_format_is_a_miss_and_is_left_alone(tmp_path: Path) -> None:
    settings = ObjectSettings(url=f"file://{tmp_path}/store")
    block = random_block(random.Random(1), PAYLOAD_BYTES)
    tier = await ObjectTier.open(settings)
    await tier.ready.wait()
    await put(tier, block)
    await tier.close()
    (stored,) = (path for path in (tmp_path / "store").rglob("*") if path.is_file() and block.key.hex() in path.name)
    of_a_later_version(stored)
    theirs = stored.read_bytes()
    with pytest.raises(OtherFormat):
        Header.unpack(theirs[:HEADER_BYTES])

    tier = await ObjectTier.open(settings)
    await tier.ready.wait()
    for room in (block.header.envelope_bytes, HEADER_BYTES):
        with pytest.raises(BlockNotFound):
            await tier.get(block.key, aligned_buffer(room))
    assert tier.stats().quarantined == 0
    await put(tier, block)
    await tier.close()
    assert stored.read_bytes() == theirs
