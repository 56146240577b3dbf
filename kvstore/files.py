"""Small files that are replaced whole: who reads one, or starts after a crash, finds the old content or the new."""

from __future__ import annotations

import os
from pathlib import Path

from kvstore.errors import ConfigError


def replace_file(path: Path, content: bytes) -> None:
    """Put ``content`` in place of the file's. Not synced: for what can be learnt anew after a power cut. One writer at a time.

    Raises OSError.
    """
    scratch = path.with_suffix(".tmp")
    scratch.write_bytes(content)
    os.replace(scratch, path)


def replace_private(path: Path, content: bytes) -> None:
    """The same for what only its user may read; synced."""
    scratch = path.with_suffix(".tmp")
    with open(os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(scratch, path)


def check_private(path: Path, found: os.stat_result, setting: str, most_bytes: int) -> None:
    """Raises ConfigError, naming ``setting``, for a file that others may read, its group may write, or that is too large."""
    if found.st_mode & 0o027:
        problem, remedy = "others may read it, or its group may write it", f"chmod 600 {path}"
        raise ConfigError(setting, str(path), problem, remedy)
    if found.st_size > most_bytes:
        raise ConfigError(setting, str(path), f"{found.st_size} bytes are too many for it", "Name the right file.")
