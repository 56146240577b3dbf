"""Nodes of a region share blocks through a bucket and a catalog, and go on without the catalog when it is away."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest
from region_nodes import BLOCK_BYTES, SPACE, Peer, Region, wait_for

from kvstore.catalog import open_catalog, publisher
from kvstore.catalog.base import Entry
from kvstore.identity import BlockKey
from kvstore.testing.redis import RedisServer
from kvstore.tiers.object import ObjectSettings


def test_a_block_saved_on_one_node_is_found_by_the_other(region: Region) -> None:
    a, b = region.node(), region.node()
    for seed in range(3):
        keys = a.save(seed)
        print(f"listed elsewhere after {wait_for(lambda: b.lists(keys) == 3) * 1e3:.0f} ms")  # noqa: B023
        assert b.client.lookup(keys).blocks == 3
        assert b.load(keys) == 3


def test_a_deletion_on_one_node_reaches_the_other(region: Region) -> None:
    a, b = region.node(), region.node()
    keys = a.save(1)
    wait_for(lambda: b.lists(keys) == 3)
    a.client.call("delete", keys=b"".join(keys[1:]), namespace=None)
    wait_for(lambda: b.lists(keys) == 1)
    assert b.load(keys) == 1


def test_a_new_node_starts_with_what_the_catalog_knows(region: Region) -> None:
    a = region.node()
    keys = a.save(1)
    catalog_is_complete(a)
    region.object(keys[2]).unlink()  # a listing would not show it
    b = region.node()
    wait_for(lambda: b.lists(keys) == 3)
    assert b.load(keys) == 2, "the bucket is the truth"
    wait_for(lambda: a.lists(keys) == 2)


def test_what_others_put_into_the_bucket_is_found_and_recorded(region: Region) -> None:
    a, stranger = region.node(), region.node("catalog.url=")
    catalog_is_complete(a)
    keys = stranger.save(1)
    wait_for(lambda: a.client.lookup(keys).blocks == 3)
    assert a.load(keys) == 3
    b = region.node()
    wait_for(lambda: b.lists(keys) == 3)


def test_a_catalog_that_is_lost_fills_itself_again(redis: RedisServer, redis_region: Region) -> None:
    a, b = redis_region.node(), redis_region.node()
    keys = a.save(1)
    wait_for(lambda: b.lists(keys) == 3)
    catalog_is_complete(a)
    with redis.client() as client:
        client.flushall()
    more = b.save(2)
    wait_for(lambda: a.lists(more) == 3)
    assert (a.lists(keys), b.lists(keys)) == (3, 3)
    catalog_is_complete(a)
    c = redis_region.node()
    wait_for(lambda: c.lists(keys + more) == 6)


@pytest.mark.s3
def test_nodes_share_a_bucket_of_a_server(redis: RedisServer, ministack_settings: ObjectSettings, folder: Path) -> None:
    bucket = ministack_settings
    settings = [
        f"object.url={bucket.url}",
        f"object.endpoint={bucket.endpoint}",
        f"object.access_key_id={bucket.access_key_id}",
        f"object.secret_access_key={bucket.secret_access_key}",
    ]
    with ExitStack() as stack:
        region = Region(folder, redis.url, stack)
        a, b = region.node(*settings), region.node(*settings)
        keys = a.save(1)
        wait_for(lambda: b.lists(keys) == 3)
        assert b.load(keys) == 3
        b.client.call("delete", keys=b"".join(keys[1:]), namespace=None)
        wait_for(lambda: a.lists(keys) == 1)


@pytest.mark.parametrize("how", ["stop", "kill", "freeze"])
def test_nodes_work_without_the_catalog_and_catch_up(redis: RedisServer, redis_region: Region, how: str) -> None:
    a, b = redis_region.node(), redis_region.node()
    before = a.save(1)
    wait_for(lambda: b.lists(before) == 3)
    getattr(redis, how)()
    during = a.save(2)
    assert a.load(before + during) == 6
    wait_for(lambda: a.client.call("status")["counters"]["kvstore_catalog_reachable"] == 0)
    assert b.load(before) == 3
    wait_for(lambda: b.client.lookup(during).blocks > 0)  # asked of the bucket itself
    redis.thaw() if how == "freeze" else redis.restart()
    wait_for(lambda: b.lists(during) == 3)
    after = b.save(3)
    wait_for(lambda: a.lists(after) == 3)


def test_more_changes_than_the_queue_keeps_are_found_in_the_bucket(
    redis: RedisServer, redis_region: Region, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publisher, "MAX_PENDING", 2)
    a, b = redis_region.node(), redis_region.node()
    before = a.save(1)
    wait_for(lambda: b.lists(before) == 3)
    catalog_is_complete(a)
    redis.stop()
    during = a.save(2, blocks=8)
    redis.restart()
    wait_for(lambda: b.lists(during) == 8)
    assert b.load(before + during) == 11


def test_a_node_starts_while_the_catalog_is_away(redis: RedisServer, redis_region: Region) -> None:
    a = redis_region.node()
    keys = a.save(1)
    redis.stop()
    b = redis_region.node()
    wait_for(lambda: b.lists(keys) == 3)
    assert b.load(keys) == 3
    redis.restart()
    more = b.save(2)
    wait_for(lambda: a.lists(more) == 3)


def test_a_node_that_was_away_forgets_what_was_deleted_meanwhile(redis_region: Region) -> None:
    a, b = redis_region.node(), redis_region.node()
    keys = a.save(1)
    wait_for(lambda: b.lists(keys) == 3)
    catalog_is_complete(a)
    b.running.stop()
    a.client.call("delete", keys=b"".join(keys), namespace=None)
    again = redis_region.node()
    assert again.load(keys) == 0
    assert again.lists(keys) == 0


def test_a_lost_bucket_is_a_miss(region: Region) -> None:
    a, b = region.node(), region.node()
    keys = a.save(1)
    wait_for(lambda: b.lists(keys) == 3)
    shutil.rmtree(region.folder / "bucket")
    assert b.load(keys) == 0
    wait_for(lambda: a.lists(keys) == 0)  # b told of what it missed


class TestWrongEntries:
    """Nothing that stands in a catalog makes a node deliver wrong bytes, and reading or saving the block mends the entry."""

    def recorded(self, region: Region, change: Callable[[Entry], Entry]) -> tuple[Peer, list[BlockKey]]:
        """A node that has met a chain of one block, whose entry was changed, and of which it holds nothing."""
        a = region.node()
        keys = a.save(1, blocks=1)
        catalog_is_complete(a)
        wait_for(lambda: asyncio.run(self.entry(region, keys[0])))
        a.running.stop()
        asyncio.run(self.spoil(region, keys[0], change))
        b = region.node("host.extent_bytes=256KiB")
        catalog_is_complete(b)
        return b, keys

    async def spoil(self, region: Region, key: BlockKey, change: Callable[[Entry], Entry]) -> None:
        catalog = await open_catalog(region.catalog, region.bucket)
        (entry,) = await catalog.lookup([key])
        assert entry is not None
        await catalog.record({key: change(entry)})
        await catalog.close()

    async def entry(self, region: Region, key: BlockKey) -> Entry | None:
        catalog = await open_catalog(region.catalog, region.bucket)
        try:
            return (await catalog.lookup([key]))[0]
        finally:
            await catalog.close()

    @pytest.mark.parametrize(
        "length", [1, BLOCK_BYTES - 1, 3 * BLOCK_BYTES, 1 << 20, 1 << 30], ids=lambda length: f"{length} bytes"
    )
    def test_a_wrong_length(self, region: Region, length: int) -> None:
        node, keys = self.recorded(region, lambda entry: entry._replace(length=length))

        def delivered() -> bool:
            node.client.lookup(keys)  # a miss sends the node to look for it
            return node.load(keys) == 1

        wait_for(delivered)
        wait_for(lambda: asyncio.run(self.entry(region, keys[0])).length == BLOCK_BYTES)

    def test_a_wrong_namespace(self, region: Region) -> None:
        node, keys = self.recorded(region, lambda entry: entry._replace(namespace=b"w" * 16))
        wait_for(lambda: node.lists(keys) == 1)
        assert node.load(keys) == 0
        node.save(1, blocks=1)
        assert node.load(keys) == 1
        wait_for(lambda: asyncio.run(self.entry(region, keys[0])).namespace == SPACE.digest)


def test_the_region_keeps_the_bucket_under_its_capacity(region: Region) -> None:
    capacity = 1 << 20
    nodes = [region.node(f"object.bytes={capacity}") for _ in range(2)]
    taken: list[list[BlockKey]] = []

    def one_takes_more(node: Peer) -> bool:
        keys, durable = node.offer(len(taken), blocks=4)
        taken.append(keys)
        return len(durable) == 4

    for turn in range(16):  # more than three times the capacity
        wait_for(lambda: one_takes_more(nodes[turn % 2]))  # noqa: B023

    def settled() -> bool:
        files = {path.name for path in (region.folder / "bucket" / "blocks").rglob("*") if path.is_file()}
        return all({key.hex() for key in list(node.bucket.keys())} == files for node in nodes)

    wait_for(settled)
    sizes = [path.stat().st_size for path in (region.folder / "bucket" / "blocks").rglob("*") if path.is_file()]
    assert 0 < sum(sizes) <= capacity
    for keys in taken:
        present = [region.object(key).exists() for key in keys]
        assert present == sorted(present, reverse=True), "a suffix was orphaned"


def catalog_is_complete(peer: Peer) -> None:
    wait_for(lambda: peer.client.call("status")["counters"]["kvstore_catalog_complete"] == 1)
