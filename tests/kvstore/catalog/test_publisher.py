"""The publisher's queue: order, the latest state of each block, outages, and its bound."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest

from kvstore.catalog import publisher as publishing
from kvstore.catalog.base import BATCH, Changes
from kvstore.catalog.publisher import Publisher
from kvstore.catalog.sqlite import SQLiteCatalog
from kvstore.errors import CatalogUnavailable
from kvstore.testing.catalog import random_entries


class Interrupted(SQLiteCatalog):
    """A catalog that can be away, and remembers what it was told."""

    def __init__(self, path: Path, scope: str) -> None:
        super().__init__(path, scope)
        self.away = False
        self.told: list[Changes] = []

    async def record(self, changes: Changes) -> None:
        if self.away:
            raise CatalogUnavailable("away")
        await super().record(changes)
        self.told.append(changes)


@pytest.fixture
async def catalog(tmp_path: Path) -> AsyncIterator[Interrupted]:
    catalog = Interrupted(tmp_path / "catalog.db", "s3://bucket")
    yield catalog
    await catalog.close()


@asynccontextmanager
async def running(publisher: Publisher) -> AsyncIterator[None]:
    task = asyncio.create_task(publisher.run())
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


@pytest.fixture
def source() -> random.Random:
    return random.Random(3)


async def test_changes_are_published_in_order_and_in_batches(catalog: Interrupted, source: random.Random) -> None:
    entries = random_entries(source, BATCH + 10)
    publisher = Publisher(catalog)
    for key, entry in entries.items():
        publisher.offer(key, entry)
    async with running(publisher):
        assert await publisher.flush(entries.keys(), timeout=30)
    assert [len(changes) for changes in catalog.told] == [BATCH, 10]
    assert [key for changes in catalog.told for key in changes] == list(entries)
    assert not publisher.pending


async def test_only_the_latest_state_of_a_block_is_published(catalog: Interrupted, source: random.Random) -> None:
    (one, first), (two, second) = random_entries(source, 2).items()
    publisher = Publisher(catalog)
    for key, entry in ((one, first), (two, second), (one, None)):
        publisher.offer(key, entry)
    async with running(publisher):
        assert await publisher.flush([one, two], timeout=30)
    assert [list(changes.items()) for changes in catalog.told] == [[(two, second), (one, None)]]


async def test_an_outage_delays_changes_and_loses_none(
    catalog: Interrupted, source: random.Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publishing, "FIRST_RETRY_SECONDS", 0.001)
    entries = random_entries(source, 20)
    publisher = Publisher(catalog)
    catalog.away = True
    async with running(publisher):
        for key, entry in entries.items():
            publisher.offer(key, entry)
        assert not await publisher.flush(entries.keys(), timeout=30), "told at once that the catalog is away"
        assert not publisher.reachable
        assert set(publisher.pending) == set(entries)
        catalog.away = False
        while publisher.pending:
            await asyncio.sleep(0.001)
        assert publisher.reachable
    assert await catalog.lookup(list(entries)) == list(entries.values())
    assert publisher.published == len(entries)


async def test_a_deletion_does_not_wait_for_a_catalog_that_is_away(catalog: Interrupted, source: random.Random) -> None:
    (key,) = random_entries(source, 1)
    publisher = Publisher(catalog)
    publisher.heard(CatalogUnavailable("away"))
    publisher.offer(key, None)
    assert not await publisher.flush([key], timeout=3600)


async def test_the_queue_is_bounded_and_drops_the_oldest(
    catalog: Interrupted, source: random.Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publishing, "MAX_PENDING", 10)
    entries = random_entries(source, 15)
    publisher = Publisher(catalog)
    for key, entry in entries.items():
        publisher.offer(key, entry)
    assert list(publisher.pending) == list(entries)[5:]
    assert publisher.dropped == 5
