"""A catalog in one SQLite file: for one machine, any number of processes on it."""

from __future__ import annotations

import asyncio
import secrets
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from kvstore.catalog.base import (
    BATCH,
    CHANGES_KEPT,
    Batch,
    Catalog,
    CatalogStatus,
    Changes,
    Claim,
    Cursor,
    Entry,
    adds_nothing,
    check_name,
    read_changes,
)
from kvstore.catalog.documents import (
    BEGINNING,
    MOST_DOCUMENTS,
    PAGE,
    PAGE_BYTES,
    Document,
    Documents,
    Mark,
    Page,
    check_document,
)
from kvstore.errors import CatalogUnavailable, ConfigError
from kvstore.identity import BlockKey

T = TypeVar("T")

BUSY_SECONDS = 2.0
"""How long to wait for another process that writes."""

_SCHEMA = """
CREATE TABLE IF NOT EXISTS meta (name TEXT PRIMARY KEY, value) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS blocks (key BLOB PRIMARY KEY, value BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS changes (seq INTEGER PRIMARY KEY, key BLOB NOT NULL, value BLOB);
CREATE TABLE IF NOT EXISTS claims (name TEXT PRIMARY KEY, holder TEXT, token INTEGER, expires REAL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS documents (name TEXT PRIMARY KEY, folder TEXT, body BLOB, revision INTEGER, expires REAL);
CREATE INDEX IF NOT EXISTS documents_written ON documents (folder, revision);
"""


class SQLiteCatalog(Catalog):
    """All calls run in one thread of their own. Open it with ``SQLiteCatalog.open``."""

    def __init__(self, path: Path, scope: str) -> None:
        self._path = path
        self._scope = scope
        self.documents = SQLiteDocuments(self)
        self._connection: sqlite3.Connection | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="kvstore-catalog")

    @classmethod
    async def open(cls, path: Path, scope: str) -> SQLiteCatalog:
        """``scope`` says whose catalog it is: the URL of the bucket. Raises ConfigError when the file cannot be used."""
        catalog = cls(path, scope)
        try:
            await catalog._run(lambda _: None)
        except CatalogUnavailable as error:
            if getattr(error.__cause__, "sqlite_errorcode", None) == sqlite3.SQLITE_BUSY:
                return catalog
            await catalog.close()
            raise ConfigError("catalog.url", f"sqlite://{path}", str(error), "Name a writable file.") from error
        except BaseException:
            await catalog.close()
            raise
        return catalog

    async def record(self, changes: Changes) -> None:
        await self._run(_record, changes)

    async def follow(self, cursor: Cursor, limit: int = BATCH) -> Batch:
        return await self._run(_follow, cursor, limit)

    async def lookup(self, keys: Sequence[BlockKey]) -> list[Entry | None]:
        return await self._run(_lookup, keys)

    async def claim(self, name: str, holder: str, seconds: float) -> Claim | None:
        return await self._run(_claim, check_name(name), check_name(holder), seconds)

    async def status(self) -> CatalogStatus:
        return await self._run(_status)

    async def reset(self) -> str:
        return await self._run(_reset)

    async def complete(self, epoch: str) -> bool:
        return await self._run(_complete, epoch)

    async def close(self) -> None:
        await asyncio.to_thread(self._thread.shutdown)
        self._disconnect()

    async def _run(self, work: Callable[..., T], *arguments: object) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._transact, work, arguments)

    def _transact(self, work: Callable[..., T], arguments: tuple[object, ...]) -> T:
        """Run ``work`` in a transaction; connect first if that failed before."""
        try:
            if self._connection is not None and not self._path.exists():
                self._disconnect()  # else changes would go to a file that nobody finds
            if self._connection is None:
                self._connection = _connect(self._path, self._scope)
            with _transaction(self._connection):
                return work(self._connection, *arguments)
        except (sqlite3.Error, OSError) as error:
            self._disconnect()
            raise CatalogUnavailable(f"{self._path}: {error}") from error

    def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()


class SQLiteDocuments(Documents):
    """The documents of a catalog in a file."""

    def __init__(self, catalog: SQLiteCatalog) -> None:
        self._catalog = catalog

    async def put(self, name: str, body: bytes, seconds: float, expected: int | None = None) -> int | None:
        return await self._catalog._run(_put_document, check_document(name, body), name, body, seconds, expected)

    async def read(self, folder: str, since: Mark = BEGINNING) -> Page:
        return await self._catalog._run(_read_documents, folder, since)


