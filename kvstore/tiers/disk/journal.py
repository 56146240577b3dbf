"""The journal file: what is in which slot, so that a restart is fast, and recency and hits survive it.

The slot headers remain the truth: losing the journal costs a scan, not a block. Records are appended at a known end, so a
torn append is overwritten by the next one. The file grows by zeros in steps, so that a sync seldom has a new file size to
write. When it has grown too long, it is written anew and renamed into place.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from pathlib import Path

from kvstore.tiers.disk.files import Files
from kvstore.tiers.disk.records import MAX_NAMESPACES, RECORD_BYTES, Blocks, Entry, Put, encode, encode_blocks

EXTEND_BYTES = 256 * RECORD_BYTES
"""Step in which the file grows."""


class Journal:
    """An open journal. Every method blocks; one thread at a time. All raise OSError.

    After a failed ``append`` the entries may or may not be found at the next start.
    """

    def __init__(self, path: Path, files: Files) -> None:
        self._path = path
        self._files = files
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._written = os.fstat(self._fd).st_size
        self._namespaces: dict[bytes, int] = {}
        self.nbytes = 0
        """End of the records; the file itself may be longer by one step."""

    def read(self, limit: int) -> bytes:
        """The whole file; nothing of one that is longer than ``limit``, which this tier did not write."""
        data = bytearray(self._written if self._written <= limit else 0)
        return bytes(data[: self._files.pread(self._fd, memoryview(data), 0)])

    @property
    def numbers_left(self) -> int:
        """How many namespaces can still be numbered before the next ``rewrite``."""
        return MAX_NAMESPACES - len(self._namespaces)

    def resume(self, nbytes: int, namespaces: Sequence[bytes]) -> None:
        """Go on behind the first ``nbytes``, which numbered these namespaces; what follows them is cut off."""
        os.ftruncate(self._fd, nbytes)
        self.nbytes = self._written = nbytes
        self._namespaces = {namespace: number for number, namespace in enumerate(namespaces)}

    def append(self, entries: Sequence[Entry], sync: bool) -> None:
        """Add entries behind the last good one."""
        namespaces = dict(self._namespaces)
        data = _encode(entries, namespaces)
        end = self.nbytes + len(data)
        padding = -end % EXTEND_BYTES if end > self._written else 0
        self._files.pwrite(self._fd, data + bytes(padding), self.nbytes)
        if sync:
            self._files.fdatasync(self._fd)
        self._written = max(self._written, end + padding)
        self._namespaces = namespaces
        self.nbytes = end

    def rewrite(self, blocks: Blocks, entries: Sequence[Entry] = ()) -> None:
        """Replace the file by one that holds ``blocks`` and then ``entries``. Durable on return."""
        namespaces = {namespace: number for number, namespace in enumerate(blocks.namespaces)}
        data = encode_blocks(blocks) + _encode(entries, namespaces)
        draft = self._path.with_suffix(".new")
        fd = os.open(draft, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            self._files.pwrite(fd, data, 0)
            self._files.fdatasync(fd)
            self._files.replace(draft, self._path)
        except OSError:
            os.close(fd)
            draft.unlink(missing_ok=True)
            raise
        os.close(self._fd)
        self._fd, self._namespaces = fd, namespaces
        self.nbytes = self._written = len(data)

    def close(self) -> None:
        os.close(self._fd)


def _encode(entries: Sequence[Entry], namespaces: dict[bytes, int]) -> bytes:
    new = {entry.header.namespace for entry in entries if isinstance(entry, Put)} - namespaces.keys()
    if len(namespaces) + len(new) > MAX_NAMESPACES:
        raise OSError(errno.ENOSPC, "too many namespaces for one disk tier")
    return encode(entries, namespaces)
