"""Each tier tells what it gave up, and for which block."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest
import pytest_asyncio

from kvstore.identity import BlockKey
from kvstore.node.arena import Arena
from kvstore.testing.blocks import random_block
from kvstore.tiers.base import Medium, Tier
from kvstore.tiers.disk import DiskTier
from kvstore.tiers.host import HostTier
from kvstore.tiers.object import ObjectSettings, ObjectTier

MIB = 1 << 20
PAYLOAD = 200_000


@pytest_asyncio.fixture(params=[Medium.HOST, Medium.DISK, Medium.OBJECT], ids=lambda medium: medium.value)
async def tier(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Tier]:
    """Room for some ten blocks."""
    match request.param:
        case Medium.HOST:
            tier: Tier = HostTier(Arena.create(2 * MIB, epoch=1), extent_bytes=MIB)
        case Medium.DISK:
            tier = await DiskTier.open(tmp_path, 4 * MIB, segment_bytes=MIB)
        case Medium.OBJECT:
            tier = await ObjectTier.open(ObjectSettings(url=f"file://{tmp_path}", capacity_bytes=2 * MIB))
    yield tier
    await tier.close()


async def test_evictions_are_told_with_the_newcomer(tier: Tier) -> None:
    told: list[tuple[Medium, Sequence[BlockKey], BlockKey | None]] = []
    tier.on_evict = lambda medium, keys, newcomer: told.append((medium, list(keys), newcomer))
    source = random.Random(1)
    offered = []
    for _ in range(60):
        block = random_block(source, PAYLOAD)
        offered.append(block.key)
        await tier.put(block.header, block.envelope)
    gone = [key for _, keys, _ in told for key in keys]
    assert len(gone) == len(set(gone)) == tier.stats().evicted > 20
    assert not set(gone) & set(tier.keys())
    assert set(gone) | set(tier.keys()) == set(offered)
    assert {medium for medium, _, _ in told} == {tier.medium}
    for _, keys, newcomer in told:
        assert newcomer is not None
        assert offered.index(newcomer) > max(map(offered.index, keys)), "room was made for a later block"


async def test_a_deletion_is_no_eviction(tier: Tier) -> None:
    told: list[BlockKey] = []
    tier.on_evict = lambda medium, keys, newcomer: told.extend(keys)
    block = random_block(random.Random(1), PAYLOAD)
    await tier.put(block.header, block.envelope)
    assert await tier.delete([block.key]) == 1
    assert told == []
