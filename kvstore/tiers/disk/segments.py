"""Segment files: slots in preallocated, already written files, read and written past the page cache.

A segment is one extent of the slab allocator: a 4 KiB header that names the size of its slots, then the slots. It is filled
with zeros before its first use, because a write to an unwritten extent costs a third more. Addresses ("offsets") count
slot bytes over all segments: segment ``offset // segment_bytes``.
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Iterable
from pathlib import Path
from threading import Event, Lock

import structlog

from kvstore.envelope import HEADER_BYTES, crc32c
from kvstore.tiers.disk.files import Data, Files

SEGMENT_HEADER_BYTES = HEADER_BYTES

_MAGIC = b"KVSEGMNT"
_HEADER = struct.Struct("<8sIQI")  # magic, number, slot bytes, crc32c of what comes before
_FILL_BYTES = 8 << 20

_log = structlog.get_logger(__name__)


class Segments:
    """The segment files of a directory. Every method blocks; any thread may call. All raise OSError."""

    def __init__(self, directory: Path, segment_bytes: int, files: Files) -> None:
        self.segment_bytes = segment_bytes
        self._directory = directory
        self._files = files
        self._fds: dict[int, int] = {}
        self._slot_bytes: dict[int, int] = {}
        """Slot size that each segment's header names; 0 when it names none."""
        self._header_lock = Lock()
        self._direct = _takes_direct_io(directory)
        if not self._direct:
            _log.warning("no O_DIRECT on this filesystem: disk tier goes through the page cache", path=str(directory))

    def open_existing(self, limit: int) -> None:
        """Open the segments numbered below ``limit``; remove those above and unfinished ones."""
        for path in self._directory.glob("segment-*"):
            number = path.name.removeprefix("segment-")
            if number.isdecimal() and int(number) < limit:
                self._open(int(number))
            else:
                path.unlink()

    def numbers(self) -> list[int]:
        return sorted(self._fds)

    def first_missing(self, limit: int) -> int | None:
        """Lowest number below ``limit`` that has no segment."""
        if len(self._fds) >= limit:
            return None
        return next(number for number in range(limit) if number not in self._fds)

    def create(self, number: int, stop: Event) -> bool:
        """Make a segment, written with zeros. Gives up, leaving nothing, when ``stop`` is set (False) or on an error."""
        path = self._path(number)
        draft = path.with_suffix(".new")
        fd = os.open(draft, self._flags() | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            total = SEGMENT_HEADER_BYTES + self.segment_bytes
            os.posix_fallocate(fd, 0, total)
            with mmap.mmap(-1, min(_FILL_BYTES, total)) as zeros:
                for start in range(0, total, len(zeros)):
                    if stop.is_set():
                        draft.unlink()
                        return False
                    with memoryview(zeros) as view:
                        self._files.pwrite(fd, view[: total - start], start)
            self._files.fdatasync(fd)
            self._files.replace(draft, path)
        except OSError:
            draft.unlink(missing_ok=True)
            raise
        finally:
            os.close(fd)
        self._open(number)
        return True

    def write(self, offset: int, slot_bytes: int, envelope: Data) -> None:
        """Write a slot, after the segment's header where its slots had another size before."""
        number, within = divmod(offset, self.segment_bytes)
        with self._header_lock:
            if self._slot_bytes[number] != slot_bytes:
                self._files.pwrite(self._fds[number], _pack_header(number, slot_bytes), 0)
                self._slot_bytes[number] = slot_bytes
        self._files.pwrite(self._fds[number], envelope, SEGMENT_HEADER_BYTES + within)

    def read(self, offset: int, into: memoryview) -> int:
        """Read from the start of a slot; returns the bytes read, fewer when the file has been cut."""
        number, within = divmod(offset, self.segment_bytes)
        return self._files.pread(self._fds[number], into, SEGMENT_HEADER_BYTES + within)

    def file(self, offset: int) -> tuple[Path, int] | None:
        """File of a slot and place in it; None where files are not read past the page cache."""
        number, within = divmod(offset, self.segment_bytes)
        return (self._path(number), SEGMENT_HEADER_BYTES + within) if self._direct else None

    def erase(self, offsets: Iterable[int]) -> None:
        """Make the slots' headers invalid, so that no scan takes them for blocks."""
        for offset in offsets:
            number, within = divmod(offset, self.segment_bytes)
            self._files.pwrite(self._fds[number], _ZEROS, SEGMENT_HEADER_BYTES + within)

    def sync(self, offsets: Iterable[int]) -> None:
        """Flush the segments of these slots to the medium."""
        for number in {offset // self.segment_bytes for offset in offsets}:
            self._files.fdatasync(self._fds[number])

    def slots(self, number: int) -> range:
        """Offsets of the slots of a segment; empty while its header names no size."""
        slot_bytes = self._slot_bytes[number]
        if not 0 < slot_bytes <= self.segment_bytes:
            return range(0)
        base = number * self.segment_bytes
        return range(base, base + self.segment_bytes - slot_bytes + 1, slot_bytes)

    def close(self) -> None:
        while self._fds:
            os.close(self._fds.popitem()[1])

    def _open(self, number: int) -> None:
        fd = os.open(self._path(number), self._flags())
        header = memoryview(mmap.mmap(-1, HEADER_BYTES))
        count = self._files.pread(fd, header, 0)
        self._slot_bytes[number] = _unpack_header(number, header[:count])
        self._fds[number] = fd

    def _path(self, number: int) -> Path:
        return self._directory / f"segment-{number:05d}"

    def _flags(self) -> int:
        return os.O_RDWR | os.O_CLOEXEC | (os.O_DIRECT if self._direct else 0)


_ZEROS = memoryview(mmap.mmap(-1, HEADER_BYTES)).toreadonly()


def _pack_header(number: int, slot_bytes: int) -> memoryview:
    view = memoryview(mmap.mmap(-1, SEGMENT_HEADER_BYTES))
    _HEADER.pack_into(view, 0, _MAGIC, number, slot_bytes, 0)
    struct.pack_into("<I", view, _HEADER.size - 4, crc32c(view[: _HEADER.size - 4]))
    return view


def _unpack_header(number: int, data: memoryview) -> int:
    if len(data) < _HEADER.size:
        return 0
    magic, named, slot_bytes, crc = _HEADER.unpack_from(data)
    if magic != _MAGIC or named != number or crc != crc32c(data[: _HEADER.size - 4]) or slot_bytes % HEADER_BYTES:
        return 0
    return int(slot_bytes)


def _takes_direct_io(directory: Path) -> bool:
    probe = directory / "probe"
    try:
        fd = os.open(probe, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_DIRECT, 0o600)
    except OSError:
        return False
    try:
        os.pwrite(fd, _ZEROS, 0)
    except OSError:
        return False
    finally:
        os.close(fd)
        probe.unlink()
    return True
