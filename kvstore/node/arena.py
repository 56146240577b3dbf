"""The shared arena: one anonymous shared mapping, made by the node and attached by its clients.

The file behind it has no name: it is made with O_TMPFILE in ``/dev/shm`` and handed over as a descriptor, so nothing is
left behind when the node is killed and its clients have missed it, and a client needs no access to the node's mounts.
"""

from __future__ import annotations

import ctypes
import mmap
import os

from kvstore.errors import ConfigError

SHM_DIRECTORY = "/dev/shm"

_MADV_POPULATE_WRITE = 23  # Linux 5.14; not in Python's mmap
_POPULATE_SLICE = 16 << 20
"""Some 5 ms, for which the kernel keeps other threads of the process from mapping memory."""

_libc = ctypes.CDLL(None)


class Arena:
    """A mapping of the node's slots. Freed when nothing refers to ``buffer`` any more."""

    def __init__(self, fd: int, nbytes: int, epoch: int) -> None:
        """Map ``nbytes`` of the descriptor, which stays owned by this object. The mapping itself does not need it."""
        self.fd = fd
        self.nbytes = nbytes
        self.epoch = epoch
        self._map = mmap.mmap(fd, nbytes, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        self.buffer = memoryview(self._map)

    @classmethod
    def mapped(cls, fd: int, nbytes: int, epoch: int) -> Arena:
        """Map a descriptor that a node sent, and close it: kept open, it would keep the memory of a node that is gone."""
        try:
            arena = cls(fd, nbytes, epoch)
        finally:
            os.close(fd)
        arena.fd = -1
        return arena

    @staticmethod
    def most_bytes(directory: str = SHM_DIRECTORY) -> int:
        """All shared memory of this machine or container, free or not."""
        found = os.statvfs(directory)
        return found.f_blocks * found.f_frsize

    @classmethod
    def create(cls, nbytes: int, epoch: int, directory: str = SHM_DIRECTORY) -> Arena:
        """Reserve ``nbytes`` of shared memory. Raises ConfigError when there is not enough.

        The memory is allocated here, so that a write can never meet a full ``/dev/shm`` (which would kill the writer with
        SIGBUS) and no save pays for page faults.
        """
        free = os.statvfs(directory)
        available = free.f_bavail * free.f_frsize
        remedy = (
            f"Lower host.bytes, or enlarge {directory} (mount -o remount,size=..., or --shm-size of the container)."
        )
        if nbytes > available:
            raise ConfigError("host.bytes", nbytes, f"{directory} has only {available} bytes free", remedy)
        fd = os.open(directory, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            os.posix_fallocate(fd, 0, nbytes)
        except OSError as error:
            os.close(fd)
            raise ConfigError("host.bytes", nbytes, f"{directory}: {error.strerror}", remedy) from error
        return cls(fd, nbytes, epoch)

    def populate(self) -> None:
        """Map every page now, so that no copy pays for page faults: about a second for 4 GiB, for a background thread.

        Not by ``mmap.madvise``, which keeps the interpreter lock: an engine's thread then gets to run a quarter of the time.
        """
        for start in range(0, self.nbytes, _POPULATE_SLICE):
            try:
                slice_ = ctypes.c_char.from_buffer(self._map, start)  # keeps the mapping meanwhile
            except ValueError:  # closed
                return
            length = ctypes.c_size_t(min(_POPULATE_SLICE, self.nbytes - start))
            if _libc.madvise(ctypes.byref(slice_), length, _MADV_POPULATE_WRITE):
                return  # before Linux 5.14: pages come as they are used

    def slot(self, offset: int, length: int) -> memoryview:
        return self.buffer[offset : offset + length]

    def close(self) -> None:
        """Give up the descriptor; the mapping lives on while views of it do."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
        self.buffer.release()
        try:
            self._map.close()
        except BufferError:  # a view is still in use: the mapping goes with it
            pass
