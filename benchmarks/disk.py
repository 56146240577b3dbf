"""The disk tier against fio: the same bytes, the same parallelism, the same disk, in alternating rounds.

The tier does what a node does: it sums and seals each block, evicts an old one, writes the slot, journals it and syncs; a read
verifies the checksum. fio writes and reads a preallocated, already written file with O_DIRECT and syncs nothing. A second tier
beside the first encrypts what it writes and decrypts what it reads: ``encrypted_*_ratio`` is its speed by that of the first.
"""

from __future__ import annotations

import asyncio
import json
import mmap
import os
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from benchmarks.study import Study
from kvstore.encryption import TenantKeys, new_key
from kvstore.envelope import Header, crc32c, envelope_bytes, payload
from kvstore.identity import KEY_BYTES, BlockKey
from kvstore.testing.blocks import NAMESPACE
from kvstore.tiers.base import PutResult, Tier
from kvstore.tiers.disk import DiskTier
from kvstore.tiers.encryption import Encrypting

SIZES_MIB = (2, 8, 20)
THREADS = 4
IN_FLIGHT = 64
"""Blocks that clients offer at a time, as a node does: one batch is written while another is synced."""

SWITCH_INTERVAL_SECONDS = 0.0002
"""What a node sets; see its server."""

Direction = Literal["write", "read"]


@dataclass(frozen=True)
class Sample:
    """One round of one contestant."""

    nbytes: int
    seconds: float
    cpu_seconds: float

    @property
    def gb_per_second(self) -> float:
        return self.nbytes / self.seconds / 1e9

    @property
    def cpu_per_gb(self) -> float:
        return self.cpu_seconds / (self.nbytes / 1e9)


def arguments(parser: Any) -> None:
    parser.add_argument("--directory", type=Path, default=Path(), help="where to put the files (default: here)")
    parser.add_argument("--rounds", type=int, default=9, help="rounds per block size")
    parser.add_argument("--mib", type=int, default=1024, help="MiB written and read per round")


def run(args: Any) -> Mapping[str, float]:
    fio = shutil.which("fio")
    if fio is None:
        raise SystemExit("fio is missing, and it is what this study compares with: install it (apt install fio)")
    previous = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH_INTERVAL_SECONDS)
    figures: dict[str, float] = {}
    try:
        for mib in SIZES_MIB:
            with tempfile.TemporaryDirectory(prefix="disk-study-", dir=args.directory) as directory:
                samples = asyncio.run(_compare(fio, Path(directory), mib << 20, args.mib << 20, args.rounds))
            figures.update(_figures(samples, f"{mib}mib"))
    finally:
        sys.setswitchinterval(previous)
    for direction in ("write", "read"):
        ratios = [figures[f"{direction}_ratio_to_fio_{mib}mib"] for mib in SIZES_MIB]
        figures[f"{direction}_ratio_to_fio"] = statistics.median(ratios)
        ratios = [figures[f"encrypted_{direction}_ratio_{mib}mib"] for mib in SIZES_MIB]
        figures[f"encrypted_{direction}_ratio"] = statistics.median(ratios)
    return dict(sorted(figures.items()))


Samples = Mapping[tuple[str, Direction], Sequence[Sample]]


def _figures(samples: Samples, size: str) -> dict[str, float]:
    figures = {}
    for direction in ("write", "read"):
        tier, fio, encrypted = (samples[name, direction] for name in ("tier", "fio", "encrypted"))
        figures[f"{direction}_ratio_to_fio_{size}"] = _ratio(tier, fio)
        figures[f"encrypted_{direction}_ratio_{size}"] = _ratio(encrypted, tier)
        for name, of in (("tier", tier), ("fio", fio), ("encrypted", encrypted)):
            figures[f"{direction}_gb_per_s_{name}_{size}"] = statistics.median(s.gb_per_second for s in of)
            figures[f"{direction}_cpu_s_per_gb_{name}_{size}"] = statistics.median(s.cpu_per_gb for s in of)
    return figures


def _ratio(ours: Sequence[Sample], theirs: Sequence[Sample]) -> float:
    """Median over the rounds."""
    return statistics.median(a.gb_per_second / b.gb_per_second for a, b in zip(ours, theirs, strict=True))


