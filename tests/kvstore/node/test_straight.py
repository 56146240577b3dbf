"""Blocks that a client reads from the node's disk by itself: what the node points to, and what a reader believes."""

from __future__ import annotations

import mmap
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import kvstore.node.straight as straight
from kvstore.encryption import new_key
from kvstore.errors import DeadlineExceeded, ProtocolError
from kvstore.identity import NO_PARENT, BlockKey, Namespace, chain_digests
from kvstore.node.api import Miss, NewBlock
from kvstore.node.straight import Read, StraightReads
from kvstore.testing.node import NodeProcess, PatientClient, RunningNode, wait_for
from kvstore.testing.tenants import MODEL, tenant_site

HALF = 8192
BLOCK_BYTES = 2 * HALF
NAMESPACE = Namespace(
    model="toy", weights="1", dtype="float32", layers=2, kv_heads=2, head_dim=8, attention="gqa", rope="",
    block_tokens=16, layout="opaque:test",
)  # fmt: skip


@pytest.fixture(autouse=True)
def direct_io(tmp_path: Path) -> None:
    try:
        os.close(os.open(tmp_path / "probe", os.O_RDWR | os.O_CREAT | os.O_DIRECT, 0o600))
    except OSError:
        pytest.skip("no O_DIRECT here")


@pytest.fixture
def node(tmp_path: Path) -> Iterator[RunningNode]:
    with RunningNode(tmp_path) as node:
        yield node


@pytest.fixture
def client(node: RunningNode) -> Iterator[PatientClient]:
    with PatientClient(node.socket) as client:
        yield client


@pytest.fixture
def reads(client: PatientClient) -> Iterator[StraightReads]:
    reads = StraightReads(client)
    yield reads
    reads.close()


class Pool:
    """Shared memory in which a block's halves are not beside each other, as in SGLang's pools."""

    def __init__(self, blocks: int) -> None:
        self._blocks = blocks
        self.memory = memoryview(mmap.mmap(-1, blocks * BLOCK_BYTES))

    @property
    def pages(self) -> list[list[memoryview]]:
        starts = [[half * self._blocks * HALF + page * HALF for half in (0, 1)] for page in range(self._blocks)]
        return [[self.memory[at : at + HALF] for at in halves] for halves in starts]

    def block(self, page: int) -> bytes:
        return b"".join(map(bytes, self.pages[page]))


