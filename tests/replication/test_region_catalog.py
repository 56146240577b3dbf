"""What the regional service has of its region's catalog: reports, pins, the bell of purges, and where it tells its cursors."""

from __future__ import annotations

import json
import random
import time
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path

import pytest
from region_cases import LLAMA, chain, store, stored
from region_pair import Pair

from kvstore.catalog import Catalog, open_catalog
from kvstore.catalog.base import Entry
from kvstore.catalog.cursors import FOLDER as CURSORS
from kvstore.catalog.cursors import cursors
from kvstore.catalog.pins import RegionPins
from kvstore.catalog.purges import Bell
from kvstore.identity import BlockKey
from kvstore.policy.pins import Pins
from kvstore.testing.redis import redis_server
from kvstore.testing.servers import ServerUnavailable, free_port
from kvstore.tiers.object import ObjectSettings
from kvstore.tiers.object.hotness import HotnessSnapshot
from kvstore.tiers.object.names import hotness_name
from kvstore.tombstones import Tombstone
from replication.contents import Contents
from replication.evictor import make_room, victims
from replication.links import Links
from replication.publisher import entomb
from replication.quotas import keep_quotas
from replication.replicator import Replicator
from replication.retiring import retire
from replication.topology import Retention

ONE, TWO = BlockKey(b"1" * 16), BlockKey(b"2" * 16)


@pytest.fixture
def folder(tmp_path: Path) -> ObjectSettings:
    return ObjectSettings(url=f"file://{tmp_path}/bucket")


@asynccontextmanager
async def region(folder: ObjectSettings, tmp_path: Path, url: str = "") -> AsyncIterator[tuple[Contents, Catalog]]:
    catalog = await open_catalog(url or f"sqlite://{tmp_path}/catalog.db", folder.url)
    async with Links.open([folder]) as bucket, Contents.open(bucket, catalog) as contents:
        yield contents, catalog
    await catalog.close()


async def index(catalog: Catalog, blocks: list[Entry]) -> None:
    await catalog.record({entry.key: entry for entry in blocks})
    await catalog.complete((await catalog.status()).epoch)


async def pin(catalog: Catalog, keys: list[BlockKey]) -> None:
    """As a node does."""
    pins = Pins()
    pins.pin(keys, time.time() + 600, time.time())
    await RegionPins(catalog.documents, pins, LLAMA.tenant).round()


async def test_of_each_node_the_catalogs_report_counts_and_else_the_buckets(
    folder: ObjectSettings, tmp_path: Path
) -> None:
    async with region(folder, tmp_path) as (contents, catalog):
        now = time.time()

        def report(score: float, key: BlockKey) -> bytes:
            return HotnessSnapshot(now, 3600.0, {key: score}).pack()

        await contents.bucket.put(hotness_name("a"), report(1.0, ONE), create=False)
        await contents.bucket.put(hotness_name("b"), report(2.0, TWO), create=False)
        await contents.bucket.put(hotness_name("c"), b"junk", create=False)
        assert sorted(sum(one.scores.values()) for one in await contents.reports()) == [1.0, 2.0]
        await catalog.documents.put("hotness/a", report(5.0, ONE), 60)
        assert sorted(sum(one.scores.values()) for one in await contents.reports()) == [2.0, 5.0]
    async with region(folder, tmp_path, f"redis://127.0.0.1:{free_port()}/0") as (contents, _):
        assert sorted(sum(one.scores.values()) for one in await contents.reports()) == [1.0, 2.0], "the catalog is away"
        assert await contents.pinned() == set()
        await contents.purged()


def test_what_is_pinned_goes_last() -> None:
    def block(name: int, parent: bytes = bytes(16), depth: int = 0) -> Entry:
        return Entry(BlockKey(bytes([name]) * 16), 5000, b"n" * 16, 16, depth, BlockKey(parent), 9)

    head, other = block(1), block(3)
    tail = block(2, head.key, 1)
    hot = {other.key: 9.0}
    assert victims([head, tail, other], hot, 1, {tail.key}) == [other]
    assert victims([head, tail, other], hot, 1 << 40, {tail.key}) == [other, tail, head]
    assert victims([head, tail, other], hot, 1, {head.key}) == [tail], "what continues a pinned block is not"


@pytest.mark.parametrize("by", ["cap", "quota", "retention"])
async def test_what_a_node_pinned_stays_in_the_bucket(folder: ObjectSettings, tmp_path: Path, by: str) -> None:
    blocks = [chain(random.Random(number), 4) for number in range(4)]
    for one in blocks:
        store(folder, one)
    entries = [Entry.of(block.header)._replace(stored=1000) for one in blocks for block in one]
    size = entries[0].envelope_bytes
    kept = [block.key for block in blocks[2]]
    async with region(folder, tmp_path) as (contents, catalog):
        await index(catalog, entries)
        await pin(catalog, kept)
        assert await contents.pinned() == set(kept)
        if by == "cap":
            assert await make_room(contents, 8 * size) == 9
        elif by == "quota":
            assert await keep_quotas(contents, {LLAMA.tenant: 8 * size}, enforce=True) == 9
        else:
            rule = Retention.model_validate({"ttl": "1h"})
            assert (await retire(contents, [rule], enforce=True)).blocks.total() == 12
    assert set(kept) <= stored(folder).keys()


async def test_pins_are_remembered_while_the_catalog_is_away(folder: ObjectSettings, tmp_path: Path) -> None:
    with ExitStack() as stack:
        try:
            server = stack.enter_context(redis_server())
        except ServerUnavailable as error:
            pytest.skip(str(error))
        async with region(folder, tmp_path, server.url) as (contents, catalog):
            await pin(catalog, [ONE])
            assert await contents.pinned() == {ONE}
            server.stop()
            assert await contents.pinned() == {ONE}


async def test_a_purge_rings_for_the_nodes(folder: ObjectSettings, tmp_path: Path) -> None:
    rung: list[bool] = []
    async with region(folder, tmp_path) as (contents, catalog):
        bell = Bell(catalog.documents, lambda: rung.append(True))
        await bell.round()
        assert not rung
        await entomb(contents, [Tombstone(time=time.time(), namespace=LLAMA.digest)])
        await bell.round()
        assert rung == [True]
        await bell.round()
        assert rung == [True], "once"


@pytest.mark.s3
async def test_how_far_replication_is_can_be_asked_of_the_catalog(
    pair: Pair, tmp_path: Path, random_source: random.Random
) -> None:
    store(pair.na, chain(random_source, 3))
    catalog = await open_catalog(f"sqlite://{tmp_path}/eu.db", pair.eu.url)
    async with Replicator.open(pair.write(), "eu", catalog) as replicator:
        await replicator.cycle()
        (cursor,) = await cursors(catalog.documents)
        assert (cursor.source, cursor.blocks, cursor.caught_up) == ("na", 0, 0.0)
        assert "not published" in cursor.problem
        await pair.publish()
        await replicator.cycle()
        (cursor,) = await cursors(catalog.documents)
        assert (cursor.source, cursor.blocks, cursor.problem) == ("na", 3, "")
        assert cursor.caught_up == cursor.published > 0
    for body in (b"", b"7", b"{}", json.dumps({"source": "x", "sequence": float("inf")}).encode()):
        await catalog.documents.put(f"{CURSORS}/x", body, 60)
        assert [one.source for one in await cursors(catalog.documents)] == ["na"]
    await catalog.close()
