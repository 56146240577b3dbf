"""A disk tier whose journal says anything: what it takes for blocks lies in its segments, each in a slot of its own."""

from __future__ import annotations

import asyncio
import random
import tempfile
from functools import cache
from itertools import pairwise
from pathlib import Path

from kvstore.envelope import crc32c
from kvstore.index import slot_sizes
from kvstore.testing.blocks import random_chain
from kvstore.tiers.disk import DiskTier
from kvstore.tiers.disk.files import Files
from kvstore.tiers.disk.opening import open_directory
from kvstore.tiers.disk.records import RECORD_BYTES

CHECKSUM_BYTES = 4
"""At the start of a record."""
DISK_BYTES = 8 << 20


def journal(data: bytes) -> None:
    """As it is, and with its records' checksums made good, so that they are replayed."""
    recovered(data)
    whole = bytearray(data)
    for start in range(0, len(data) - RECORD_BYTES + 1, RECORD_BYTES):
        record = whole[start + CHECKSUM_BYTES : start + RECORD_BYTES]
        whole[start : start + CHECKSUM_BYTES] = crc32c(record).to_bytes(CHECKSUM_BYTES, "little")
    recovered(bytes(whole))


def recovered(data: bytes) -> None:
    """Open a disk tier whose journal says that: its blocks lie in its segments, each in a slot of its own."""
    (disk() / "journal").write_bytes(data)
    opened = open_directory(disk(), DISK_BYTES, None, 1, Unsynced())
    with opened.resources:
        index = opened.index
        rows = index.used()
        starts = index.location[rows].tolist()
        ends = [start + size for start, size in zip(starts, slot_sizes(index.length[rows]).tolist(), strict=True)]
        slots = sorted(zip(starts, ends, strict=True))
        assert all(start >= 0 and end <= opened.slots.capacity for start, end in slots)
        assert all(before[1] <= after[0] for before, after in pairwise(slots))


class Unsynced(Files):
    """Nobody pulls the plug here."""

    def fdatasync(self, fd: int) -> None:
        pass


@cache
def disk() -> Path:
    """The directory of a disk tier with three blocks in it."""
    directory = Path(
        tempfile.mkdtemp(prefix="fuzz-")
    )  # libFuzzer ends the process without a word: who started it cleans up

    async def fill() -> None:
        tier = await DiskTier.open(directory, DISK_BYTES, segment_bytes=DISK_BYTES // 8, threads=1)
        for block in random_chain(random.Random(1), 3, 5000):
            await tier.put(block.header, memoryview(block.envelope))
        await tier.close()

    asyncio.run(fill())
    return directory


@cache
def one_journal() -> bytes:
    """A sound one: a namespace and three blocks."""
    return (disk() / "journal").read_bytes()[: 4 * RECORD_BYTES]
