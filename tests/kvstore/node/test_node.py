"""The node over its socket, with the real clients."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvstore.errors import ConfigError, KVStoreError, NodeUnavailable
from kvstore.identity import NO_PARENT, BlockKey, Namespace, chain_digests
from kvstore.node.api import Miss, NewBlock
from kvstore.node.arena import Arena
from kvstore.node.protocol import encode
from kvstore.testing.node import PatientClient, RunningNode, wait_for
from kvstore.tiers.base import Medium
from kvstore.tiers.object import survey
from kvstore.tiers.object.hotness import HotnessSnapshot

BLOCK_BYTES = 10_000
NAMESPACE = Namespace(
    model="toy", weights="1", dtype="float32", layers=2, kv_heads=2, head_dim=8, attention="gqa", rope="",
    block_tokens=16, layout="opaque:test",
)  # fmt: skip


@pytest.fixture
def node(tmp_path: Path) -> Iterator[RunningNode]:
    running = RunningNode(tmp_path, "disk.enabled=false")
    yield running
    running.stop()


@pytest.fixture
def client(node: RunningNode) -> Iterator[PatientClient]:
    with PatientClient(node.socket) as client:
        yield client


def chain(client: PatientClient, blocks: int, seed: int = 0) -> list[NewBlock]:
    keyring = client.open_namespace(NAMESPACE, BLOCK_BYTES)
    tokens = list(range(seed, seed + blocks * NAMESPACE.block_tokens))
    keys = keyring.block_keys(chain_digests(tokens, NAMESPACE.block_tokens))
    return [NewBlock(key, keys[i - 1] if i else NO_PARENT, i) for i, key in enumerate(keys)]


def payload_of(key: BlockKey) -> bytes:
    return (key * (BLOCK_BYTES // len(key) + 1))[:BLOCK_BYTES]


def save(client: PatientClient, blocks: list[NewBlock]) -> tuple[BlockKey, ...]:
    reserved = client.reserve(NAMESPACE, blocks)
    granted = []
    for block, offset in zip(blocks, reserved.offsets, strict=True):
        if offset is not None:
            reserved.arena.buffer[offset : offset + BLOCK_BYTES] = payload_of(block.key)
            granted.append(block.key)
    return client.commit(granted)


def loaded(client: PatientClient, keys: list[BlockKey], timeout: float = 50.0) -> list[bytes]:
    acquired = client.acquire(keys, timeout)
    data = [bytes(acquired.arena.buffer[o : o + BLOCK_BYTES]) for o in acquired.offsets]
    client.release(keys[: len(data)])
    return data


def test_a_node_waits_for_memory_that_is_still_to_be_given_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Engines miss the node that was here before it a moment after it has gone."""
    create, refused = Arena.create, threading.Event()

    def crowded(nbytes: int, epoch: int) -> Arena:
        if not refused.is_set():
            refused.set()
            raise ConfigError("host.bytes", nbytes, "/dev/shm has only 0 bytes free", "")
        return create(nbytes, epoch)

    monkeypatch.setattr(Arena, "create", crowded)
    with RunningNode(tmp_path, "disk.enabled=false") as node, PatientClient(node.socket) as client:
        assert refused.is_set()
        assert client.call("status")["tiers"]


def test_what_one_client_saves_another_loads(node: RunningNode, client: PatientClient) -> None:
    blocks = chain(client, 5)
    keys = [block.key for block in blocks]
    assert client.lookup(keys).blocks == 0
    assert save(client, blocks) == tuple(keys)
    with PatientClient(node.socket, name="other") as other:
        assert other.lookup(keys).blocks == 5
        assert other.lookup([*keys, BlockKey(b"?" * 16)], start=2).blocks == 3
        assert loaded(other, keys) == [payload_of(key) for key in keys]


def test_uncommitted_blocks_are_not_found(client: PatientClient) -> None:
    blocks = chain(client, 2)
    client.reserve(NAMESPACE, blocks)
    assert client.lookup([b.key for b in blocks]).blocks == 0
    assert client.acquire([blocks[0].key], 50.0).miss is Miss.NOT_STORED


