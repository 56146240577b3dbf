"""Reaching behind a disk tier: its files, and system calls that fail."""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path
from threading import Lock

from kvstore.identity import BlockKey
from kvstore.tiers.disk import Files


def find_slot(directory: Path, key: BlockKey) -> tuple[Path, int]:
    """File and position of a block's envelope."""
    for path in sorted(directory.glob("segment-*")):
        data = path.read_bytes()
        for start in range(4096, len(data), 4096):
            if data[start : start + 8] == b"KVBLOCK\x00" and data[start + 32 : start + 48] == key:
                return path, start
    raise LookupError(key.hex())


def flip(path: Path, position: int) -> None:
    overwrite(path, position, bytes([path.read_bytes()[position] ^ 4]))


def overwrite(path: Path, position: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(position)
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


class DyingFiles(Files):
    """Kills the process at the n-th call; a write is cut short somewhere first."""

    def __init__(self, calls: int, source: random.Random) -> None:
        self.calls = calls
        self.source = source

    def pwrite(self, fd, data, offset):
        if self._is_last():
            view = memoryview(data)
            keep = self.source.randrange(0, len(view) + 1) // 4096 * 4096
            super().pwrite(fd, view[:keep], offset)
            self._die()
        super().pwrite(fd, data, offset)

    def fdatasync(self, fd):
        if self._is_last():
            self._die()
        super().fdatasync(fd)

    def replace(self, source, target):
        if self._is_last():
            self._die()
        super().replace(source, target)

    def _is_last(self) -> bool:
        self.calls -= 1
        return self.calls == 0

    def _die(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


class FailingFiles(Files):
    """Raises ``error`` from the named calls while it is set."""

    def __init__(self, *calls: str) -> None:
        self.calls = calls
        self.error: int | None = None

    def _check(self, call: str) -> None:
        if self.error is not None and call in self.calls:
            raise OSError(self.error, os.strerror(self.error))

    def pwrite(self, fd, data, offset):
        self._check("pwrite")
        super().pwrite(fd, data, offset)

    def pread(self, fd, into, offset):
        self._check("pread")
        return super().pread(fd, into, offset)

    def fdatasync(self, fd):
        self._check("fdatasync")
        super().fdatasync(fd)


class RecordingFiles(Files):
    """Notes every write, sync and rename, so that a loss of power can be played at any point of them."""

    def __init__(self) -> None:
        self.events: list[tuple] = []
        """("write", file, offset, data), ("sync", file, events before it began), ("rename", source, target), or marks."""
        self._lock = Lock()

    def mark(self, *what) -> None:
        with self._lock:
            self.events.append(what)

    def pwrite(self, fd, data, offset):
        super().pwrite(fd, data, offset)
        self.mark("write", _name(fd), offset, bytes(data))

    def fdatasync(self, fd):
        begun = len(self.events)
        super().fdatasync(fd)
        self.mark("sync", _name(fd), begun)

    def replace(self, source, target):
        super().replace(source, target)
        self.mark("rename", source.name, target.name)

    def after_power_loss(self, cut: int, directory: Path, source: random.Random) -> None:
        """Write to ``directory`` what the medium may hold after the first ``cut`` events.

        A write that no later sync of its file covers is there, or not, or in part.
        """
        files: dict[str, bytearray] = {}
        for position, event in enumerate(self.events[:cut]):
            if event[0] == "write":
                _, name, offset, data = event
                if not self._synced(name, position, cut):
                    data = data[: source.choice([0, len(data), source.randrange(0, len(data) + 1, 64)])]
                content = files.setdefault(name, bytearray())
                content.extend(bytes(max(0, offset + len(data) - len(content)) if data else 0))
                content[offset : offset + len(data)] = data
            elif event[0] == "rename":
                files[event[2]] = files.pop(event[1])
        directory.mkdir()
        for name, content in files.items():
            (directory / name).write_bytes(content)

    def _synced(self, name: str, position: int, cut: int) -> bool:
        return any(
            event[0] == "sync" and event[1] == name and event[2] > position for event in self.events[position:cut]
        )


def _name(fd: int) -> str:
    return Path(os.readlink(f"/proc/self/fd/{fd}")).name
