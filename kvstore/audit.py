"""The audit log of a node: who changed what, one JSON line each, written by the admin API and, for its socket, by the node.

The file only grows; ``logrotate`` with ``copytruncate`` may shorten it. Lines of strangers are limited in number, so that nobody
fills the disk with what is refused; lines of who is known never are.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import structlog

log = structlog.get_logger(__name__)

FILE = "audit.jsonl"
"""In ``node.directory``."""
STRANGERS_PER_SECOND = 10
"""Lines in each second of the clock; how many were left out is in the next line."""


class AuditLog:
    """A file that several processes append to. One thread at a time may call."""

    def __init__(self, path: Path, clock: Callable[[], float] = time.time) -> None:
        self._path = path
        self._clock = clock
        self._second = 0
        self._lines = 0
        self._left_out = 0

    def write(self, entry: Mapping[str, object], known: bool) -> None:
        """Never raises. ``known``: whoever did it could be held to account, or could write the file as well."""
        now = self._clock()
        if not known and not self._may(int(now)):
            self._left_out += 1
            return
        left_out, self._left_out = self._left_out, 0
        line = {"time": now, **entry, **({"left_out": left_out} if left_out else {})}
        try:
            descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
            try:
                os.write(descriptor, json.dumps(line).encode() + b"\n")
            finally:
                os.close(descriptor)
        except OSError as error:
            log.error("audit entry not written", file=str(self._path), error=str(error), **entry)

    def _may(self, second: int) -> bool:
        if second != self._second:
            self._second, self._lines = second, 0
        self._lines += 1
        return self._lines <= STRANGERS_PER_SECOND
