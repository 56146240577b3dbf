"""The object tier keeps the contract of every tier, in a folder and on each S3 server."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path

import obstore
import pytest

from kvstore.envelope import HEADER_BYTES
from kvstore.identity import BlockKey
from kvstore.testing.blocks import NAMESPACE, random_block, random_chain
from kvstore.testing.conformance import PAYLOAD_BYTES, Damage, TierConformance, assert_holds, put
from kvstore.tiers.base import Tier
from kvstore.tiers.object import ObjectSettings, ObjectTier
from kvstore.tiers.object.names import block_name
from kvstore.tiers.object.objects import Objects


async def open_listed(settings: ObjectSettings) -> ObjectTier:
    tier = await ObjectTier.open(settings)
    await tier.ready.wait()
    return tier


def damaged(body: bytes, how: Damage, other: bytes) -> bytes:
    match how:
        case Damage.PAYLOAD_BIT:
            return body[:HEADER_BYTES] + bytes([body[HEADER_BYTES] ^ 1]) + body[HEADER_BYTES + 1 :]
        case Damage.HEADER_BIT:
            return body[:50] + bytes([body[50] ^ 1]) + body[51:]
        case Damage.TRUNCATED:
            return body[: len(body) // 2]
        case Damage.SWAPPED:
            return other
        case Damage.OVERSIZE:
            return body + bytes(HEADER_BYTES)


class ObjectConformance(TierConformance):
    settings: ObjectSettings

    async def open(self, directory: Path, capacity_bytes: int) -> Tier:
        return await open_listed(dataclasses.replace(self.settings, capacity_bytes=capacity_bytes))

    async def reopen(self, tier: Tier) -> Tier:
        assert isinstance(tier, ObjectTier)
        await tier.close()
        return await open_listed(tier.settings)

    async def damage(self, tier: Tier, key: BlockKey, how: Damage) -> bool:
        store = Objects.connect(self.settings).store
        other = random_block(random.Random(2), PAYLOAD_BYTES)
        name = block_name(NAMESPACE, key)
        body = bytes(obstore.get(store, name).bytes())
        obstore.put(store, name, damaged(body, how, bytes(other.envelope)))
        return True

    async def test_a_restart_keeps_everything(self, tier: Tier, source: random.Random) -> None:
        """Names and sizes, that is: uses are not written to the bucket, and headers are read when they are needed."""
        chain = random_chain(source, 12, PAYLOAD_BYTES)
        for block in chain:
            await put(tier, block)
        await tier.delete([chain[-1].key])
        used = tier.stats().used_bytes
        tier = await self.reopen(tier)
        try:
            assert set(tier.keys()) == {block.key for block in chain[:-1]}
            assert tier.stats().used_bytes == used
            for block in chain[:-1]:
                await assert_holds(tier, block)
                stat = tier.stat(block.key)
                assert stat is not None
                assert (stat.length, stat.parent, stat.index) == (
                    block.header.length,
                    block.header.parent,
                    block.header.index,
                )
        finally:
            await tier.close()

    @pytest.mark.skip("uses are not written to the bucket: after a restart, blocks count as used when they were stored")
    async def test_a_restart_keeps_the_order_of_eviction(self) -> None: ...


class TestFolder(ObjectConformance):
    @pytest.fixture(autouse=True)
    def _settings(self, tmp_path: Path) -> None:
        self.settings = ObjectSettings(url=f"file://{tmp_path}/store")


@pytest.mark.s3
class TestS3(ObjectConformance):
    @pytest.fixture(autouse=True)
    def _settings(self, s3_settings: ObjectSettings) -> None:
        self.settings = s3_settings
