"""Nodes of a region share blocks through a bucket and a catalog, and go on without the catalog when it is away."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from kvstore.identity import BlockKey, Namespace, chain_digests
from kvstore.node.api import NewBlock
from kvstore.node.client import Client
from kvstore.testing.node import RunningNode
from kvstore.testing.redis import RedisServer, redis_server
from kvstore.testing.servers import ServerUnavailable
from kvstore.tiers.base import Medium
from kvstore.tiers.object.names import block_name

BLOCK_BYTES = 50_000
SPACE = Namespace(
    model="tiny", weights="1", dtype="float32", layers=2, kv_heads=2, head_dim=8, attention="gqa", rope="",
    block_tokens=16, layout="opaque:test",
)  # fmt: skip


class Region:
    """Nodes over one bucket (a folder) and one catalog."""

    def __init__(self, folder: Path, catalog: str, stack: ExitStack) -> None:
        self.folder = folder
        self.catalog = catalog
        self._stack = stack
        self._nodes = 0

    def node(self, *overrides: str) -> Peer:
        self._nodes += 1
        directory = self.folder / f"node-{self._nodes}"
        settings = [f"object.url=file://{self.folder}/bucket", f"catalog.url={self.catalog}", "disk.enabled=false"]
        running = RunningNode(directory, *settings, *overrides)
        self._stack.callback(running.stop)
        client = Client(running.socket, name="test")
        self._stack.callback(client.close)
        return Peer(running, client)

    def object(self, key: BlockKey) -> Path:
        return self.folder / "bucket" / block_name(SPACE.digest, key)


class Peer:
    """A node and a client of it."""

    def __init__(self, running: RunningNode, client: Client) -> None:
        self.running = running
        self.client = client
        self.keyring = client.open_namespace(SPACE, BLOCK_BYTES)

    def chain(self, seed: int, blocks: int = 3) -> list[BlockKey]:
        tokens = range(seed * 100_000, seed * 100_000 + blocks * SPACE.block_tokens)
        return self.keyring.block_keys(chain_digests(tokens, SPACE.block_tokens))

    def save(self, seed: int, blocks: int = 3) -> list[BlockKey]:
        """A chain, durable in the bucket on return."""
        keys = self.chain(seed, blocks)
        parents = [BlockKey(bytes(16)), *keys]
        new = [NewBlock(key, parent, index) for index, (key, parent) in enumerate(zip(keys, parents, strict=False))]
        reserved = self.client.reserve(SPACE, new)
        for key, offset in zip(keys, reserved.offsets, strict=True):
            assert offset is not None
            reserved.arena.slot(offset, BLOCK_BYTES)[:] = payload(key)
        assert self.client.commit(keys, durable=Medium.OBJECT, timeout=20) == tuple(keys)
        return keys

    def load(self, keys: list[BlockKey]) -> int:
        """How many of a prefix are delivered; each as it was saved."""
        acquired = self.client.acquire(keys, 10)
        for key, offset in zip(keys, acquired.offsets, strict=False):
            assert bytes(acquired.arena.slot(offset, BLOCK_BYTES)) == payload(key)
        self.client.release(keys[: len(acquired.offsets)])
        return len(acquired.offsets)

    def lists(self, keys: list[BlockKey]) -> int:
        """How many of a prefix the bucket's tier of this node lists."""
        (tier,) = (tier for tier in self.running.node.store.tiers if tier.medium is Medium.OBJECT)
        return sum(key in tier.keys() for key in keys)


def payload(key: BlockKey) -> bytes:
    return (key * (BLOCK_BYTES // len(key) + 1))[:BLOCK_BYTES]


def wait_for(condition: Callable[[], object], seconds: float = 60) -> float:
    """Seconds until ``condition`` held."""
    started = time.monotonic()
    while not condition():
        assert time.monotonic() < started + seconds, "waited in vain"
        time.sleep(0.01)
    return time.monotonic() - started


@pytest.fixture
def folder() -> Iterator[Path]:
    """A short path: a socket's has at most 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="kvs-") as name:
        yield Path(name)


@pytest.fixture
def redis() -> Iterator[RedisServer]:
    with ExitStack() as stack:
        try:
            server = stack.enter_context(redis_server())
        except ServerUnavailable as error:
            pytest.skip(str(error))
        yield server


@pytest.fixture(params=["sqlite", "redis"])
def region(request: pytest.FixtureRequest, folder: Path) -> Iterator[Region]:
    url = request.getfixturevalue("redis").url if request.param == "redis" else f"sqlite://{folder}/catalog.db"
    with ExitStack() as stack:
        yield Region(folder, url, stack)


@pytest.fixture
def redis_region(redis: RedisServer, folder: Path) -> Iterator[Region]:
    with ExitStack() as stack:
        yield Region(folder, redis.url, stack)


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


def catalog_is_complete(peer: Peer) -> None:
    (tier,) = (tier for tier in peer.running.node.store.tiers if tier.medium is Medium.OBJECT)
    while hasattr(tier, "inner"):
        tier = tier.inner
    wait_for(lambda: tier._peers._follower.complete)
