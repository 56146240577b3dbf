"""Regions with real buckets, nodes and catalogs, and everything that can go wrong between them: nothing wrong is ever served.

North America is the source of all tests; each test gives birth to a region that mirrors it, with a bucket and a link of its own.
A few lines stand in for an engine; ``test_regions_engines.py`` has real ones.
"""

from __future__ import annotations

import json
import re
import resource
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from itertools import count
from pathlib import Path

import numpy as np
import obstore
import pytest

from kvstore.envelope import HEADER_BYTES, Header, envelope_bytes
from kvstore.identity import NO_PARENT, BlockKey, Namespace, chain_digests
from kvstore.node.api import NewBlock
from kvstore.node.client import Client
from kvstore.testing.node import wait_for
from kvstore.testing.redis import RedisServer, redis_server
from kvstore.testing.servers import CephGateway, S3Server, ServerUnavailable, ministack
from kvstore.testing.shaping import Shape
from kvstore.tiers.base import Medium
from kvstore.tiers.object.names import parse_block_name
from kvstore.tiers.object.objects import Objects
from replication.testing import LocalRegion, LocalRegions

pytestmark = [pytest.mark.s3, pytest.mark.timeout(180)]

CHAINS, BLOCKS = 6, 10
BLOCK_BYTES = 200_000
TOTAL = CHAINS * BLOCKS
SPACE = Namespace(
    model="toy", weights="1", dtype="float32", layers=2, kv_heads=2, head_dim=8, attention="gqa", rope="",
    block_tokens=16, layout="opaque:test",
)  # fmt: skip
SETTINGS = [
    "identity.secret=a secret of all the regions",
    "host.bytes=32MiB", "host.extent_bytes=2MiB", "disk.bytes=32MiB", "disk.segment_bytes=4MiB",
]  # fmt: skip
WAN = Shape(delay=0.02, bytes_per_second=6e6, loss=0.005)


def payload(key: BlockKey) -> bytes:
    return np.random.default_rng(int.from_bytes(key, "little")).bytes(BLOCK_BYTES)


class World:
    """The source, what is hot in it, and the regions that a test makes."""

    def __init__(self, regions: LocalRegions, servers: Sequence[S3Server], catalog: RedisServer) -> None:
        self.regions = regions
        self.servers = servers
        self.catalog = catalog
        self._databases = count()
        self.na = self.add("na", servers[0])
        self.na.node.start()
        with self.na.node.client() as client:
            self.chains = [self._save(client, seed) for seed in range(CHAINS)]
        self.keys = [key for chain in self.chains for key in chain]
        assert self.na.publish()["blocks"] == TOTAL

    def add(self, name: str, s3: S3Server, *settings: str) -> LocalRegion:
        catalog = f"catalog.url={self.catalog.url.removesuffix('/0')}/{next(self._databases)}"
        return self.regions.add(name, s3, *SETTINGS, catalog, *settings, bucket=f"{name}-{time.time_ns():x}")

    def mirror(self, name: str, *settings: str, s3: S3Server | None = None) -> LocalRegion:
        """A new region on the second server, with an empty bucket, that may pull from na. Its node runs."""
        region = self.add(name, s3 or self.servers[1], *settings)
        self.regions.flow("na", name, Shape(WAN.delay, WAN.bytes_per_second, WAN.loss))
        region.node.start()
        return region

    def _save(self, client: Client, seed: int) -> list[BlockKey]:
        """A chain, durable in na's bucket on return."""
        keyring = client.open_namespace(SPACE, BLOCK_BYTES)
        tokens = range(100_000 * seed, 100_000 * seed + BLOCKS * SPACE.block_tokens)
        keys = keyring.block_keys(chain_digests(tokens, SPACE.block_tokens))
        reserved = client.reserve(SPACE, [NewBlock(k, keys[i - 1] if i else NO_PARENT, i) for i, k in enumerate(keys)])
        for key, offset in zip(keys, reserved.offsets, strict=True):
            assert offset is not None
            reserved.arena.slot(offset, BLOCK_BYTES)[:] = payload(key)
        assert client.commit(keys, durable=Medium.OBJECT, timeout=30) == tuple(keys)
        return keys

    def assert_whole_prefixes(self, region: LocalRegion) -> int:
        """Everything in the bucket is right, and no block is there without those before it. How many blocks there are."""
        there = stored(region)
        for chain in self.chains:
            held = [key in there for key in chain]
            assert held == sorted(held, reverse=True), "a block without its parent"
        return len(there)

    def served(self, region: LocalRegion) -> int:
        """How many blocks the region's node delivers, each of which is right."""
        delivered = 0
        with region.node.client() as client:
            client.open_namespace(SPACE, BLOCK_BYTES)
            for chain in self.chains:
                client.call("find", 10.0, keys=b"".join(chain))
                acquired = client.acquire(chain, 10)
                for key, offset in zip(chain, acquired.offsets, strict=False):
                    assert bytes(acquired.arena.slot(offset, BLOCK_BYTES)) == payload(key), "a wrong block was served"
                client.release(chain[: len(acquired.offsets)])
                delivered += len(acquired.offsets)
        return delivered


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with ExitStack() as stack:
        try:
            servers = [stack.enter_context(ministack()) for _ in range(2)]
            catalog = stack.enter_context(redis_server())
        except ServerUnavailable as error:
            pytest.skip(str(error))
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kvs-")))
        regions = stack.enter_context(LocalRegions(folder))
        stack.callback(
            lambda: [region.node.kill() for region in regions.regions.values() if region.node.daemon.running]
        )
        yield World(regions, servers, catalog)


