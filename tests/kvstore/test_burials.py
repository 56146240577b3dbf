"""What was deleted for good leaves the nodes too, and is not brought back by them."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvstore import burials
from kvstore.burials import Buried, read_tombstones
from kvstore.errors import BlockNotFound
from kvstore.identity import NO_PARENT, BlockKey, Namespace, chain_digests
from kvstore.node.api import Miss, NewBlock
from kvstore.testing.blocks import aligned_buffer, random_block
from kvstore.testing.node import PatientClient, RunningNode
from kvstore.tiers.base import Medium, PutResult, Tier
from kvstore.tiers.object import ObjectSettings, ObjectTier
from kvstore.tiers.object.names import block_name, tombstone_name
from kvstore.tiers.object.objects import Objects
from kvstore.tombstones import Graves, Tombstone

BLOCK_BYTES = 50_000
SPACE = Namespace(
    model="tiny", weights="1", dtype="float32", layers=2, kv_heads=2, head_dim=8, attention="gqa", rope="",
    block_tokens=16, layout="opaque:test",
)  # fmt: skip
OTHER = dataclasses.replace(SPACE, model="other")


@pytest.fixture
def folder() -> Iterator[Path]:
    """Short: a socket's path has at most 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="kvs-") as name:
        yield Path(name)


@pytest.fixture(autouse=True)
def _often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(burials, "POLL_SECONDS", 0.05)


def node_of(folder: Path, name: str = "a") -> RunningNode:
    directory = folder / name
    directory.mkdir(exist_ok=True)
    return RunningNode(directory, f"object.url=file://{folder}/bucket")


def save(client: PatientClient, namespace: Namespace, start: int, blocks: int = 3) -> list[BlockKey]:
    """A chain, down to the bucket."""
    keyring = client.open_namespace(namespace, BLOCK_BYTES)
    tokens = range(start, start + blocks * namespace.block_tokens)
    keys = keyring.block_keys(chain_digests(tokens, namespace.block_tokens))
    parents = [NO_PARENT, *keys]
    reserved = client.reserve(namespace, [NewBlock(key, parents[i], i) for i, key in enumerate(keys)])
    assert not reserved.misses, reserved.misses
    for offset in reserved.offsets:
        assert offset is not None
        reserved.arena.slot(offset, BLOCK_BYTES)[:] = bytes(BLOCK_BYTES)
    assert len(client.commit(keys, durable=Medium.OBJECT)) == blocks
    assert client.call("drain", timeout=50.0)["drained"]
    return keys


def bury(folder: Path, **fields: object) -> Tombstone:
    """What a region does in its bucket, without deleting anything there."""
    stone = Tombstone(time=time.time(), **fields)  # type: ignore[arg-type]
    path = folder / "bucket" / tombstone_name(stone.identity)
    path.parent.mkdir(exist_ok=True)
    path.write_text(stone.to_json())
    return stone


def media(client: PatientClient, key: BlockKey) -> list[str]:
    return list(client.call("inspect", key=key)["media"])


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def in_node(client: PatientClient, keys: list[BlockKey]) -> set[str]:
    return {medium for key in keys for medium in media(client, key)} - {"object"}


def test_a_purged_model_leaves_memory_and_disk_and_the_other_stays(folder: Path) -> None:
    with node_of(folder) as node, PatientClient(node.socket) as client:
        gone, kept = save(client, SPACE, 0), save(client, OTHER, 0)
        bury(folder, model="tiny")
        wait_until(lambda: not in_node(client, gone))
        assert all(media(client, key) == ["host", "disk", "object"] for key in kept)
        again = save_again(client, gone)
        assert again == gone, "what is computed anew is kept"
        time.sleep(0.2)
        assert all({"host", "disk"} <= set(media(client, key)) for key in again)


def save_again(client: PatientClient, gone: list[BlockKey]) -> list[BlockKey]:
    """Compute the blocks anew, as an engine does that misses them."""
    acquired = client.acquire(gone, 50.0)
    assert not acquired.media, "not even the bucket's copies are served"
    wait_until(lambda: not any(media(client, key) for key in gone))  # the first one ends the answer; the others follow
    return save(client, SPACE, 0)


def test_a_purged_prefix_takes_what_continues_it_along(folder: Path) -> None:
    with node_of(folder) as node, PatientClient(node.socket) as client:
        keys, other = save(client, SPACE, 0, blocks=5), save(client, SPACE, 5000)
        bury(folder, prefix=keys[2])
        wait_until(lambda: not in_node(client, keys[2:]))
        assert all(media(client, key)[:2] == ["host", "disk"] for key in [*keys[:2], *other])
        assert client.acquire(keys, 50.0).media == (Medium.HOST, Medium.HOST)


