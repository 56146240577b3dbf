"""The directory of a disk tier: one process at a time, one format."""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path

from kvstore.errors import ConfigError
from kvstore.parsing import parse_json
from kvstore.tiers.disk.files import Files

FORMAT = 1
_MAX_FORMAT_BYTES = 4096


def lock(directory: Path) -> int:
    """Make the directory if need be and lock it until the returned descriptor is closed, or the process dies.

    Raises ConfigError when the directory cannot be used or is in use.
    """
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        fd = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        remedy = "Give a directory on a local disk that this user may write"
        raise ConfigError("disk.directory", str(directory), error.strerror or str(error), remedy) from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        problem = "another process uses this directory"
        raise ConfigError("disk.directory", str(directory), problem, "Stop it, or give each node its own") from None
    return fd


def read_format(directory: Path) -> int | None:
    """Segment size that the directory was made with; None for a new one. Raises ConfigError when another version made it."""
    path = directory / "format.json"
    remedy = "Empty the directory, or use the version that made it"
    try:
        with path.open("rb") as file:
            text = file.read(_MAX_FORMAT_BYTES)
    except FileNotFoundError:
        return None
    try:
        found = parse_json(text)
        version, segment_bytes = found["format"], found["segment_bytes"]
    except (ValueError, KeyError, TypeError):
        raise ConfigError("disk.directory", str(directory), f"{path.name} is not readable", remedy) from None
    if version != FORMAT or type(segment_bytes) is not int:
        problem = f"it has format {version!r}, this version reads {FORMAT}"
        raise ConfigError("disk.directory", str(directory), problem, remedy)
    return segment_bytes


def write_format(directory: Path, segment_bytes: int, files: Files) -> None:
    """Record the segment size, durably. Raises OSError."""
    path = directory / "format.json"
    draft = path.with_suffix(".new")
    fd = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        files.pwrite(fd, json.dumps({"format": FORMAT, "segment_bytes": segment_bytes}).encode(), 0)
        files.fdatasync(fd)
    finally:
        os.close(fd)
    files.replace(draft, path)
