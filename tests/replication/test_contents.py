"""What a bucket holds, by its catalog and without it."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from pathlib import Path
from typing import NoReturn

import pytest
import pytest_asyncio
from region_cases import KEY, chain, store, stored

from kvstore.catalog import Catalog, open_catalog
from kvstore.catalog.base import Entry
from kvstore.errors import CatalogUnavailable
from kvstore.identity import BlockKey
from kvstore.testing.blocks import SealedBlock
from kvstore.tiers.object import ObjectSettings
from kvstore.tiers.object.names import block_name
from replication.contents import Contents
from replication.links import Links
from replication.publisher import publish


@pytest.fixture
def place(tmp_path: Path) -> ObjectSettings:
    return ObjectSettings(url=f"file://{tmp_path}/bucket")


@pytest.fixture
def blocks(place: ObjectSettings) -> list[SealedBlock]:
    """Six in the bucket."""
    made = chain(random.Random(1), 6)
    store(place, made)
    return made


@pytest_asyncio.fixture
async def catalog(place: ObjectSettings, tmp_path: Path) -> AsyncIterator[Catalog]:
    opened = await open_catalog(f"sqlite://{tmp_path}/catalog.db", place.url)
    yield opened
    await opened.close()


@pytest_asyncio.fixture
async def bucket(place: ObjectSettings) -> AsyncIterator[Links]:
    async with Links.open([place]) as links:
        yield links


@pytest_asyncio.fixture
async def contents(bucket: Links, catalog: Catalog) -> AsyncIterator[Contents]:
    async with Contents.open(bucket, catalog) as opened:
        yield opened


def entries(blocks: list[SealedBlock]) -> dict[BlockKey, Entry]:
    return {block.key: Entry.of(block.header) for block in blocks}


async def cover(catalog: Catalog, blocks: list[SealedBlock]) -> None:
    """A catalog that knows the whole bucket."""
    await catalog.record(entries(blocks))
    await catalog.complete((await catalog.status()).epoch)


async def never(*_: object) -> NoReturn:
    raise AssertionError("the bucket was asked")


async def away(*_: object) -> NoReturn:
    raise CatalogUnavailable("away")


async def test_a_catalog_that_covers_the_bucket_answers_alone(
    contents: Contents, catalog: Catalog, blocks: list[SealedBlock], monkeypatch: pytest.MonkeyPatch
) -> None:
    await cover(catalog, blocks)
    monkeypatch.setattr(contents.bucket, "listing", never)
    assert await contents.blocks() == entries(blocks)
    assert await contents.used_bytes() == sum(block.header.envelope_bytes for block in blocks)
    await catalog.record({blocks[5].key: None})
    assert await contents.blocks() == entries(blocks[:5])


async def test_publishing_reads_no_block_that_the_catalog_knows(
    contents: Contents, catalog: Catalog, blocks: list[SealedBlock], monkeypatch: pytest.MonkeyPatch
) -> None:
    await cover(catalog, blocks)
    monkeypatch.setattr(contents.bucket, "start_of", never)
    manifest = await publish(contents, "na", KEY)
    assert [(b.key, b.parent) for b in manifest.blocks] == [(b.key, b.header.parent) for b in blocks]


async def test_an_incomplete_catalog_adds_to_a_listing(
    contents: Contents, catalog: Catalog, blocks: list[SealedBlock]
) -> None:
    await catalog.record(entries(blocks[:2]))
    found = await contents.blocks()
    assert found.keys() == entries(blocks).keys()
    assert [found[block.key].tokens for block in blocks] == [64, 64, 0, 0, 0, 0]
    assert await contents.used_bytes() is None


async def test_what_the_catalog_says_of_another_object_does_not_count(
    contents: Contents, catalog: Catalog, blocks: list[SealedBlock]
) -> None:
    wrong = Entry.of(blocks[0].header)._replace(length=99)
    await catalog.record({wrong.key: wrong})
    assert (await contents.blocks())[wrong.key].envelope_bytes == blocks[0].header.envelope_bytes


async def test_a_catalog_that_is_away_costs_a_listing(
    contents: Contents, catalog: Catalog, blocks: list[SealedBlock], monkeypatch: pytest.MonkeyPatch
) -> None:
    await cover(catalog, blocks)
    with monkeypatch.context() as outage:
        outage.setattr(catalog, "follow", away)
        assert (await contents.blocks()).keys() == entries(blocks).keys()
    monkeypatch.setattr(contents.bucket, "listing", never)
    assert await contents.blocks() == entries(blocks)


async def test_a_catalog_that_was_dropped_is_read_again(
    contents: Contents, catalog: Catalog, blocks: list[SealedBlock], monkeypatch: pytest.MonkeyPatch
) -> None:
    await cover(catalog, blocks)
    await contents.blocks()
    await catalog.reset()
    await cover(catalog, blocks[:3])
    monkeypatch.setattr(contents.bucket, "listing", never)
    assert await contents.blocks() == entries(blocks[:3])


async def test_what_is_copied_is_known_at_once_and_recorded(
    bucket: Links, catalog: Catalog, blocks: list[SealedBlock]
) -> None:
    await cover(catalog, blocks[:5])
    async with Contents.open(bucket, catalog) as contents:
        await contents.blocks()
        last = Entry.of(blocks[5].header)
        contents.copied(last)
        assert (await contents.blocks())[last.key] == last
    assert await catalog.lookup([last.key]) == [last]


async def test_a_deletion_goes_through_the_index_first(
    contents: Contents,
    catalog: Catalog,
    blocks: list[SealedBlock],
    place: ObjectSettings,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    await cover(catalog, blocks)
    gone = [Entry.of(block.header) for block in reversed(blocks[3:])]
    delete = contents.bucket.delete
    indexed: list[Entry | None] = []

    async def look_then_delete(names: list[str]) -> None:
        indexed.extend(await catalog.lookup([entry.key for entry in gone]))
        assert names == [block_name(entry.namespace, entry.key) for entry in gone]
        await delete(names)

    monkeypatch.setattr(contents.bucket, "delete", look_then_delete)
    assert await contents.delete(gone) == 3
    assert indexed == [None] * 3
    assert stored(place).keys() == entries(blocks[:3]).keys()
    assert await contents.blocks() == entries(blocks[:3])


async def test_without_a_catalog_the_bucket_is_listed(
    bucket: Links, blocks: list[SealedBlock], place: ObjectSettings
) -> None:
    contents = Contents(bucket)
    assert (await contents.blocks()).keys() == entries(blocks).keys()
    assert await contents.used_bytes() is None
    await contents.delete([Entry.of(blocks[5].header)])
    assert stored(place).keys() == entries(blocks[:5]).keys()
