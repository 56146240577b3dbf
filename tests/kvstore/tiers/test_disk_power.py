"""The disk tier when the power goes: writes that were not synced are lost or torn, in any combination."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest
from disk_files import RecordingFiles

from kvstore.envelope import payload
from kvstore.errors import BlockCorrupt
from kvstore.testing.blocks import SealedBlock, aligned_buffer, random_block
from kvstore.tiers.base import PutResult
from kvstore.tiers.disk import DiskTier, Files

SEGMENT_BYTES = 512 << 10
ROOMY_BYTES = 8 << 20
TIGHT_BYTES = 1 << 20
BLOCKS = 60
CUTS = 60


async def open_tier(directory: Path, capacity: int, files: Files) -> DiskTier:
    return await DiskTier.open(directory, capacity, segment_bytes=SEGMENT_BYTES, files=files)


async def work(directory: Path, capacity: int, files: RecordingFiles, blocks: list[SealedBlock]) -> None:
    """Put all blocks, four at a time, and delete every fifth."""
    tier = await open_tier(directory, capacity, files)
    numbers = iter(range(len(blocks)))

    async def writer() -> None:
        for number in numbers:
            block = blocks[number]
            if await tier.put(block.header, block.envelope) is PutResult.STORED:
                files.mark("stored", number)
            tier.touch([block.key])
            if number % 5 == 0:
                files.mark("deleting", number)
                await tier.delete([block.key])
                files.mark("deleted", number)

    await asyncio.gather(*(writer() for _ in range(4)))
    await tier.close()


@pytest.mark.parametrize("journal", ["kept", "lost"])
@pytest.mark.parametrize("capacity", [ROOMY_BYTES, TIGHT_BYTES], ids=["roomy", "evicting"])
async def test_acknowledged_is_durable(tmp_path: Path, capacity: int, journal: str) -> None:
    source = random.Random(11)
    blocks = [random_block(source, source.choice([5_000, 30_000])) for _ in range(BLOCKS)]
    files = RecordingFiles()
    await work(tmp_path / "original", capacity, files, blocks)
    checked = 0
    for cut in sorted(source.sample(range(len(files.events) + 1), CUTS)):
        directory = tmp_path / str(cut)
        files.after_power_loss(cut, directory, source)
        if journal == "lost":
            (directory / "journal").unlink(missing_ok=True)
        said = {kind: {e[1] for e in files.events[:cut] if e[0] == kind} for kind in ("stored", "deleting", "deleted")}
        kept = said["stored"] - said["deleting"]
        tier = await open_tier(directory, capacity, Files())
        try:
            if capacity == ROOMY_BYTES:
                assert {blocks[number].key for number in kept} <= tier.keys()
            assert not {blocks[number].key for number in said["deleted"]} & tier.keys()
            for number, block in enumerate(blocks):
                if block.key in tier.keys():
                    buffer = aligned_buffer(len(block.envelope))
                    try:
                        await tier.get(block.key, buffer)
                        # Not the padding behind the payload: nobody reads it, and a torn write may leave old bytes there.
                        assert payload(buffer, block.header.length) == block.payload
                        checked += 1
                    except BlockCorrupt:
                        # A slot that was being written. The journal lists none, unless slots are recycled;
                        # a scan may, and there is one too while nothing has reached the journal.
                        assert number not in kept or capacity == TIGHT_BYTES
                        assert journal == "lost" or capacity == TIGHT_BYTES or not said["stored"]
        finally:
            await tier.close()
    assert checked