def payload_of(key: BlockKey) -> bytes:
    return key * (BLOCK_BYTES // len(key))


def save(client: PatientClient, blocks: int, seed: int = 0, space: Namespace = NAMESPACE) -> list[BlockKey]:
    """Save a chain and let it be on the disk only."""
    keyring = client.open_namespace(space, BLOCK_BYTES)
    tokens = list(range(seed, seed + blocks * space.block_tokens))
    keys = keyring.block_keys(chain_digests(tokens, space.block_tokens))
    reserved = client.reserve(
        space, [NewBlock(key, keys[at - 1] if at else NO_PARENT, at) for at, key in enumerate(keys)]
    )
    for key, offset in zip(keys, reserved.offsets, strict=True):
        assert offset is not None
        reserved.arena.buffer[offset : offset + BLOCK_BYTES] = payload_of(key)
    client.commit(keys)
    assert client.call("drain", timeout=50)["drained"]
    wait_for(lambda: client.call("evict", medium="host", keys=b"".join(keys)) and not in_memory(client, keys))
    return keys


def in_memory(client: PatientClient, keys: Sequence[BlockKey]) -> int:
    return sum("host" in client.call("inspect", key=key)["media"] for key in keys)


def soon() -> float:
    return time.monotonic() + 30


def located(reads: StraightReads, keys: Sequence[BlockKey], pool: Pool, deadline: float | None = None) -> list[Read]:
    found = [read for read in reads.locate(keys, pool.pages, deadline or soon()) if read is not None]
    assert len(found) == len(keys)
    return found


def segments(folder: Path) -> list[Path]:
    return sorted(folder.rglob("segment-*"))


def change(folder: Path, key: BlockKey) -> None:
    """Flip a bit in the payload of a block on the disk."""
    for path in segments(folder):
        content = path.read_bytes()
        if (at := content.find(payload_of(key))) >= 0:
            with path.open("r+b") as file:
                file.seek(at + HALF + 5)
                file.write(bytes([content[at + HALF + 5] ^ 1]))
            return
    raise AssertionError("not on the disk")


# What the node points to


def test_a_block_on_the_disk_is_read_past_the_nodes_memory(client: PatientClient, reads: StraightReads) -> None:
    keys, pool = save(client, 5), Pool(5)
    assert reads.read(located(reads, keys, pool), soon()) == 5
    assert [pool.block(page) for page in range(5)] == list(map(payload_of, keys))
    assert in_memory(client, keys) == 0
    delivered = "kvstore_delivered_blocks_total{tier=disk}"
    wait_for(lambda: client.call("status")["counters"].get(delivered) == 5)
    assert client.lookup(keys).seconds > 0, "the planner learns how fast the disk is"


def test_what_is_wanted_again_is_to_be_in_memory(client: PatientClient, reads: StraightReads) -> None:
    keys, pool = save(client, 3), Pool(3)
    assert reads.read(located(reads, keys[:2], Pool(2)), soon()) == 2
    again = reads.locate(keys, pool.pages, soon())
    assert [read is not None for read in again] == [False, False, True]
    acquired = client.acquire(keys, 30)
    client.release(keys[: len(acquired.offsets)])
    assert in_memory(client, keys) == 3
    assert client.locate(keys, 10) == [None] * 3


def test_what_is_not_there_is_not_pointed_to(client: PatientClient) -> None:
    assert client.locate([BlockKey(bytes(16))], 10) == [None]
    assert client.locate([], 10) == []


def test_what_the_bucket_lacks_goes_by_way_of_the_arena(tmp_path: Path) -> None:
    """From where it is written to the bucket; and what may be buried goes there to be judged."""
    bucket = f"object.url=file://{tmp_path}/bucket"
    with RunningNode(tmp_path, bucket, "policy.admission=off") as node, PatientClient(node.socket) as client:
        keys = save(client, 2)
        assert client.call("inspect", key=keys[0])["media"] == ["disk", "object"]
        client.call("evict", medium="object", keys=keys[1])
        assert [slot is not None for slot in client.locate(keys, 10)] == [True, False]

        more = save(client, 1, seed=1000)
        disk: Any = node.node.store.tiers[1]
        disk.inner._graves.dead = lambda block: block.key == more[0]
        assert client.locate(more, 10) == [None]


def test_encrypted_blocks_are_left_to_the_node(tmp_path: Path) -> None:
    with RunningNode(tmp_path, f"encryption.keys={new_key()}") as node, PatientClient(node.socket) as client:
        assert client.locate(save(client, 1), 10) == [None]


def test_tenants_are_not_pointed_to_files_that_they_share() -> None:
    with tenant_site("a") as site, site.running(), site.engine("a") as client:
        assert client.locate(save(client, 1, space=MODEL), 10) == [None]


def test_wrong_arguments_are_refused(client: PatientClient) -> None:
    wrong: list[tuple[str, dict[str, Any], str]] = [
        ("locate", {}, "keys must be"),
        ("locate", {"keys": b"short"}, "keys must be"),
        ("locate", {"keys": bytes(16 * 1025)}, "at most 1024"),
        ("was_read", {"keys": bytes(16), "seconds": float("nan")}, "seconds must be"),
        ("was_read", {"keys": bytes(16), "seconds": -1}, "seconds must be"),
    ]
    for verb, arguments, problem in wrong:
        with pytest.raises(ProtocolError, match=problem):
            client.call(verb, **arguments)


def test_what_a_client_says_of_blocks_that_are_not_there_counts_for_nothing(client: PatientClient) -> None:
    keys = save(client, 1)
    client.was_read([BlockKey(bytes([at]) * 16) for at in range(9)], 1e-9)
    client.was_read(keys, 0.0)
    assert client.lookup(keys).seconds == 0, "nothing is known of the disk"


# What a reader believes


def test_a_block_that_was_altered_is_not_delivered_and_the_node_finds_out(
    client: PatientClient, reads: StraightReads, tmp_path: Path
) -> None:
    keys, pool = save(client, 4), Pool(4)
    change(tmp_path, keys[2])
    assert reads.read(located(reads, keys, pool), soon()) == 2
    acquired = client.acquire(keys[2:], 30)
    assert (acquired.offsets, acquired.miss) == ((), Miss.CORRUPT)
    assert client.call("inspect", key=keys[2])["media"] == []


def test_a_slot_that_has_another_block_by_now_is_not_believed(client: PatientClient, reads: StraightReads) -> None:
    keys, pool = save(client, 2), Pool(2)
    first, second = located(reads, keys, pool)
    assert reads.read([first._replace(slot=second.slot)], soon()) == 0
    client.delete(keys[:1])
    assert reads.read([first], soon()) == 0, "its header is erased"
    assert reads.read([second], soon()) == 1


def test_a_file_that_was_cut_or_removed_is_a_miss(client: PatientClient, reads: StraightReads, tmp_path: Path) -> None:
    keys, pool = save(client, 2), Pool(2)
    found = located(reads, keys, pool)
    path = Path(found[0].slot.path)
    os.truncate(path, max(read.slot.offset for read in found) + 4096 + HALF)
    assert reads.read(found, soon()) == 1
    path.unlink()
    assert reads.read(found, soon()) == 0
    more = save(client, 1, seed=1000)
    assert reads.locate(more, Pool(1).pages, soon()) == [None], "who cannot open the files asks no more"


def test_memory_that_does_not_fit_is_filled_by_copying(client: PatientClient, reads: StraightReads) -> None:
    keys, memory = save(client, 1), Pool(2).memory
    unaligned = [memory[512 : 512 + BLOCK_BYTES]]
    uneven = [memory[:100], memory[100:BLOCK_BYTES]]
    for pieces in (unaligned, uneven, []):
        assert reads.locate(keys, [pieces], soon()) == [None]
    too_short = [memory[:HALF]]
    assert reads.locate(keys, [too_short], soon()) == [None]


# Deadlines


def test_nothing_is_read_after_the_deadline(client: PatientClient, reads: StraightReads) -> None:
    keys, pool = save(client, 3), Pool(3)
    assert reads.read(located(reads, keys, pool), time.monotonic() - 0.001) == 0
    assert not any(pool.memory)


def test_a_load_ends_only_when_nothing_writes_any_more(
    client: PatientClient, reads: StraightReads, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the disk does: who called may use the memory for something else from then on."""
    now = [0.0]
    monkeypatch.setattr(straight, "time", SimpleNamespace(monotonic=lambda: now[0]))
    blocks = straight.THREADS + 2
    keys, pool = save(client, blocks), Pool(blocks)
    found, begun, answer = located(reads, keys, pool, 60), threading.Semaphore(0), threading.Event()

    def slow(fd: int, buffers: Sequence[Any], offset: int) -> int:
        begun.release()
        assert answer.wait(60)
        return os.preadv(fd, buffers, offset)

    monkeypatch.setattr(straight, "os", SimpleNamespace(**{**vars(os), "preadv": slow}))
    came: list[int] = []
    caller = threading.Thread(target=lambda: came.append(reads.read(found, deadline=10.0)))
    caller.start()
    for _ in range(straight.THREADS):
        assert begun.acquire(timeout=60)
    now[0] = 20.0
    caller.join(0.2)
    assert caller.is_alive(), "reads are under way"
    answer.set()
    caller.join(60)
    assert came == [straight.THREADS], "those behind the deadline never began"
    assert [any(pool.block(page)) for page in range(blocks)] == [True] * straight.THREADS + [False] * 2
    assert reads.locate(save(client, 1, seed=1000), Pool(1).pages, 60) == [None], "such a disk is the node's matter"


def test_a_node_that_hangs_or_dies_is_not_waited_for(tmp_path: Path) -> None:
    settings = ("host.bytes=4MiB", "host.extent_bytes=1MiB", "disk.bytes=16MiB", "disk.segment_bytes=4MiB")
    with NodeProcess(tmp_path, *settings) as node, node.client() as client:
        reads = StraightReads(client)
        keys, pool = save(client, 3), Pool(3)
        found = located(reads, keys[:2], Pool(2))
        os.kill(node.daemon.pid, signal.SIGSTOP)
        try:
            with pytest.raises(DeadlineExceeded):
                reads.locate(keys[2:], pool.pages[2:], time.monotonic() + 0.1)
            assert reads.read(found[:1], soon()) == 1, "the disk is still there"
        finally:
            os.kill(node.daemon.pid, signal.SIGCONT)
        node.kill()
        assert reads.read(found[1:], soon()) == 1
        assert [b"".join(map(bytes, read.pieces)) for read in found] == list(map(payload_of, keys[:2]))
        reads.close()