def _connect(path: Path, scope: str) -> sqlite3.Connection:
    path.parent.mkdir(parents=True, exist_ok=True)
    db = sqlite3.connect(path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False)
    try:
        db.execute("PRAGMA journal_mode=WAL")
        db.execute("PRAGMA synchronous=NORMAL")  # a crash of the machine may lose the last changes, never the file
        db.execute("PRAGMA wal_autocheckpoint=20000")  # measured: inserts cost a quarter of what they do at 1000
        db.execute("PRAGMA cache_size=-65536")
        db.executescript(_SCHEMA)
        with _transaction(db):
            if _get(db, "epoch") is None:
                _set(db, "scope", scope)
                _begin_epoch(db)
            elif _get(db, "scope") != scope:
                remedy = "Give each bucket a catalog of its own, or remove the file."
                raise ConfigError("catalog.url", f"sqlite://{path}", f"belongs to {_get(db, 'scope')}", remedy)
    except BaseException:
        db.close()
        raise
    return db


@contextmanager
def _transaction(db: sqlite3.Connection) -> Iterator[None]:
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
    except BaseException:
        db.execute("ROLLBACK")
        raise
    db.execute("COMMIT")


def _record(db: sqlite3.Connection, changes: Changes) -> None:
    old = _values(db, list(changes))
    used, seq = int(_get(db, "used_bytes")), int(_get(db, "seq"))
    for key, entry in changes.items():
        before = old.get(key)
        if entry is None:
            if before is None:
                continue
            after = None
            db.execute("DELETE FROM blocks WHERE key = ?", (key,))
        else:
            if before is not None and adds_nothing(entry, before):
                continue
            after = entry.pack()
            db.execute("INSERT OR REPLACE INTO blocks VALUES (?, ?)", (key, after))
        seq += 1
        db.execute("INSERT INTO changes VALUES (?, ?, ?)", (seq, key, after))
        used += _size(key, after) - _size(key, before)
    _set(db, "used_bytes", used)
    _set(db, "seq", seq)
    db.execute("DELETE FROM changes WHERE seq <= ?", (seq - CHANGES_KEPT,))


def _size(key: BlockKey, value: bytes | None) -> int:
    entry = None if value is None else Entry.unpack(key, value)
    return 0 if entry is None else entry.envelope_bytes


def _follow(db: sqlite3.Connection, cursor: Cursor, limit: int) -> Batch:
    epoch, seq = str(_get(db, "epoch")), int(_get(db, "seq"))
    if cursor.epoch == epoch and cursor.since > seq:  # an older copy of the file was put in place
        epoch = _begin_again(db)
    (oldest,) = db.execute("SELECT MIN(seq) FROM changes").fetchone()
    restarted = cursor.epoch != epoch or (cursor.since < seq and (oldest is None or oldest > cursor.since + 1))
    since, page = (seq, "") if restarted else (cursor.since, cursor.page)
    if page is not None:
        query = "SELECT key, value FROM blocks WHERE key > ? ORDER BY key LIMIT ?"
        rows = db.execute(query, (bytes.fromhex(page), limit)).fetchall()
        page = rows[-1][0].hex() if len(rows) == limit else None
    else:
        query = "SELECT seq, key, value FROM changes WHERE seq > ? ORDER BY seq LIMIT ?"
        numbered = db.execute(query, (since, limit)).fetchall()
        since = numbered[-1][0] if numbered else since
        rows = [row[1:] for row in numbered]
    return Batch(
        changes=read_changes(rows),
        cursor=Cursor(epoch, since, page),
        restarted=restarted,
        caught_up=page is None and since == seq,
        complete=bool(_get(db, "complete")),
        used_bytes=int(_get(db, "used_bytes")),
    )


def _lookup(db: sqlite3.Connection, keys: Sequence[BlockKey]) -> list[Entry | None]:
    values = _values(db, keys)
    return [Entry.unpack(key, values[key]) if key in values else None for key in keys]


def _values(db: sqlite3.Connection, keys: Sequence[BlockKey]) -> dict[BlockKey, bytes]:
    marks = ",".join("?" * len(keys))
    return dict(db.execute(f"SELECT key, value FROM blocks WHERE key IN ({marks})", keys))


