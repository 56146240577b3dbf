"""The disk tier with damaged files, failing system calls, other settings and a full disk."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import random
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from disk_files import FailingFiles, find_slot, flip, overwrite
from structlog.testing import capture_logs

from kvstore.errors import BlockCorrupt, BlockNotFound, ConfigError, TierUnavailable
from kvstore.testing.blocks import SealedBlock, aligned_buffer, random_block, random_chain
from kvstore.testing.conformance import assert_holds, put
from kvstore.tiers.base import PutResult
from kvstore.tiers.disk import DiskTier, Files

SEGMENT_BYTES = 1 << 20
CAPACITY = 8 << 20
SOURCE = random.Random(5)


async def open_tier(directory: Path, capacity: int = CAPACITY, files: Files | None = None) -> DiskTier:
    return await DiskTier.open(directory, capacity, segment_bytes=SEGMENT_BYTES, files=files)


async def filled(directory: Path, blocks: int = 12) -> list[SealedBlock]:
    """A closed tier that holds a chain."""
    tier = await open_tier(directory)
    chain = random_chain(SOURCE, blocks, 50_000)
    for block in chain:
        assert await put(tier, block) is PutResult.STORED
    await tier.close()
    return chain


async def assert_all_there(directory: Path, blocks: list[SealedBlock]) -> None:
    tier = await open_tier(directory)
    try:
        assert set(tier.keys()) == {block.key for block in blocks}
        assert tier.stats().used_bytes == sum(block.header.envelope_bytes for block in blocks)
        for block in blocks:
            await assert_holds(tier, block)
            stat = tier.stat(block.key)
            assert stat is not None
            assert (stat.parent, stat.index, stat.tokens, stat.namespace) == (
                block.header.parent,
                block.header.index,
                block.header.tokens,
                block.header.namespace,
            )
    finally:
        await tier.close()


# Journal


async def test_without_a_journal_the_slot_headers_tell(tmp_path: Path) -> None:
    chain = await filled(tmp_path)
    (tmp_path / "journal").unlink()
    await assert_all_there(tmp_path, chain)
    await assert_all_there(tmp_path, chain)


async def test_an_emptied_journal_counts_as_lost(tmp_path: Path) -> None:
    chain = await filled(tmp_path)
    os.truncate(tmp_path / "journal", 0)
    await assert_all_there(tmp_path, chain)


async def test_a_damaged_journal_counts_as_lost(tmp_path: Path) -> None:
    chain = await filled(tmp_path)
    flip(tmp_path / "journal", 3 * 64 + 20)
    await assert_all_there(tmp_path, chain)


@pytest.mark.parametrize("cut", [1, 37, 63])
async def test_a_torn_tail_of_the_journal_is_cut_off(tmp_path: Path, cut: int) -> None:
    chain = await filled(tmp_path)
    last = (1 + len(chain)) * 64  # one record names the namespace
    os.truncate(tmp_path / "journal", last - cut)
    await assert_all_there(tmp_path, chain[:-1])


async def test_the_journal_survives_many_appends_and_rewrites(tmp_path: Path) -> None:
    """Overwriting the tier a few times over makes the journal longer than it may be."""
    tier = await open_tier(tmp_path)
    for _ in range(30):
        await asyncio.gather(*(put(tier, random_block(SOURCE, 4_000)) for _ in range(200)))
        assert (tmp_path / "journal").stat().st_size <= 256 << 10
        tier.touch(list(tier.keys()))
    held = {key: tier.stat(key) for key in tier.keys()}
    await tier.close()
    tier = await open_tier(tmp_path)
    assert {key: tier.stat(key) for key in tier.keys()} == held
    await tier.close()


# Slots


async def test_a_cut_segment_loses_only_what_was_cut(tmp_path: Path) -> None:
    chain = await filled(tmp_path)
    places = {block.key: find_slot(tmp_path, block.key) for block in chain}
    path, start = places[chain[5].key]
    os.truncate(path, start + 20_000)
    lost = {key for key, place in places.items() if place[0] == path and place[1] >= start}
    tier = await open_tier(tmp_path)
    for block in chain:
        if block.key in lost:
            with pytest.raises(BlockCorrupt):
                await assert_holds(tier, block)
        else:
            await assert_holds(tier, block)
    for block in chain:
        await put(tier, block)
    await tier.close()
    await assert_all_there(tmp_path, chain)


async def test_a_missing_segment_is_made_anew(tmp_path: Path) -> None:
    chain = await filled(tmp_path, blocks=30)
    gone = tmp_path / "segment-00000"
    kept = [block for block in chain if find_slot(tmp_path, block.key)[0] != gone]
    gone.unlink()
    await assert_all_there(tmp_path, kept)


async def test_a_deleted_block_does_not_return_without_the_journal(tmp_path: Path) -> None:
    chain = await filled(tmp_path)
    tier = await open_tier(tmp_path)
    await tier.delete([chain[0].key])
    await put(tier, chain[0])
    await tier.delete([chain[0].key])
    await tier.close()
    (tmp_path / "journal").unlink()
    await assert_all_there(tmp_path, chain[1:])


async def test_of_two_copies_the_higher_generation_is_the_block(tmp_path: Path) -> None:
    one, two = await filled(tmp_path, blocks=2)
    newer = bytearray(one.envelope)
    header = replace(one.header, generation=7)
    header.pack_into(newer)
    overwrite(*find_slot(tmp_path, two.key), bytes(newer))
    (tmp_path / "journal").unlink()
    tier = await open_tier(tmp_path)
    assert await tier.get(one.key, aligned_buffer(len(newer))) == header
    assert two.key not in tier.keys()
    await tier.close()


async def test_the_last_bad_blocks_are_kept_with_their_reason(tmp_path: Path) -> None:
    chain = await filled(tmp_path)
    path, start = find_slot(tmp_path, chain[3].key)
    flip(path, start + 4096)
    tier = await open_tier(tmp_path)
    with pytest.raises(BlockCorrupt):
        await assert_holds(tier, chain[3])
    (bad,) = tier.bad_blocks()
    assert bad.key == chain[3].key
    assert "checksum" in bad.reason
    await tier.close()


# Settings


async def test_a_directory_belongs_to_one_tier_at_a_time(tmp_path: Path) -> None:
    tier = await open_tier(tmp_path)
    with pytest.raises(ConfigError, match=r"disk\.directory.*another process") as refused:
        await open_tier(tmp_path)
    assert refused.value.remedy
    await tier.close()
    await (await open_tier(tmp_path)).close()


async def test_a_new_directory_is_private(tmp_path: Path) -> None:
    tier = await open_tier(tmp_path / "new")
    await tier.close()
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o700
    assert all(path.stat().st_mode & 0o077 == 0 for path in (tmp_path / "new").iterdir())


async def test_another_segment_size_is_refused(tmp_path: Path) -> None:
    chain = await filled(tmp_path)
    with pytest.raises(ConfigError, match=r"disk\.segment_bytes"):
        await DiskTier.open(tmp_path, CAPACITY, segment_bytes=2 * SEGMENT_BYTES)
    tier = await DiskTier.open(tmp_path, CAPACITY)
    assert len(tier.keys()) == len(chain)
    await tier.close()


async def test_another_format_is_refused(tmp_path: Path) -> None:
    await filled(tmp_path)
    for content in (json.dumps({"format": 99, "segment_bytes": SEGMENT_BYTES}), "{", "[]"):
        (tmp_path / "format.json").write_text(content)
        with pytest.raises(ConfigError, match=r"disk\.directory"):
            await open_tier(tmp_path)


@pytest.mark.parametrize("capacity", [0, SEGMENT_BYTES])
async def test_a_capacity_that_holds_nothing_is_refused(tmp_path: Path, capacity: int) -> None:
    with pytest.raises(ConfigError, match=r"disk\.bytes"):
        await open_tier(tmp_path, capacity)


async def test_the_capacity_can_change(tmp_path: Path) -> None:
    chain = await filled(tmp_path, blocks=100)
    for capacity in (4 * CAPACITY, CAPACITY // 2):
        tier = await open_tier(tmp_path, capacity)
        held = set(tier.keys())
        assert tier.stats().used_bytes <= capacity
        assert disk_usage(tmp_path) <= capacity
        await tier.close()
    assert held < {block.key for block in chain}


async def test_the_files_never_take_more_than_the_capacity(tmp_path: Path) -> None:
    tier = await open_tier(tmp_path)
    for size in (3_000, 200_000, 40_000):
        for _ in range(10):
            await asyncio.gather(*(put(tier, random_block(SOURCE, size)) for _ in range(2_000_000 // size)))
            assert disk_usage(tmp_path) <= CAPACITY
    await tier.close()


def disk_usage(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.iterdir())


async def test_a_new_size_class_takes_over_from_a_cold_one(tmp_path: Path) -> None:
    tier = await open_tier(tmp_path)
    while not tier.stats().evicted:
        await put(tier, random_block(SOURCE, 50_000))
    newer = [random_block(SOURCE, 300_000) for _ in range(12)]
    for block in newer:
        assert await put(tier, block) is PutResult.STORED
    for block in newer:
        await assert_holds(tier, block)
    await tier.close()
    tier = await open_tier(tmp_path)
    for block in newer:
        await assert_holds(tier, block)
    await tier.close()


async def test_a_block_larger_than_a_segment_is_refused(tmp_path: Path) -> None:
    tier = await open_tier(tmp_path)
    assert await put(tier, random_block(SOURCE, SEGMENT_BYTES)) is PutResult.REFUSED
    assert tier.stats().refused == 1
    await tier.close()


# Failing system calls


@pytest.mark.parametrize("call", ["pwrite", "fdatasync"])
async def test_a_disk_error_on_put_is_raised_and_passes(tmp_path: Path, call: str) -> None:
    files = FailingFiles(call)
    tier = await open_tier(tmp_path, files=files)
    before, after = random_block(SOURCE, 9_000), random_block(SOURCE, 9_000)
    await put(tier, before)
    files.error = errno.EIO
    with pytest.raises(TierUnavailable):
        await put(tier, after)
    assert after.key not in tier.keys()
    await assert_holds(tier, before)
    files.error = None
    assert await put(tier, after) is PutResult.STORED
    await tier.close()
    await assert_all_there(tmp_path, [before, after])


async def test_a_disk_error_on_get_keeps_the_block(tmp_path: Path) -> None:
    files = FailingFiles("pread")
    tier = await open_tier(tmp_path, files=files)
    block = random_block(SOURCE, 9_000)
    await put(tier, block)
    files.error = errno.EIO
    with pytest.raises(TierUnavailable):
        await assert_holds(tier, block)
    files.error = None
    await assert_holds(tier, block)
    assert tier.stats().quarantined == 0
    await tier.close()


async def test_a_full_disk_refuses_and_goes_on_serving(tmp_path: Path) -> None:
    files = FailingFiles("pwrite")
    tier = await open_tier(tmp_path, files=files)
    held = random_block(SOURCE, 9_000)
    await put(tier, held)
    files.error = errno.ENOSPC
    for _ in range(3):
        assert await put(tier, random_block(SOURCE, 9_000)) is PutResult.REFUSED
    assert tier.stats().refused == 3
    await assert_holds(tier, held)
    await tier.close()


@pytest.fixture
def small_filesystem(tmp_path: Path) -> Iterator[Path]:
    """4 MiB, half as much as the tier believes to have."""
    place = tmp_path / "mounted"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", place], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting a small tmpfs takes root")
    yield place
    subprocess.run(["umount", place], check=True)


async def test_on_a_filesystem_smaller_than_the_capacity_slots_are_recycled(small_filesystem: Path) -> None:
    tier = await open_tier(small_filesystem)
    blocks = [random_block(SOURCE, 50_000) for _ in range(200)]
    for block in blocks:
        assert await put(tier, block) is PutResult.STORED
    assert tier.stats().evicted > 0
    await assert_holds(tier, blocks[-1])
    await tier.close()
    assert not list(small_filesystem.glob("*.new"))


async def test_without_direct_io_the_page_cache_serves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    really_open = os.open

    def refuse_direct_io(path: Any, flags: int, *rest: Any, **options: Any) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return really_open(path, flags, *rest, **options)

    monkeypatch.setattr(os, "open", refuse_direct_io)
    with capture_logs() as logs:
        chain = await filled(tmp_path)
    assert any("O_DIRECT" in entry["event"] for entry in logs)
    await assert_all_there(tmp_path, chain)


# Closing


async def test_a_closed_tier_says_so(tmp_path: Path) -> None:
    tier = await open_tier(tmp_path)
    block = random_block(SOURCE, 9_000)
    await put(tier, block)
    await tier.close()
    with pytest.raises(TierUnavailable):
        await put(tier, random_block(SOURCE, 9_000))
    with pytest.raises((TierUnavailable, BlockNotFound)):
        await assert_holds(tier, block)


async def test_close_waits_for_puts(tmp_path: Path) -> None:
    tier = await open_tier(tmp_path)
    blocks = [random_block(SOURCE, 50_000) for _ in range(20)]
    puts = [asyncio.ensure_future(put(tier, block)) for block in blocks]
    await asyncio.sleep(0)
    await tier.close()
    assert set(await asyncio.gather(*puts)) == {PutResult.STORED}
    await assert_all_there(tmp_path, blocks)