def stored(region: LocalRegion) -> set[BlockKey]:
    """The blocks of the region's bucket, all of them right."""
    bucket = Objects.connect(region.bucket).store
    found = set()
    for page in obstore.list(bucket, "blocks"):
        for meta in page:
            parsed = parse_block_name(meta["path"])
            assert parsed is not None
            body = bytes(obstore.get(bucket, meta["path"]).bytes())
            header = Header.unpack(body[:HEADER_BYTES])
            assert header.key == parsed[1]
            assert body[HEADER_BYTES : HEADER_BYTES + header.length] == payload(header.key), "a wrong block was stored"
            found.add(parsed[1])
    return found


def arrived(region: LocalRegion) -> int:
    bucket = Objects.connect(region.bucket).store
    return sum(len(page) for page in obstore.list(bucket, "blocks"))


def let_leases_lapse(region: LocalRegion) -> None:
    """As if half a minute had passed since their holder died."""
    bucket = Objects.connect(region.bucket).store
    for page in obstore.list(bucket, "leases"):
        for meta in page:
            grant = json.loads(bytes(obstore.get(bucket, meta["path"]).bytes()))
            obstore.put(bucket, meta["path"], json.dumps({**grant, "expires": 0.0}).encode(), use_multipart=False)


def test_a_cut_in_the_middle_of_a_copy(world: World) -> None:
    region = world.mirror("cut")
    link = region.links["na"]
    with region.service() as service:
        wait_for(lambda: arrived(region) >= TOTAL // 4)
        link.cut()
        wait_for(lambda: b"link does not answer" in service.log.read_bytes())
        assert arrived(region) < TOTAL
        world.assert_whole_prefixes(region)
        link.reset()
        link.heal()
        wait_for(lambda: arrived(region) == TOTAL)
        wait_for(lambda: copied(service.log) == TOTAL)  # not one was sent twice
    assert world.assert_whole_prefixes(region) == world.served(region) == TOTAL


def copied(log: Path) -> int:
    """How many blocks a service copied, by its own account of each round."""
    return sum(int(count) for count in re.findall(r"copied (\d+) blocks", log.read_text()))


def test_a_replicator_that_is_killed(world: World) -> None:
    region = world.mirror("kill")
    link = region.links["na"]
    with region.service() as service:
        wait_for(lambda: arrived(region) >= TOTAL // 2)
        service.kill()
    link.reset()  # nobody waits for what is still on its way
    there = world.assert_whole_prefixes(region)
    let_leases_lapse(region)
    before = link.bytes_down
    said = region.replicate()
    assert said["status"] == 0
    assert said["flows"][0]["copied"]["copied"] == TOTAL - there
    assert link.bytes_down - before < (TOTAL - there) * envelope_bytes(BLOCK_BYTES) + (1 << 20)
    assert world.assert_whole_prefixes(region) == world.served(region) == TOTAL


def test_blocks_that_are_damaged_on_the_way(world: World) -> None:
    region = world.mirror("flight")
    link = region.links["na"]
    bad = world.chains[0][3]
    link.corrupt(payload(bad)[1000:1016], times=1000)
    said = region.replicate()
    assert said["status"] == 1
    assert link.corrupted == 2, "asked for once more, and then given up"
    assert "damaged" in said["problems"]["na"]
    assert world.assert_whole_prefixes(region) == TOTAL - (BLOCKS - 3)
    link.corrupt(payload(bad)[1000:1016], times=1)
    assert region.replicate()["status"] == 0, "the second try was right"
    assert world.assert_whole_prefixes(region) == world.served(region) == TOTAL


def test_a_bucket_that_is_full(world: World, radosgw_server: CephGateway) -> None:
    region = world.mirror("full", s3=radosgw_server)
    radosgw_server.limit(region.bucket.bucket, 20 * envelope_bytes(BLOCK_BYTES))
    said = region.replicate()
    assert said["status"] == 1
    assert "QuotaExceeded" in said["problems"]["na"]
    there = world.assert_whole_prefixes(region)
    assert 10 < there <= 20
    radosgw_server.limit(region.bucket.bucket, None)
    said = region.replicate()
    assert (said["status"], said["flows"][0]["copied"]["copied"]) == (0, TOTAL - there)
    assert world.assert_whole_prefixes(region) == world.served(region) == TOTAL


def test_a_node_whose_disk_is_full(world: World) -> None:
    region = world.mirror("disk", "host.bytes=8MiB", "host.extent_bytes=1MiB")
    assert region.replicate()["status"] == 0
    unlimited = resource.RLIM_INFINITY
    resource.prlimit(region.node.daemon.pid, resource.RLIMIT_FSIZE, (2 << 20, unlimited))
    said = region.warm()
    held = region.node.blocks()
    assert held["disk"] < TOTAL // 2
    assert said["status"] == 1, "not ready for traffic"
    assert said["skipped"]["not_kept"] >= TOTAL - held["host"] - held["disk"]
    assert world.served(region) == TOTAL, "what neither memory nor disk has comes from the bucket"
    region.node.stop()
    region.node.start()
    assert region.warm()["status"] == 0
    assert region.node.blocks()["disk"] == world.served(region) == TOTAL


def test_blocks_that_are_damaged_in_a_bucket(world: World) -> None:
    region = world.mirror("rest")
    bad = world.chains[1][4]
    world.na.damage(SPACE.digest, bad)
    said = region.replicate()
    assert said["status"] == 1
    assert world.assert_whole_prefixes(region) == TOTAL - (BLOCKS - 4)
    with world.na.node.client() as client:
        found = client.call("verify", 30.0, medium="object", keys=bad)
        assert [block["key"] for block in found["bad"]] == [bad]
        client.acquire([bad], 5)  # what is used gets to every tier that lacks it
        client.release([bad])
    world.na.node.drain()
    assert region.replicate()["status"] == 0
    assert world.assert_whole_prefixes(region) == TOTAL

    region.damage(SPACE.digest, bad)
    assert world.served(region) == TOTAL - (BLOCKS - 4)
    assert region.replicate()["status"] == 0
    assert world.assert_whole_prefixes(region) == world.served(region) == TOTAL


def test_everything_is_restarted(world: World) -> None:
    region = world.mirror("restart")
    assert region.replicate()["status"] == 0
    assert region.warm()["status"] == 0
    for one in (world.na, region):
        one.node.kill()
    for server in world.servers:
        server.stop()
    with world.catalog.client() as redis:
        redis.flushall()
    world.catalog.kill()
    world.catalog.restart()
    for server in world.servers:
        server.restart()
    for one in (world.na, region):
        one.node.start()
    assert world.served(world.na) == world.served(region) == TOTAL
    assert world.na.publish()["blocks"] == TOTAL
    said = region.replicate()
    assert (said["status"], said["flows"][0]["planned"]["blocks"]) == (0, 0)
    assert region.warm()["bytes_from_bucket"] == 0


def test_a_third_region_takes_from_the_second_what_the_first_may_not_send(world: World) -> None:
    second, third = world.add("second", world.servers[1]), world.add("third", world.servers[0])
    world.regions.flow("na", "second", WAN)
    world.regions.flow("na", "third", WAN, limits=f"max_bytes = {TOTAL // 3 * envelope_bytes(BLOCK_BYTES)}")
    world.regions.flow("second", "third", WAN)
    for region in (second, third):
        region.node.start()
    assert second.replicate()["status"] == 0
    assert second.publish()["blocks"] == TOTAL
    said = third.replicate()
    copied = {flow["source"]: flow["copied"] for flow in said["flows"]}
    assert said["status"] == 0
    assert {source: flow["copied"] for source, flow in copied.items()} == {
        "na": TOTAL // 3,
        "second": TOTAL - TOTAL // 3,
    }
    assert world.assert_whole_prefixes(third) == world.served(third) == TOTAL


def test_a_bucket_with_a_cap_is_not_filled_again_and_again(world: World) -> None:
    fits = TOTAL // 2
    cap = f"object.bytes={fits * envelope_bytes(BLOCK_BYTES)}"
    region = world.mirror("cap", cap, "host.extent_bytes=256KiB")  # a node keeps room for its largest block, too
    said = region.replicate()["flows"][0]
    assert fits // 2 < said["copied"]["copied"] <= fits
    assert said["left_out"]["bucket_full"]["blocks"] == TOTAL - said["copied"]["copied"]
    assert world.assert_whole_prefixes(region) == said["copied"]["copied"]
    wait_for(lambda: region.node.blocks()["object"] == said["copied"]["copied"])  # by the catalog
    assert region.replicate()["flows"][0]["planned"]["blocks"] == 0