def _claim(db: sqlite3.Connection, name: str, holder: str, seconds: float) -> Claim | None:
    now = time.time()
    db.execute("DELETE FROM claims WHERE expires <= ?", (now,))
    held = db.execute("SELECT holder, token FROM claims WHERE name = ?", (name,)).fetchone()
    if held is not None and held[0] != holder:
        return None
    if not seconds:
        db.execute("DELETE FROM claims WHERE name = ?", (name,))
        return None
    token = held[1] if held is not None else int(_get(db, "token") or 0) + 1
    if held is None:
        _set(db, "token", token)
    db.execute("INSERT OR REPLACE INTO claims VALUES (?, ?, ?, ?)", (name, holder, token, now + seconds))
    return Claim(name, holder, token, now + seconds)


def _status(db: sqlite3.Connection) -> CatalogStatus:
    query = "SELECT name, holder, token, expires FROM claims WHERE expires > ? ORDER BY name"
    (blocks,) = db.execute("SELECT COUNT(*) FROM blocks").fetchone()
    return CatalogStatus(
        epoch=str(_get(db, "epoch")),
        complete=bool(_get(db, "complete")),
        blocks=blocks,
        used_bytes=int(_get(db, "used_bytes")),
        changes=int(_get(db, "seq")),
        claims=tuple(Claim(*row) for row in db.execute(query, (time.time(),))),
    )


def _reset(db: sqlite3.Connection) -> str:
    db.execute("DELETE FROM blocks")
    return _begin_epoch(db)


def _complete(db: sqlite3.Connection, epoch: str) -> bool:
    if _get(db, "epoch") != epoch:
        return False
    _set(db, "complete", 1)
    return True


def _put_document(
    db: sqlite3.Connection, folder: str, name: str, body: bytes, seconds: float, expected: int | None
) -> int | None:
    now = time.time()
    db.execute("DELETE FROM documents WHERE folder = ? AND expires <= ?", (folder, now))
    known = db.execute("SELECT revision FROM documents WHERE name = ?", (name,)).fetchone()
    if expected is not None and expected != (known[0] if known else 0):
        return None
    revision = int(_get(db, "revision") or 0) + 1
    _set(db, "revision", revision)
    if not seconds:
        db.execute("DELETE FROM documents WHERE name = ?", (name,))
        return revision
    row = (name, folder, body, revision, now + seconds)
    db.execute("INSERT OR REPLACE INTO documents VALUES (?, ?, ?, ?, ?)", row)
    spared = "SELECT name FROM documents WHERE folder = ? ORDER BY expires DESC LIMIT -1 OFFSET ?"
    db.execute(f"DELETE FROM documents WHERE name IN ({spared})", (folder, MOST_DOCUMENTS))
    return revision


def _read_documents(db: sqlite3.Connection, folder: str, mark: Mark) -> Page:
    epoch, revision = str(_get(db, "epoch")), int(_get(db, "revision") or 0)
    restarted = mark.epoch != epoch or mark.revision > revision
    since = 0 if restarted else mark.revision
    query = (
        "SELECT name, body, revision, expires FROM documents"
        " WHERE folder = ? AND revision > ? AND expires > ? ORDER BY revision LIMIT ?"
    )
    found: list[Document] = []
    room, caught_up = PAGE_BYTES, True
    for row in db.execute(query, (folder, since, time.time(), PAGE)):
        if room <= 0:
            caught_up = False
            break
        found.append(Document(*row))
        room -= len(found[-1].body)
    caught_up = caught_up and len(found) < PAGE
    return Page(tuple(found), Mark(epoch, revision if caught_up else found[-1].revision), restarted, caught_up)


def _begin_epoch(db: sqlite3.Connection) -> str:
    db.execute("DELETE FROM changes")
    _set(db, "seq", 0)
    _set(db, "used_bytes", 0)
    return _begin_again(db)


def _begin_again(db: sqlite3.Connection) -> str:
    epoch = secrets.token_hex(8)
    _set(db, "epoch", epoch)
    _set(db, "complete", 0)
    return epoch


def _get(db: sqlite3.Connection, name: str) -> Any:
    row = db.execute("SELECT value FROM meta WHERE name = ?", (name,)).fetchone()
    return None if row is None else row[0]


def _set(db: sqlite3.Connection, name: str, value: str | int) -> None:
    db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (name, value))
