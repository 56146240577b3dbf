"""The disk tier when its process is killed: what was acknowledged is there, and nothing else comes back wrong."""

from __future__ import annotations

import asyncio
import os
import random
import select
import signal
import struct
import time
from dataclasses import dataclass, field
from functools import cache
from hashlib import blake2b
from pathlib import Path

import pytest
from disk_files import DyingFiles

from kvstore.envelope import Header
from kvstore.errors import BlockCorrupt
from kvstore.identity import KEY_BYTES, NO_PARENT, BlockKey
from kvstore.testing.blocks import SealedBlock, aligned_buffer, seal
from kvstore.tiers.base import PutResult
from kvstore.tiers.disk import DiskTier, Files

SEGMENT_BYTES = 1 << 20
ROOMY_BYTES = 64 << 20
TIGHT_BYTES = 3 << 20
CHAIN_BLOCKS = 4
SIZES = [3_000, 20_000, 70_000]

STORED, DELETING, DELETED = b"S", b"d", b"D"
REPORT = struct.Struct("<cI")


def key_of(number: int) -> BlockKey:
    return BlockKey(blake2b(number.to_bytes(8), digest_size=KEY_BYTES).digest())


@cache
def block(number: int) -> SealedBlock:
    """The same block in the process that writes it and in the one that checks it."""
    index = number % CHAIN_BLOCKS
    payload = random.Random(number).randbytes(SIZES[number // CHAIN_BLOCKS % len(SIZES)])
    return seal(key_of(number), payload, index=index, parent=key_of(number - 1) if index else NO_PARENT)


@dataclass
class Reported:
    """What writers said before they died."""

    offered: int = 0
    """Numbers below were possibly put."""
    stored: set[int] = field(default_factory=set)
    deleting: set[int] = field(default_factory=set)
    """Deletion begun, outcome unknown."""
    deleted: set[int] = field(default_factory=set)

    def take(self, reports: bytes) -> None:
        for kind, number in REPORT.iter_unpack(reports):
            if kind == STORED:
                self.stored.add(number)
            elif kind == DELETING:
                self.stored.discard(number)
                self.deleting.add(number)
            else:
                self.deleting.discard(number)
                self.deleted.add(number)


async def write_until_killed(directory: Path, capacity: int, first: int, pipe: int, files: Files) -> None:
    tier = await open_tier(directory, capacity, files)
    source = random.Random(first)
    numbers = iter(range(first, first + 200))

    async def writer() -> None:
        for number in numbers:
            if await tier.put(block(number).header, block(number).envelope) is PutResult.STORED:
                os.write(pipe, REPORT.pack(STORED, number))
            tier.touch([key_of(source.randrange(number + 1))])
            if source.random() < 0.2:
                os.write(pipe, REPORT.pack(DELETING, number))
                await tier.delete([key_of(number)])
                os.write(pipe, REPORT.pack(DELETED, number))

    await asyncio.gather(*(writer() for _ in range(4)))
    os.kill(os.getpid(), signal.SIGKILL)


async def open_tier(directory: Path, capacity: int, files: Files | None = None) -> DiskTier:
    return await DiskTier.open(directory, capacity, segment_bytes=SEGMENT_BYTES, threads=2, files=files)


def kill_a_writer(directory: Path, capacity: int, reported: Reported, files: Files, after: float | None) -> None:
    """Fork a writer and collect its reports until it dies, by its own ``files`` or by SIGKILL ``after`` so many seconds."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(reading)
            asyncio.run(write_until_killed(directory, capacity, reported.offered, writing, files))
        finally:
            os._exit(1)
    os.close(writing)
    reports = b""
    try:
        if after is not None:
            select.select([reading], [], [], 10)  # it has begun
            time.sleep(after)
            os.kill(pid, signal.SIGKILL)
        while part := os.read(reading, 1 << 16):
            reports += part
    finally:
        os.close(reading)
        _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status), "the writer failed instead of being killed"
    reported.take(reports)
    reported.offered += 200


async def check(directory: Path, capacity: int, reported: Reported, *, evicting: bool, journal_lost: bool) -> None:
    # Before its first record the journal is as good as lost: a scan may list a torn write that nobody acknowledged.
    journal = directory / "journal"
    journal_lost = journal_lost or not journal.exists() or not journal.read_bytes().strip(b"\0")
    tier = await open_tier(directory, capacity)
    try:
        keys = set(tier.keys())
        if not evicting:
            assert {key_of(number) for number in reported.stored} <= keys
        assert not {key_of(number) for number in reported.deleted} & keys
        numbers = {key_of(number): number for number in range(reported.offered)}
        used = 0
        for key in keys:
            number = numbers[key]
            used += block(number).header.envelope_bytes
            try:
                await assert_holds_payload(tier, block(number))
            except BlockCorrupt:
                assert journal_lost, "a block was listed before its bytes were durable"
                assert number not in reported.stored
                used -= block(number).header.envelope_bytes
        assert tier.stats().used_bytes == used
        assert (await tier.put(block(0).header, block(0).envelope)) in (PutResult.STORED, PutResult.PRESENT)
        reported.deleted.discard(0)
        reported.stored.add(0)
    finally:
        await tier.close()


async def assert_holds_payload(tier: DiskTier, wanted: SealedBlock) -> None:
    """Like ``assert_holds``, but the copy may be of another time."""
    buffer = aligned_buffer(len(wanted.envelope))
    header = await tier.get(wanted.key, buffer)
    assert isinstance(header, Header)
    assert buffer[4096:] == wanted.envelope[4096:]


@pytest.mark.parametrize("capacity", [ROOMY_BYTES, TIGHT_BYTES], ids=["roomy", "evicting"])
def test_killed_at_a_random_moment(tmp_path: Path, capacity: int) -> None:
    reported, source = Reported(), random.Random(1)
    for _ in range(40):
        kill_a_writer(tmp_path, capacity, reported, Files(), after=source.uniform(0, 0.03))
        asyncio.run(check(tmp_path, capacity, reported, evicting=capacity == TIGHT_BYTES, journal_lost=False))
    assert reported.stored


@pytest.mark.parametrize("capacity", [ROOMY_BYTES, TIGHT_BYTES], ids=["roomy", "evicting"])
def test_killed_at_each_system_call(tmp_path: Path, capacity: int) -> None:
    source = random.Random(2)
    for start in range(1, 81, 10):
        directory, reported = tmp_path / str(start), Reported()
        for calls in range(start, start + 10):
            kill_a_writer(directory, capacity, reported, DyingFiles(calls, source), after=None)
            asyncio.run(check(directory, capacity, reported, evicting=capacity == TIGHT_BYTES, journal_lost=False))
        assert reported.stored


def test_killed_and_the_journal_lost(tmp_path: Path) -> None:
    reported, source = Reported(), random.Random(3)
    for calls in range(5, 150, 5):
        kill_a_writer(tmp_path, ROOMY_BYTES, reported, DyingFiles(calls, source), after=None)
        (tmp_path / "journal").unlink(missing_ok=True)
        asyncio.run(check(tmp_path, ROOMY_BYTES, reported, evicting=False, journal_lost=True))
    assert reported.stored
