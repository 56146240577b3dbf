"""What nodes of a region tell each other beside the index: pins, purges, what is hot."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest
from region_nodes import SPACE, Peer, Region, wait_for

from kvstore import burials, demand
from kvstore.catalog import Catalog, hotness, open_catalog, presence
from kvstore.catalog.hotness import reports
from kvstore.catalog.pins import FOLDER, RegionPins, region_pins
from kvstore.catalog.presence import present
from kvstore.catalog.purges import ring
from kvstore.identity import BlockKey
from kvstore.policy.pins import Pins
from kvstore.testing.redis import RedisServer
from kvstore.tiers.object.hotness import merged
from kvstore.tiers.object.names import hotness_name, tombstone_name
from kvstore.tombstones import Tombstone


def pinned(peer: Peer, keys: list[BlockKey]) -> int:
    """How many of the blocks the node keeps."""
    return sum(pin["blocks"] for pin in peer.client.call("pins")["pins"] if pin["key"] in keys)


def test_a_pin_of_one_node_is_heeded_by_all_until_it_is_taken_back(region: Region) -> None:
    a, b = region.node(), region.node()
    keys = a.save(1)
    wait_for(lambda: b.lists(keys) == 3)
    until = a.client.call("pin", key=keys[-1], seconds=600)["until"]
    wait_for(lambda: pinned(b, keys) == 3)
    assert b.client.call("pins")["pins"][0]["until"] == pytest.approx(until)
    late = region.node()
    wait_for(lambda: pinned(late, keys) == 3)
    assert b.client.call("unpin", key=keys[-1]) == {"unpinned": 3}
    wait_for(lambda: not pinned(a, keys) and not pinned(late, keys))


def test_pins_outlive_the_catalog_and_a_node(redis: RedisServer, redis_region: Region) -> None:
    a, b = redis_region.node(), redis_region.node()
    one, two = a.save(1), b.save(2)
    wait_for(lambda: a.lists(two) == b.lists(one) == 3)
    a.client.call("pin", key=one[-1], seconds=600)
    wait_for(lambda: pinned(b, one) == 3)
    redis.stop()
    b.client.call("pin", key=two[-1], seconds=600)
    assert pinned(b, one) == pinned(b, two) == 3, "a node goes on with what it knows"
    a.running.stop()
    redis.restart()
    with redis.client() as client:
        client.flushall()
    c = redis_region.node()
    wait_for(lambda: pinned(c, one) == pinned(c, two) == 3)


def test_a_node_that_stops_is_gone_at_once(region: Region) -> None:
    a, b = region.node(), region.node()

    async def alive() -> list[str]:
        catalog = await open_catalog(region.catalog, region.bucket)
        try:
            return [node.process for node in present((await catalog.documents.read_all(presence.FOLDER)).values())]
        finally:
            await catalog.close()

    wait_for(lambda: len(asyncio.run(alive())) == 2)
    a.running.stop()
    assert len(asyncio.run(alive())) == 1
    b.running.stop()
    assert asyncio.run(alive()) == []


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite://{tmp_path}/catalog.db"


async def opened(url: str) -> Catalog:
    return await open_catalog(url, "s3://bucket")


async def test_nodes_that_tell_of_the_same_chain_at_once_agree(url: str) -> None:
    catalogs = [await opened(url) for _ in range(3)]
    nodes = [Pins() for _ in catalogs]
    told: list[list[BlockKey]] = [[] for _ in catalogs]
    members = [
        RegionPins(catalog.documents, pins, "acme", heard.extend)
        for catalog, pins, heard in zip(catalogs, nodes, told, strict=True)
    ]
    chain, now = [BlockKey(bytes([number]) * 16) for number in range(3)], time.time()
    for number, pins in enumerate(nodes):
        pins.pin(chain, now + 100 + number, now + number)
    for _ in range(4):
        await asyncio.gather(*(member.round() for member in members))
    assert {pins.ends(chain, now)[0] for pins in nodes} == {now + 102}
    assert told[0][-3:] == chain
    assert (await region_pins(catalogs[0].documents)).held(now) == set(chain)
    nodes[0].unpin(chain[:2], now)
    for _ in range(2):
        await asyncio.gather(*(member.round() for member in members))
    assert [pins.hold(chain, now) for pins in nodes] == [[False, False, True]] * 3
    assert (await region_pins(catalogs[0].documents)).held(now) == {chain[2]}
    for catalog in catalogs:
        await catalog.close()


async def test_what_is_no_pin_is_passed_over(url: str) -> None:
    catalog, pins, now = await opened(url), Pins(), time.time()
    pins.pin([BlockKey(b"k" * 16)], now + 60, now)
    (wish,) = pins.wishes(now)
    await RegionPins(catalog.documents, pins, "acme").round()
    (written,) = await catalog.documents.read_all(FOLDER)
    folder = written.rpartition("/")[0]
    junk = ((f"{folder}/a", b""), (f"{FOLDER}/b", b"\xc1"), (written, b"junk"), (f"{folder}/{'00' * 16}", wish.pack()))
    for name, body in junk:
        await catalog.documents.put(name, body, 60)
    assert (await region_pins(catalog.documents)).held(now) == set()
    await RegionPins(catalog.documents, pins, "acme").round()
    assert (await region_pins(catalog.documents)).held(now) == {wish.last}, "what could not be read was replaced"
    await catalog.close()


async def test_a_tenant_does_not_hear_of_another_ones_pins(url: str) -> None:
    catalog, now = await opened(url), time.time()
    tenants = {name: Pins() for name in ("acme", "umbrella")}
    for number, pins in enumerate(tenants.values()):
        pins.pin([BlockKey(bytes([number]) * 16)], now + 60, now)
    for _ in range(2):
        for name, pins in tenants.items():
            await RegionPins(catalog.documents, pins, name).round()
    assert [len(pins.wishes(now)) for pins in tenants.values()] == [1, 1]
    assert len((await region_pins(catalog.documents)).held(now)) == 2, "whoever evicts for all heeds both"
    await catalog.close()


def test_a_purge_reaches_a_node_when_the_bell_rings(region: Region, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(burials, "POLL_SECONDS", 3600.0)
    a = region.node()
    keys = a.save(1)
    stone = Tombstone(time=time.time() + 1, namespace=SPACE.digest)
    path = region.folder / "bucket" / tombstone_name(stone.identity)
    path.parent.mkdir()
    path.write_text(stone.to_json())

    async def tell() -> None:
        catalog = await open_catalog(region.catalog, region.bucket)
        await ring(catalog.documents)
        await catalog.close()

    asyncio.run(tell())
    wait_for(lambda: all("host" not in a.client.call("inspect", key=key)["media"] for key in keys))


def test_reports_go_to_the_catalog_and_now_and_then_to_the_bucket(
    redis: RedisServer, redis_region: Region, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demand, "REPORT_SECONDS", 0.2)
    a, b = redis_region.node(), redis_region.node()
    keys = a.save(1)
    wait_for(lambda: b.lists(keys) == 3)
    for peer in (a, b):
        assert peer.load(keys) == 3
        peer.client.lookup(keys)

    async def told() -> dict[str, float]:
        catalog = await open_catalog(redis_region.catalog, redis_region.bucket)
        try:
            found = await reports(catalog.documents)
            return merged(found.values(), time.time()) if len(found) == 2 else {}
        finally:
            await catalog.close()

    wait_for(lambda: keys[-1] in asyncio.run(told()))
    folder = redis_region.folder / "bucket" / Path(hotness_name("x")).parent

    def copies() -> dict[str, int]:
        return {path.name: path.stat().st_mtime_ns for path in folder.glob("*.msgpack")}

    wait_for(lambda: len(copies()) == 2)
    before = copies()
    time.sleep(0.6)
    assert copies() == before, "the bucket is told each minute only"
    redis.stop()
    wait_for(lambda: all(copies()[name] > then for name, then in before.items()))


async def test_an_unreadable_report_is_left_out(url: str) -> None:
    catalog = await opened(url)
    await catalog.documents.put(f"{hotness.FOLDER}/a", b"junk", 60)
    assert await reports(catalog.documents) == {}
    await catalog.close()
