"""The disk tier against the contract of all tiers."""

from __future__ import annotations

import os
import random
from pathlib import Path

from disk_files import find_slot, flip, overwrite
from hypothesis import settings

from kvstore.identity import BlockKey
from kvstore.testing.blocks import random_block
from kvstore.testing.conformance import Damage, TierConformance
from kvstore.testing.stateful import TierMachine
from kvstore.tiers.base import Tier
from kvstore.tiers.disk import DiskTier

SEGMENT_BYTES = 5 << 20


class TestDiskTier(TierConformance):
    async def open(self, directory: Path, capacity_bytes: int) -> Tier:
        self.directory, self.capacity = directory, capacity_bytes
        return await DiskTier.open(directory, capacity_bytes, segment_bytes=SEGMENT_BYTES)

    async def reopen(self, tier: Tier) -> Tier:
        await tier.close()
        return await DiskTier.open(self.directory, self.capacity, segment_bytes=SEGMENT_BYTES)

    async def damage(self, tier: Tier, key: BlockKey, how: Damage) -> bool:
        path, start = find_slot(self.directory, key)
        match how:
            case Damage.PAYLOAD_BIT:
                flip(path, start + 4096 + 17)
            case Damage.HEADER_BIT:
                flip(path, start + 40)
            case Damage.TRUNCATED:
                os.truncate(path, start + 5000)
            case Damage.SWAPPED:
                overwrite(path, start, bytes(random_block(random.Random(9), 100_000).envelope))
            case Damage.OVERSIZE:
                return False  # a slot has no length of its own
        return True


class DiskMachine(TierMachine):
    async def open(self, directory: Path) -> Tier:
        return await DiskTier.open(directory, self.CAPACITY_BYTES, segment_bytes=320 << 10)

    async def reopen(self, tier: Tier) -> Tier:
        await tier.close()
        return await self.open(self.directory)


TestDiskMachine = DiskMachine.TestCase
TestDiskMachine.settings = settings(max_examples=40, stateful_step_count=40)