def test_a_block_reserved_or_stored_is_not_wanted_again(node: RunningNode, client: PatientClient) -> None:
    blocks = chain(client, 1)
    assert client.reserve(NAMESPACE, blocks).misses == {}
    with PatientClient(node.socket) as other:
        other.open_namespace(NAMESPACE, BLOCK_BYTES)
        assert other.reserve(NAMESPACE, blocks).misses == {0: Miss.PRESENT}
        client.abort([blocks[0].key])
        client.lookup([])  # answered after the abort, which has no answer
        assert save(other, blocks) == (blocks[0].key,)
    assert client.reserve(NAMESPACE, blocks).misses == {0: Miss.PRESENT}


def test_a_block_of_two_parts_is_published_when_both_have_committed(node: RunningNode, client: PatientClient) -> None:
    blocks = chain(client, 1)
    key = blocks[0].key
    with PatientClient(node.socket) as other:
        other.open_namespace(NAMESPACE, BLOCK_BYTES)
        mine = client.reserve(NAMESPACE, blocks, part=0, parts=2)
        theirs = other.reserve(NAMESPACE, blocks, part=1, parts=2)
        assert mine.offsets == theirs.offsets
        half = BLOCK_BYTES // 2
        offset = mine.offsets[0]
        assert offset is not None
        mine.arena.buffer[offset : offset + half] = payload_of(key)[:half]
        assert client.commit([key], part=0) == ()
        assert client.lookup([key]).blocks == 0
        theirs.arena.buffer[offset + half : offset + BLOCK_BYTES] = payload_of(key)[half:]
        assert other.commit([key], part=1) == (key,)
    assert loaded(client, [key]) == [payload_of(key)]


