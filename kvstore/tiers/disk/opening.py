"""Opening a directory: lock it, settle its format, find its blocks, claim their slots."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from kvstore.envelope import HEADER_BYTES
from kvstore.errors import ConfigError
from kvstore.index import BlockIndex
from kvstore.slabs import SlabAllocator
from kvstore.tiers.disk.directory import lock, read_format, write_format
from kvstore.tiers.disk.files import Files
from kvstore.tiers.disk.journal import Journal
from kvstore.tiers.disk.records import ADDRESSABLE_BYTES, RECORD_BYTES, hits, offsets
from kvstore.tiers.disk.recovery import recover
from kvstore.tiers.disk.segments import SEGMENT_HEADER_BYTES, Segments

JOURNAL_SHARE = 128
"""One part in so many of the capacity is the journal's."""

MIN_JOURNAL_BYTES = 256 << 10

SEGMENTS_WANTED = 64
"""Enough for several models' size classes to share the disk."""

MIN_SEGMENT_BYTES, MAX_SEGMENT_BYTES = 64 << 20, 4 << 30


@dataclass(frozen=True, slots=True)
class Opened:
    """A locked directory with everything that was found in it."""

    segments: Segments
    journal: Journal
    slots: SlabAllocator
    index: BlockIndex
    pool: ThreadPoolExecutor
    max_segments: int
    max_blocks: int
    max_journal_bytes: int
    resources: ExitStack
    """Closes files, threads and lock; call when nothing runs any more."""


def open_directory(directory: Path, capacity: int, segment_bytes: int | None, threads: int, files: Files) -> Opened:
    """Blocks. Raises ConfigError, OSError."""
    with ExitStack() as resources:
        resources.callback(os.close, lock(directory))
        found = read_format(directory)
        size = found or segment_bytes or _default_segment_bytes(capacity)
        if segment_bytes not in (None, size):
            remedy = f"Keep {size}, or empty {directory}"
            raise ConfigError("disk.segment_bytes", segment_bytes, f"the directory was made with {size}", remedy)
        max_journal_bytes = max(capacity // JOURNAL_SHARE, MIN_JOURNAL_BYTES)
        max_segments = _max_segments(capacity - max_journal_bytes, capacity, size)
        if found is None:
            write_format(directory, size, files)

        segments = Segments(directory, size, files)
        resources.callback(segments.close)
        segments.open_existing(max_segments)
        slots = SlabAllocator(0, size)
        for number in segments.numbers():
            slots.grow(number)
        journal = Journal(directory / "journal", files)
        resources.callback(journal.close)
        pool = ThreadPoolExecutor(threads, "disk-tier")
        resources.callback(pool.shutdown)

        blocks = recover(journal, max_journal_bytes, segments, slots, pool)
        records = blocks.records
        index = BlockIndex()
        index.load(
            records["key"],
            records["parent"],
            blocks.namespaces,
            records["namespace"],
            location=offsets(records),
            accessed=records["accessed"],
            length=records["length"],
            depth=records["depth"],
            hits=hits(records),
            tokens=records["tokens"],
        )
        return Opened(
            segments=segments,
            journal=journal,
            slots=slots,
            index=index,
            pool=pool,
            max_segments=max_segments,
            max_blocks=max_journal_bytes // (4 * RECORD_BYTES),  # records and namespaces, old and new journal
            max_journal_bytes=max_journal_bytes,
            resources=resources.pop_all(),
        )


def _default_segment_bytes(capacity: int) -> int:
    wanted = 1 << max(capacity // SEGMENTS_WANTED, 1).bit_length() - 1
    return min(max(wanted, MIN_SEGMENT_BYTES), MAX_SEGMENT_BYTES)


def _max_segments(available: int, capacity: int, segment_bytes: int) -> int:
    if segment_bytes % HEADER_BYTES or segment_bytes < 2 * HEADER_BYTES:
        problem = "segments cannot have this size"
        raise ConfigError("disk.segment_bytes", segment_bytes, problem, "Use a multiple of 4096, such as 1 GiB")
    count = available // (segment_bytes + SEGMENT_HEADER_BYTES)
    if count < 1:
        needed = capacity - available + segment_bytes + SEGMENT_HEADER_BYTES
        problem = f"one segment and the journal need {needed} bytes"
        raise ConfigError("disk.bytes", capacity, problem, "Raise disk.bytes or lower disk.segment_bytes")
    return min(count, ADDRESSABLE_BYTES // segment_bytes)
