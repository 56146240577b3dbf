"""The system calls that durability hangs on. Tests replace them to place faults and crashes."""

from __future__ import annotations

import os
from pathlib import Path

Data = bytes | memoryview


class Files:
    """Blocking file operations on descriptors; any thread may call. All raise OSError."""

    def pwrite(self, fd: int, data: Data, offset: int) -> None:
        """Write all of ``data``."""
        view = memoryview(data)
        while view:
            written = os.pwrite(fd, view, offset)
            view, offset = view[written:], offset + written

    def pread(self, fd: int, into: memoryview, offset: int) -> int:
        """Fill ``into``; returns the bytes read, fewer only at the end of the file."""
        done = 0
        while done < len(into):
            count = os.preadv(fd, [into[done:]], offset + done)
            if not count:
                break
            done += count
        return done

    def fdatasync(self, fd: int) -> None:
        os.fdatasync(fd)

    def replace(self, source: Path, target: Path) -> None:
        """Rename, durably."""
        os.replace(source, target)
        directory = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
