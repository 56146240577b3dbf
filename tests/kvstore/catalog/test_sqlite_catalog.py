"""What only a file can suffer: deletion, damage, another process that holds it."""

from __future__ import annotations

import random
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from kvstore.catalog import open_catalog, sqlite
from kvstore.errors import CatalogUnavailable, ConfigError
from kvstore.testing.catalog import random_entries


async def test_a_file_that_was_deleted_is_made_anew(tmp_path: Path) -> None:
    file = tmp_path / "catalog.db"
    here, there = [await open_catalog(f"sqlite://{file}", "s3://bucket") for _ in range(2)]
    entries = random_entries(random.Random(1), 5)
    await here.record(entries)
    before = await there.status()
    file.unlink()
    after = await here.status()
    assert (after.blocks, after.complete) == (0, False)
    assert after.epoch != before.epoch
    await here.record(entries)
    assert await there.lookup(list(entries)) == list(entries.values())
    await here.close()
    await there.close()


async def test_a_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "catalog.db"
    file.write_bytes(b"something else" * 1000)
    with pytest.raises(ConfigError, match="not a database"):
        await open_catalog(f"sqlite://{file}", "s3://bucket")
    assert file.read_bytes() == b"something else" * 1000


async def test_a_file_that_another_process_holds_is_unavailable_until_it_lets_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite, "BUSY_SECONDS", 0.01)
    file = tmp_path / "catalog.db"
    catalog = await open_catalog(f"sqlite://{file}", "s3://bucket")
    with closing(sqlite3.connect(file, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(CatalogUnavailable, match="locked"):
            await catalog.status()
        late = await open_catalog(f"sqlite://{file}", "s3://bucket")
        other.execute("ROLLBACK")
    assert await catalog.status() == await late.status()
    await catalog.close()
    await late.close()