async def _compare(fio: str, directory: Path, block: int, total: int, rounds: int) -> Samples:
    """Rounds of all contestants; the first round fills files and is not counted."""
    count = max(IN_FLIGHT, total // envelope_bytes(block))
    ours = await _TierContestant.open(directory / "tier", block, count)
    encrypted = await _TierContestant.open(directory / "encrypted", block, count, TenantKeys(new_key(), "study"))
    theirs = _Fio(fio, directory / "fio", envelope_bytes(block), count)
    samples: dict[tuple[str, Direction], list[Sample]] = defaultdict(list)
    try:
        for number in range(rounds + 1):
            for direction in ("write", "read"):
                contestants: list[tuple[str, Callable[[Direction], Awaitable[Sample]]]] = [
                    ("tier", ours.measure),
                    ("encrypted", encrypted.measure),
                    ("fio", theirs.measure),
                ]
                first = number % len(
                    contestants
                )  # whoever follows the other direction finds the disk still busy with it
                for name, measure in contestants[first:] + contestants[:first]:
                    sample = await measure(direction)
                    if number:
                        samples[name, direction].append(sample)
            if number:
                last = "  ".join(f"{n} {d} {s[-1].gb_per_second:.2f}" for (n, d), s in sorted(samples.items()))
                print(f"{block >> 20} MiB, round {number}: {last} GB/s", file=sys.stderr)
    finally:
        await ours.close()
        await encrypted.close()
    return samples


class _TierContestant:
    """Writes new blocks to a full tier, and reads those back."""

    def __init__(self, tier: Tier, block: int, count: int) -> None:
        self._tier = tier
        self._count = count
        self._keys: list[BlockKey] = []
        self._sealers = ThreadPoolExecutor(2)
        self._buffers: asyncio.Queue[memoryview] = asyncio.Queue()
        data = random.Random(0).randbytes(block)
        for _ in range(IN_FLIGHT):
            buffer = huge_buffer(envelope_bytes(block))
            payload(buffer, block)[:] = data
            self._buffers.put_nowait(buffer)
        key = BlockKey(bytes(KEY_BYTES))
        self._header = Header(key=key, namespace=NAMESPACE, index=0, tokens=64, length=block, crc=0)

    @classmethod
    async def open(cls, directory: Path, block: int, count: int, keys: TenantKeys | None = None) -> _TierContestant:
        """A tier with room for the blocks of a round and, since it evicts ahead, for a quarter more."""
        segment_bytes = -(-count // 4) * envelope_bytes(block)
        capacity = 5 * segment_bytes + segment_bytes // 2  # half of one for journal and headers
        tier = await DiskTier.open(directory, capacity, segment_bytes=segment_bytes, threads=THREADS)
        return cls(tier if keys is None else Encrypting(tier, keys), block, count)

    async def measure(self, direction: Direction) -> Sample:
        if direction == "write":
            self._keys = [BlockKey(os.urandom(KEY_BYTES)) for _ in range(self._count)]
        one = self._write if direction == "write" else self._read
        before, started = _cpu_seconds(resource.RUSAGE_SELF), time.perf_counter()
        await self._all(one)
        seconds = time.perf_counter() - started
        nbytes = self._count * self._header.envelope_bytes
        return Sample(nbytes, seconds, _cpu_seconds(resource.RUSAGE_SELF) - before)

    async def _all(self, one: Callable[[BlockKey, memoryview], Awaitable[None]]) -> None:
        keys = iter(self._keys)

        async def client() -> None:
            buffer = await self._buffers.get()
            for key in keys:
                await one(key, buffer)
            self._buffers.put_nowait(buffer)

        await asyncio.gather(*(client() for _ in range(IN_FLIGHT)))

    async def _write(self, key: BlockKey, buffer: memoryview) -> None:
        header = await asyncio.get_running_loop().run_in_executor(self._sealers, self._seal, key, buffer)
        if await self._tier.put(header, buffer) is not PutResult.STORED:
            raise SystemExit("the tier refused a block: is the disk full?")

    def _seal(self, key: BlockKey, buffer: memoryview) -> Header:
        body = payload(buffer, self._header.length)
        body[:KEY_BYTES] = key
        header = replace(self._header, key=key, crc=crc32c(body), created=time.time())
        header.pack_into(buffer)
        return header

    async def _read(self, key: BlockKey, buffer: memoryview) -> None:
        await self._tier.get(key, buffer)

    async def close(self) -> None:
        await self._tier.close()
        self._sealers.shutdown()


class _Fio:
    """fio with as many psync threads as the tier has, each in its own part of one file."""

    def __init__(self, fio: str, path: Path, block: int, count: int) -> None:
        self._share = -(-count // THREADS) * block
        self._command = [
            fio, "--name=study", f"--filename={path}", f"--bs={block}", f"--size={self._share}", "--direct=1",
            "--ioengine=psync", "--thread", f"--numjobs={THREADS}", f"--offset_increment={self._share}", "--fallocate=posix",
            "--group_reporting", "--output-format=json",
        ]  # fmt: skip
        path.touch()

    async def measure(self, direction: Direction) -> Sample:
        before = _cpu_seconds(resource.RUSAGE_CHILDREN)
        command = [*self._command, f"--rw={direction}"]
        done = await asyncio.to_thread(subprocess.run, command, check=True, capture_output=True, text=True)
        result = json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0][direction]
        nbytes = result["io_bytes"]
        return Sample(nbytes, nbytes / result["bw_bytes"], _cpu_seconds(resource.RUSAGE_CHILDREN) - before)


def _cpu_seconds(who: int) -> float:
    usage = resource.getrusage(who)
    return usage.ru_utime + usage.ru_stime


def huge_buffer(nbytes: int) -> memoryview:
    """Memory like the arena's: page-aligned, on huge pages where the kernel has them."""
    memory = mmap.mmap(-1, nbytes)
    memory.madvise(mmap.MADV_HUGEPAGE)
    return memoryview(memory)


STUDY = Study(
    name="disk",
    summary="Blocks of 2, 8 and 20 MiB through the disk tier, checksums and journal included, against fio",
    run=run,
    targets={"write_ratio_to_fio": ">=0.95", "read_ratio_to_fio": ">=0.95"},
    arguments=arguments,
)
