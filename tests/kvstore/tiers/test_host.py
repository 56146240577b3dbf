"""Host memory as a tier, and the slots it hands out."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvstore.envelope import HEADER_BYTES
from kvstore.errors import ConfigError
from kvstore.identity import BlockKey
from kvstore.node.arena import Arena
from kvstore.testing.blocks import random_block, random_chain
from kvstore.testing.conformance import Damage, TierConformance, put
from kvstore.tiers.base import PutResult, Tier
from kvstore.tiers.host import HostTier

MIB = 1 << 20


class TestHostTier(TierConformance):
    async def open(self, directory: Path, capacity_bytes: int) -> Tier:
        return HostTier(Arena.create(capacity_bytes, epoch=1), extent_bytes=4 * MIB)

    async def damage(self, tier: Tier, key: BlockKey, how: Damage) -> bool:
        assert isinstance(tier, HostTier)
        offset = tier.pin(key)
        assert offset is not None
        tier.unpin(key, offset)
        slot = tier.slot(offset)
        if how is Damage.PAYLOAD_BIT:
            slot[HEADER_BYTES] ^= 1
        elif how is Damage.HEADER_BIT:
            slot[40] ^= 1
        else:
            return False
        return True


@pytest.fixture
def host() -> Iterator[HostTier]:
    tier = HostTier(Arena.create(4 * MIB, epoch=1), extent_bytes=MIB)
    yield tier
    tier.arena.close()


async def test_a_deleted_block_keeps_its_slot_until_the_last_pin_is_gone(host: HostTier) -> None:
    block = random_block(random.Random(1), 900_000)
    await put(host, block)
    offset = host.pin(block.key)
    assert offset == host.pin(block.key)
    assert await host.delete([block.key]) == 1
    assert block.key not in host.keys()
    assert bytes(host.slot(offset)[: len(block.envelope)]) == bytes(block.envelope)
    assert host.stats().used_bytes == len(block.envelope)
    await put(host, block)  # stored anew elsewhere: unpinning the old slot must not touch the new one
    host.unpin(block.key, offset)
    host.unpin(block.key, offset)
    assert host.stats().used_bytes == len(block.envelope)
    assert host.pin(block.key) != offset


async def test_when_everything_is_pinned_there_is_no_room(host: HostTier) -> None:
    source = random.Random(1)
    blocks = [random_block(source, 900_000) for _ in range(5)]
    for block in blocks[:4]:
        assert await put(host, block) is PutResult.STORED
        host.pin(block.key)
    assert await put(host, blocks[4]) is PutResult.REFUSED
    host.unpin(blocks[2].key, host.pin(blocks[2].key) or 0)
    host.unpin(blocks[2].key, int(host.index.location[host.index.row(blocks[2].key)]))
    assert await put(host, blocks[4]) is PutResult.STORED
    assert blocks[2].key not in host.keys()


async def test_a_new_size_class_takes_the_least_valuable_extent(host: HostTier) -> None:
    source = random.Random(1)
    small = random_chain(source, 4 * (MIB // (HEADER_BYTES + 200_704)), 200_000)
    for block in small:
        assert await put(host, block) is PutResult.STORED
    host.touch([block.key for block in small[:5]])
    large = random_block(source, 900_000)
    assert await put(host, large) is PutResult.STORED
    kept = [block.key in host.keys() for block in small]
    assert kept.count(False) == MIB // (HEADER_BYTES + 200_704)
    assert all(kept[:5])
    assert host.stats().used_bytes <= 4 * MIB


async def test_an_extent_with_a_slot_being_written_is_not_taken(host: HostTier) -> None:
    source = random.Random(1)
    for _ in range(4):  # one stored block and two being written in each extent
        assert await put(host, random_block(source, 300_000)) is PutResult.STORED
        assert host.allocate(HEADER_BYTES + 303_104) is not None
        assert host.allocate(HEADER_BYTES + 303_104) is not None
    assert await put(host, random_block(source, 900_000)) is PutResult.REFUSED


def test_an_arena_smaller_than_an_extent_is_refused() -> None:
    arena = Arena.create(MIB, epoch=1)
    with pytest.raises(ConfigError, match=r"host\.bytes"):
        HostTier(arena, extent_bytes=2 * MIB)
    arena.close()
