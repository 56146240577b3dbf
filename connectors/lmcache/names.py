"""What chunks are called. The node knows blocks by keyed hashes, from which no name comes back, so a listing needs this.

One SQLite file of the machine, for all LMCache servers on it: a chunk has a name here once one of them has stored or loaded it.
"""

from __future__ import annotations

import logging
import sqlite3
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path

logger = logging.getLogger("kvstore")

MOST_NAMES = 1 << 18
"""Kept in one file, some 60 MB; the first ones go first."""
BUSY_SECONDS = 1.0
"""How long to wait for another server that writes."""

_SCHEMA = """
CREATE TABLE IF NOT EXISTS chunks (id INTEGER PRIMARY KEY, space TEXT, name TEXT, bytes INTEGER);
CREATE UNIQUE INDEX IF NOT EXISTS chunks_named ON chunks (space, name);
"""


class Names:
    """Names of chunks and their bytes. Thread-safe. Nothing raises: without its file it names what this process moved."""

    def __init__(self, path: Path, space: str, most: int = MOST_NAMES) -> None:
        """``space`` says whose names these are: servers of one configuration share them, others do not see them."""
        self._space = space
        self._most = most
        self._lock = threading.Lock()
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            path.touch(mode=0o600)
            self._db = _connect(str(path))
        except (OSError, sqlite3.Error) as error:
            logger.warning("KV store: no names can be kept in %s (%s): a listing begins with this process", path, error)
            self._db = _connect(":memory:")

    def add(self, chunks: Iterable[tuple[str, int]]) -> None:
        """Chunks that the node holds, by name, with their bytes."""
        try:
            with self._lock, self._db:
                self._db.executemany(
                    "INSERT OR IGNORE INTO chunks (space, name, bytes) VALUES (?, ?, ?)",
                    [(self._space, name, nbytes) for name, nbytes in chunks],
                )
                self._db.execute("DELETE FROM chunks WHERE id <= (SELECT max(id) FROM chunks) - ?", (self._most,))
        except sqlite3.Error as error:
            logger.warning("KV store: chunks were stored that no listing will name: %s", error)

    def remove(self, names: Sequence[str]) -> dict[str, int]:
        """Forget names; those that were known, with their bytes."""
        gone = {}
        try:
            with self._lock, self._db:
                for name in names:
                    for (nbytes,) in self._db.execute(
                        "DELETE FROM chunks WHERE space = ? AND name = ? RETURNING bytes", (self._space, name)
                    ):
                        gone[name] = nbytes
        except sqlite3.Error as error:
            logger.warning("KV store: names of deleted chunks were kept: %s", error)
        return gone

    def between(self, low: str, high: str, count: int) -> list[tuple[str, int]]:
        """The first names after ``low`` and before ``high``, in order, with their bytes."""
        query = "SELECT name, bytes FROM chunks WHERE space = ? AND name > ? AND name < ? ORDER BY name LIMIT ?"
        try:
            with self._lock:
                return self._db.execute(query, (self._space, low, high, count)).fetchall()
        except sqlite3.Error as error:
            logger.warning("KV store: names of chunks cannot be read: %s", error)
            return []

    def close(self) -> None:
        self._db.close()


def _connect(path: str) -> sqlite3.Connection:
    db = sqlite3.connect(path, timeout=BUSY_SECONDS, check_same_thread=False)
    try:
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = OFF")  # a name that is lost in a power cut costs a line of a listing
        db.executescript(_SCHEMA)
    except sqlite3.Error:
        db.close()
        raise
    return db
