"""The disk tier against the contract of all tiers."""

from __future__ import annotations

import os
import random
from pathlib import Path

from kvstore.identity import BlockKey
from kvstore.testing.blocks import random_block
from kvstore.testing.conformance import Damage, TierConformance
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
        slot = find_slot(self.directory, key)
        match how:
            case Damage.PAYLOAD_BIT:
                flip(*slot, 4096 + 17)
            case Damage.HEADER_BIT:
                flip(*slot, 40)
            case Damage.TRUNCATED:
                os.truncate(slot[0], slot[1] + 5000)
            case Damage.SWAPPED:
                overwrite(*slot, bytes(random_block(random.Random(9), 100_000).envelope))
            case Damage.OVERSIZE:
                return False  # a slot has no length of its own
        return True


def find_slot(directory: Path, key: BlockKey) -> tuple[Path, int]:
    """File and position of a block's envelope."""
    for path in sorted(directory.glob("segment-*")):
        data = path.read_bytes()
        for start in range(4096, len(data), 4096):
            if data[start : start + 8] == b"KVBLOCK\x00" and data[start + 32 : start + 48] == key:
                return path, start
    raise LookupError(key.hex())


def flip(path: Path, start: int, byte: int) -> None:
    overwrite(path, start + byte, bytes([path.read_bytes()[start + byte] ^ 4]))


def overwrite(path: Path, start: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(start)
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