def test_a_dead_client_gives_back_what_it_held(node: RunningNode, client: PatientClient) -> None:
    slots = 4 * ((1 << 20) // (4096 + 12288))
    with PatientClient(node.socket) as greedy:
        blocks = chain(greedy, slots)
        assert greedy.reserve(NAMESPACE, blocks).misses == {}
        refused = client.reserve(NAMESPACE, chain(client, 3, seed=10**6))
        assert list(refused.misses.values()) == [Miss.NO_ROOM] * 3
    wait_for(lambda: save(client, chain(client, 3, seed=10**6)) != ())


def test_leased_blocks_are_not_evicted(client: PatientClient) -> None:
    slots = 4 * ((1 << 20) // (4096 + 12288))
    first = chain(client, 4)
    save(client, first)
    keys = [block.key for block in first]
    acquired = client.acquire(keys, 50.0)
    for seed in range(1, 4):
        save(client, chain(client, slots, seed=10**6 * seed))
    held = [bytes(acquired.arena.buffer[o : o + BLOCK_BYTES]) for o in acquired.offsets]
    assert held == [payload_of(key) for key in keys]
    assert client.lookup(keys).blocks == 4
    client.release(keys)
    save(client, chain(client, slots, seed=10**7))
    assert client.lookup(keys).blocks < 4


def test_a_client_finds_a_restarted_node_again(tmp_path: Path) -> None:
    node = RunningNode(tmp_path, "disk.enabled=false")
    with PatientClient(node.socket) as client:
        blocks = chain(client, 2)
        save(client, blocks)
        before = client.epoch
        node.stop()
        with pytest.raises(NodeUnavailable):
            client.lookup([blocks[0].key])
        node = RunningNode(tmp_path, "disk.enabled=false")
        try:
            wait_for(lambda: _reconnected(client, blocks[0].key))
            assert client.epoch != before
            assert save(client, blocks) == tuple(b.key for b in blocks)
        finally:
            node.stop()


def test_two_nodes_cannot_share_a_socket(node: RunningNode, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"node\.socket.*another node is running"):
        RunningNode(tmp_path, "disk.enabled=false")


def test_the_socket_is_private(node: RunningNode) -> None:
    assert node.socket.stat().st_mode & 0o777 == 0o600


def test_an_arena_beyond_shared_memory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"host\.bytes.*free.*Lower host\.bytes"):
        RunningNode(tmp_path, "disk.enabled=false", "host.bytes=1000TiB")


def test_another_block_size_in_one_namespace_is_refused(client: PatientClient) -> None:
    client.open_namespace(NAMESPACE, BLOCK_BYTES)
    with pytest.raises(Exception, match="lacks something that shapes the bytes"):
        client.open_namespace(NAMESPACE, BLOCK_BYTES + 1)


def test_a_block_that_fits_no_extent_is_refused(client: PatientClient) -> None:
    with pytest.raises(ConfigError, match=r"host\.extent_bytes"):
        client.open_namespace(NAMESPACE, 2 << 20)


@pytest.mark.parametrize(
    "frame",
    [
        b"\xff\xff\xff\xff",
        encode("hello"),
        encode({"protocol": 99, "name": "x", "pid": 1}),
        b"\x04\x00\x00\x00\xc1\xc1\xc1\xc1",
    ],
    ids=["huge", "no map", "other version", "not msgpack"],
)
def test_a_bad_greeting_does_no_harm(node: RunningNode, client: PatientClient, frame: bytes) -> None:
    with socket.socket(socket.AF_UNIX) as raw:
        raw.settimeout(60)
        raw.connect(str(node.socket))
        raw.sendall(frame)
        while raw.recv(4096):
            pass
    assert client.lookup([BlockKey(b"x" * 16)]).blocks == 0


@pytest.mark.parametrize(
    ("verb", "arguments"),
    [
        ("lookup", {"keys": b"short"}),
        ("lookup", {"keys": b"", "start": -1}),
        ("acquire", {"keys": b"", "timeout": "soon"}),
        ("reserve", {"keys": b"k" * 16, "parents": b"", "indices": []}),
        ("reserve", {"keys": b"", "parents": b"", "indices": [], "namespace": b"n" * 16}),
        ("commit", {"keys": b"", "durable": "moon", "timeout": 1}),
        ("open_namespace", {"fields": {"model": 1}, "block_bytes": 1}),
        ("list", {"medium": "host", "limit": 10**9}),
        ("no such verb", {}),
    ],
)
def test_bad_arguments_are_refused(client: PatientClient, verb: str, arguments: dict[str, object]) -> None:
    with pytest.raises(KVStoreError) as refused:
        client.call(verb, 1.0, **arguments)
    assert not isinstance(refused.value, NodeUnavailable)
    assert client.lookup([BlockKey(b"x" * 16)]).blocks == 0


def test_many_threads_share_a_client(client: PatientClient) -> None:
    failures: list[BaseException] = []

    def work(number: int) -> None:
        try:
            blocks = chain(client, 3, seed=10_000 * number)
            keys = [block.key for block in blocks]
            save(client, blocks)
            for _ in range(20):
                assert client.lookup(keys).blocks == 3
                assert loaded(client, keys) == [payload_of(key) for key in keys]
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_operators_verbs(client: PatientClient) -> None:
    blocks = chain(client, 3)
    save(client, blocks)
    status = client.call("status")
    assert status["clients"][0]["pid"] == os.getpid()
    assert status["clients"][0]["namespace"] == NAMESPACE.digest
    assert status["tiers"][0]["blocks"] == 3
    first = client.call("list", medium="host", limit=2)
    rest = client.call("list", medium="host", limit=2, cursor=first["cursor"])
    assert rest["cursor"] == b""
    listed = [block["key"] for block in first["blocks"] + rest["blocks"]]
    assert listed == sorted(block.key for block in blocks)
    assert client.call("inspect", key=blocks[1].key)["parent"] == blocks[0].key
    assert client.call("verify", medium="host", limit=10)["checked"] == 3
    assert client.call("delete", keys=blocks[2].key)["deleted"] == {"host": 1}
    assert client.lookup([b.key for b in blocks]).blocks == 2


def _reconnected(client: PatientClient, key: BlockKey) -> bool:
    try:
        client.lookup([key])
    except NodeUnavailable:
        return False
    return True


def test_blocks_outlive_the_node_on_disk_and_in_the_bucket(tmp_path: Path) -> None:
    bucket = f"object.url=file://{tmp_path / 'bucket'}"
    with RunningNode(tmp_path / "a", bucket) as node, PatientClient(node.socket) as client:
        blocks = chain(client, 5)
        keys = [block.key for block in blocks]
        save(client, blocks)
        assert client.call("drain", timeout=50.0)["drained"]
    with RunningNode(tmp_path / "a", bucket) as node, PatientClient(node.socket) as client:
        assert [medium for medium, _ in client.lookup(keys).runs] == [Medium.DISK]
        assert loaded(client, keys) == [payload_of(key) for key in keys]
    # Another node, that knows nothing but the bucket.
    with RunningNode(tmp_path / "b", bucket) as node, PatientClient(node.socket) as client:
        wait_for(lambda: client.lookup(keys).blocks == 5)
        assert [medium for medium, _ in client.lookup(keys).runs] == [Medium.OBJECT]
        assert loaded(client, keys) == [payload_of(key) for key in keys]
        wait_for(lambda: any(space["fields"]["model"] == "toy" for space in client.call("status")["namespaces"]))


def test_a_running_node_finds_what_another_one_put_in_the_bucket(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(survey, "ABSENT_SECONDS", 0.1)
    bucket = f"object.url=file://{tmp_path / 'bucket'}"
    with RunningNode(tmp_path / "a", bucket) as a, RunningNode(tmp_path / "b", bucket) as b:
        with PatientClient(a.socket) as writer, PatientClient(b.socket) as reader:
            blocks = chain(reader, 3)
            keys = [block.key for block in blocks]
            assert reader.lookup(keys[:1]).blocks == 0
            chain(writer, 3)
            save(writer, blocks)
            assert writer.call("drain", timeout=50.0)["drained"]
            wait_for(lambda: reader.lookup(keys).blocks == 3)
            assert loaded(reader, keys) == [payload_of(key) for key in keys]


def test_a_block_that_went_bad_on_disk_is_a_miss_and_heals_with_the_next_save(tmp_path: Path) -> None:
    with RunningNode(tmp_path) as node, PatientClient(node.socket) as client:
        blocks = chain(client, 3)
        keys = [block.key for block in blocks]
        save(client, blocks)
        assert client.call("drain", timeout=50.0)["drained"]
    damaged = 0
    for segment in (tmp_path / "disk").glob("segment-*"):
        data = bytearray(segment.read_bytes())
        at = data.find(payload_of(keys[1]))
        if at >= 0:
            data[at + 5000] ^= 1
            segment.write_bytes(data)
            damaged += 1
    assert damaged == 1
    with RunningNode(tmp_path) as node, PatientClient(node.socket) as client:
        chain(client, 3)
        acquired = client.acquire(keys, 50.0)
        assert (len(acquired.offsets), acquired.miss) == (1, Miss.CORRUPT)
        client.release(keys[:1])
        assert client.lookup(keys).blocks == 1
        assert client.call("status")["tiers"][1]["quarantined"] == 1
        assert save(client, blocks) == (keys[1],)
        assert loaded(client, keys) == [payload_of(key) for key in keys]


def test_a_node_tells_its_region_which_prompts_are_hot(tmp_path: Path) -> None:
    bucket = tmp_path / "bucket"
    with RunningNode(tmp_path / "a", f"object.url=file://{bucket}") as node:
        for number in range(3):
            with PatientClient(node.socket, name=f"engine {number}") as client:
                blocks = chain(client, 4)
                client.lookup([block.key for block in blocks])
                save(client, blocks)
        with PatientClient(node.socket) as client:
            (prompt,) = client.call("hot", limit=10)["prompts"]
            assert prompt["key"] == blocks[-1].key
            assert prompt["tokens"] == 4 * NAMESPACE.block_tokens
            assert "host" in prompt["media"]
    (published,) = (bucket / "hotness").iterdir()
    assert HotnessSnapshot.unpack(published.read_bytes()).scores.keys() == {blocks[-1].key}, "the end names the chain"