def test_a_dead_block_of_the_bucket_is_neither_served_nor_kept(folder: Path) -> None:
    with node_of(folder, "writer") as node, PatientClient(node.socket) as client:
        keys = save(client, SPACE, 0)
    bury(folder, model="tiny")
    with node_of(folder, "reader") as node, PatientClient(node.socket) as client:
        client.open_namespace(SPACE, BLOCK_BYTES)
        wait_until(lambda: (folder / "reader" / "tombstones.json").exists())
        wait_until(lambda: media(client, keys[0]) == ["object"])
        acquired = client.acquire(keys, 50.0)
        assert acquired.media == ()
        assert acquired.miss is Miss.NOT_STORED
        assert media(client, keys[0]) == []
    assert not (folder / "bucket" / block_name(SPACE.digest, keys[0])).exists()


def test_a_node_that_was_down_learns_of_it_at_its_start(folder: Path) -> None:
    with node_of(folder) as node, PatientClient(node.socket) as client:
        keys = save(client, SPACE, 0)
    stone = bury(folder, tenant="default")
    with node_of(folder) as node, PatientClient(node.socket) as client:
        wait_until(lambda: not in_node(client, keys))
    kept = [Tombstone.from_json(text) for text in json.loads((folder / "a" / "tombstones.json").read_text())]
    assert kept == [stone]


def test_a_stone_is_carried_out_once(folder: Path) -> None:
    """Over a restart too: what was computed since is on the disk, whose index does not know when."""
    with node_of(folder) as node, PatientClient(node.socket) as client:
        bury(folder, model="tiny")
        wait_until(lambda: (folder / "a" / "tombstones.json").exists())
        keys = save(client, SPACE, 0)
    with node_of(folder) as node, PatientClient(node.socket) as client:
        time.sleep(0.3)
        assert all("disk" in media(client, key) for key in keys)


def test_unreadable_tombstones_are_left_out(folder: Path) -> None:
    good = bury_in_new_bucket(folder)
    for name, text in (("bad", "{}"), ("long", "x" * 10_000), ("binary", "\0")):
        (folder / "bucket" / tombstone_name(name)).write_text(text)
    objects = Objects.connect(ObjectSettings(url=f"file://{folder}/bucket"))
    assert asyncio.run(read_tombstones(objects, set())) == {good.identity: good}
    assert asyncio.run(read_tombstones(objects, {good.identity})) == {}


def bury_in_new_bucket(folder: Path) -> Tombstone:
    (folder / "bucket").mkdir()
    return bury(folder, model="tiny")


class TestBuried:
    """The wrapper, which judges by headers."""

    async def test_a_block_that_is_buried_while_it_is_written_does_not_stay(self, folder: Path) -> None:
        block = random_block(random.Random(1), 5000)
        graves = Graves(lambda digest: None)

        inner = await ObjectTier.open(ObjectSettings(url=f"file://{folder}/bucket"))
        put = inner.put

        async def burying_put(header: object, envelope: memoryview) -> PutResult:
            result = await put(block.header, envelope)
            graves.add([Tombstone(time=time.time(), namespace=block.header.namespace)])
            return result

        inner.put = burying_put  # type: ignore[method-assign, assignment]
        tier: Tier = Buried(inner, graves)
        assert await tier.put(block.header, block.envelope) is PutResult.REFUSED
        assert block.key not in tier.keys()
        assert await tier.put(block.header, block.envelope) is PutResult.REFUSED
        await tier.close()

    async def test_what_was_created_later_is_alive(self, folder: Path) -> None:
        block = random_block(random.Random(1), 5000)
        graves = Graves(
            lambda digest: None, [Tombstone(time=block.header.created - 1, namespace=block.header.namespace)]
        )
        tier = Buried(await ObjectTier.open(ObjectSettings(url=f"file://{folder}/bucket")), graves)
        assert await tier.put(block.header, block.envelope) is PutResult.STORED
        into = aligned_buffer(len(block.envelope))
        assert (await tier.get(block.key, into)).key == block.key
        graves.add([Tombstone(time=block.header.created, namespace=block.header.namespace)])
        with pytest.raises(BlockNotFound):
            await tier.get(block.key, into)
        assert block.key not in tier.keys()
        await tier.close()
