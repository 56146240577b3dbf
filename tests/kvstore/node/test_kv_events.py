"""KV cache events on the wire, read with vLLM's own classes where vLLM is installed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgpack
import pytest

from kvstore.config import load
from kvstore.errors import ConfigError
from kvstore.history import What
from kvstore.identity import NO_PARENT, BlockKey, Namespace
from kvstore.kvevents import KVEvents
from kvstore.node.api import NewBlock
from kvstore.testing.node import PatientClient, RunningNode
from kvstore.testing.servers import free_port
from kvstore.tiers.base import Medium

zmq = pytest.importorskip("zmq")

BLOCK_BYTES = 10_000
NAMESPACE = Namespace(
    model="m", weights="1", dtype="float32", layers=1, kv_heads=1, head_dim=1, attention="gqa", rope="",
    block_tokens=16, layout="opaque:test",
)  # fmt: skip
KEYS = [BlockKey(bytes([number]) * 16) for number in range(1, 4)]


def save(client: PatientClient, keys: list[BlockKey]) -> None:
    client.open_namespace(NAMESPACE, BLOCK_BYTES)
    blocks = [
        NewBlock(key, parent, index) for index, (key, parent) in enumerate(zip(keys, [NO_PARENT, *keys], strict=False))
    ]
    client.reserve(NAMESPACE, blocks)
    assert len(client.commit(keys, durable=Medium.DISK)) == len(keys)


class Subscriber:
    """Reads one node's events, from when it has subscribed."""

    def __init__(self, address: str, client: PatientClient) -> None:
        """``client`` saves and deletes blocks until events come: a subscription takes a moment to arrive, and PUB does not
        wait for it."""
        self._socket = zmq.Context.instance().socket(zmq.SUB)
        self._socket.connect(address)
        self._socket.subscribe(b"")
        self.numbers: list[int] = []
        self.payloads: list[bytes] = []
        for probe in (BlockKey(bytes([0xFF, number]) * 8) for number in range(256)):
            save(client, [probe])
            client.delete([probe])
            if self._socket.poll(100):
                self.until(lambda seen, probe=probe: _removed(seen, [probe]) == {"disk", "host"})
                break
        self.payloads.clear()

    def until(self, enough: Callable[[list[Any]], bool]) -> list[Any]:
        """All events so far, once they are enough."""
        events: list[Any] = []
        deadline = time.monotonic() + 60
        while not enough(events):
            assert self._socket.poll(1000) or time.monotonic() < deadline, f"only {events}"
            while self._socket.poll(0):
                _, number, payload = self._socket.recv_multipart()
                self.numbers.append(int.from_bytes(number, "big"))
                self.payloads.append(payload)
                events += msgpack.unpackb(payload)[1]
        return events

    def close(self) -> None:
        self._socket.close(0)


def _removed(events: list[Any], keys: list[BlockKey]) -> set[str]:
    """The tiers that these blocks were removed from."""
    return {e["ownership"] for e in events if e["type"] == "BlockRemoved" and e["block_hashes"] == keys}


def test_saves_writes_and_deletions_are_published_in_order(tmp_path: Path) -> None:
    address = f"tcp://127.0.0.1:{free_port()}"
    with RunningNode(tmp_path, f"events.listen={address}") as node, PatientClient(node.socket) as client:
        subscriber = Subscriber(address, client)
        save(client, KEYS)
        client.delete(KEYS[2:])
        events = subscriber.until(lambda seen: _removed(seen, KEYS[2:]) == {"disk", "host"})
        subscriber.close()
    stored = [event for event in events if event["type"] == "BlockStored"]
    in_host = [event for event in stored if event["ownership"] == "host"]
    assert [event["block_hashes"] for event in in_host] == [[key] for key in KEYS]
    assert [event["parent_block_hash"] for event in in_host] == [None, *KEYS[:2]]
    assert {event["block_size"] for event in stored} == {NAMESPACE.block_tokens}
    assert {(event["ownership"], event["medium"], event["locality"]) for event in stored} == {
        ("host", "CPU", "LOCAL"),
        ("disk", "STORAGE", "LOCAL"),
    }
    assert all(event["block_hashes"] == KEYS[2:] for event in events if event["type"] == "BlockRemoved")
    first = subscriber.numbers[0]
    assert subscriber.numbers == list(range(first, first + len(subscriber.numbers)))


def test_vllms_own_classes_read_them(tmp_path: Path) -> None:
    kv_events = pytest.importorskip("vllm.distributed.kv_events")
    msgspec = pytest.importorskip("msgspec")
    address = f"ipc://{tmp_path / 'events'}"
    with RunningNode(tmp_path, f"events.listen={address}") as node, PatientClient(node.socket) as client:
        subscriber = Subscriber(address, client)
        save(client, KEYS)
        client.delete(KEYS)
        subscriber.until(lambda seen: _removed(seen, KEYS) == {"disk", "host"})
        subscriber.close()
    decoder = msgspec.msgpack.Decoder(kv_events.KVEventBatch)
    events = []
    for payload in subscriber.payloads:
        batch = decoder.decode(payload)
        events += batch.events
        assert batch.data_parallel_rank == 0
        assert abs(time.time() - batch.ts) < 60
        assert msgpack.unpackb(msgspec.msgpack.encode(batch)) == msgpack.unpackb(payload), (
            "vLLM would send just these fields"
        )
    stored = [event for event in events if type(event) is kv_events.BlockStored]
    removed = [event for event in events if type(event) is kv_events.BlockRemoved]
    assert len(stored) + len(removed) == len(events)
    in_host = [event for event in stored if event.medium == kv_events.MEDIUM_CPU]
    assert [event.block_hashes for event in in_host] == [[key] for key in KEYS]
    assert [event.parent_block_hash for event in in_host] == [None, *KEYS[:2]]
    assert {event.medium for event in stored} == {kv_events.MEDIUM_CPU, kv_events.MEDIUM_STORAGE}
    assert {(event.block_size, *event.token_ids, event.lora_id, event.lora_name) for event in stored} == {
        (16, None, None)
    }
    assert {event.locality for event in events} == {"LOCAL"}
    assert {(event.medium, event.ownership) for event in events} == {("CPU", "host"), ("STORAGE", "disk")}
    assert all(event.block_hashes == KEYS for event in removed)


async def test_numbers_begin_at_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    """A subscriber who sees another one first knows that something was missed."""
    monkeypatch.setattr(zmq, "PUB", zmq.XPUB)  # which says who subscribes
    address = f"tcp://127.0.0.1:{free_port()}"
    events = KVEvents(address, lambda _: None)
    with zmq.Context.instance().socket(zmq.SUB) as subscriber:
        subscriber.connect(address)
        subscriber.subscribe(b"")
        assert events._socket.recv() == b"\x01"
        events.tell(What.SAVED, KEYS, Medium.HOST)
        while not subscriber.poll(0):
            await asyncio.sleep(0.01)
        _, number, _ = subscriber.recv_multipart()
    events.close()
    assert int.from_bytes(number, "big") == 0


@pytest.mark.parametrize("address", ["5557", "tcp://0.0.0.0:5557", "tcp://*:5557", "udp://127.0.0.1:1"])
def test_addresses_that_cannot_be_are_refused(address: str) -> None:
    with pytest.raises(ConfigError, match=r"events\.listen"):
        load(None, [f"events.listen={address}"], environ={})
