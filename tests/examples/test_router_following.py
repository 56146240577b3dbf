"""The example router's other way to know what nodes hold: their events, from a real node."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest

from examples.router import Following, Tokens
from kvstore.config.schema import PUBLIC_SECRET
from kvstore.identity import NO_PARENT, BlockKey, Namespace, chain_digests
from kvstore.node.api import NewBlock
from kvstore.testing.node import PatientClient, RunningNode
from kvstore.testing.servers import free_port
from kvstore.tiers.base import Medium

pytest.importorskip("zmq")

API = "http://127.0.0.1:7070"
SPACE = Namespace(
    model="toy", weights="1", dtype="float32", layers=1, kv_heads=1, head_dim=1, attention="gqa", rope="",
    block_tokens=16, layout="opaque:test",
)  # fmt: skip
TOKENS = np.arange(16 * 5 + 3, dtype=np.uint32)


async def usable(following: Following, tokens: Tokens, wanted: int) -> None:
    """Waits until events have told that ``wanted`` tokens are usable."""
    async with asyncio.timeout(60):
        while (await following("toy", tokens, "")).get(API) != [{"usable_tokens": wanted, "seconds": 0.0}]:
            await asyncio.sleep(0.05)


def save(client: PatientClient, tokens: Tokens) -> list[BlockKey]:
    keys = client.open_namespace(SPACE, 10_000).block_keys(chain_digests(tokens, SPACE.block_tokens))
    client.reserve(SPACE, [NewBlock(key, keys[i - 1] if i else NO_PARENT, i) for i, key in enumerate(keys)])
    assert list(client.commit(keys, durable=Medium.DISK)) == keys
    return keys


async def subscribed(following: Following, client: PatientClient) -> None:
    """Saves until an event comes: a subscription takes a moment to arrive, and PUB does not wait for it."""
    async with asyncio.timeout(60):
        while not following.blocks.get(API):
            save(client, np.random.default_rng().integers(1 << 30, size=16, dtype=np.uint32))
            await asyncio.sleep(0.05)


async def test_it_knows_what_was_saved_and_deleted(tmp_path: Path) -> None:
    address = f"tcp://127.0.0.1:{free_port()}"
    following = Following([SPACE], PUBLIC_SECRET)
    with RunningNode(tmp_path, f"events.listen={address}") as node, PatientClient(node.socket) as client:
        task = asyncio.create_task(following.follow(API, address))
        await subscribed(following, client)
        keys = save(client, TOKENS)
        await usable(following, TOKENS, 80)
        await usable(following, [*TOKENS[:40], *TOKENS], 32)
        client.delete(keys[3:])
        await usable(following, TOKENS, 48)
        assert await following("another model", TOKENS, "") == {}
        task.cancel()
        await asyncio.wait([task])


async def test_what_it_missed_makes_it_forget() -> None:
    """It cannot know whether removals were among that."""
    zmq_asyncio = pytest.importorskip("zmq.asyncio")
    import msgpack
    import zmq

    address = f"tcp://127.0.0.1:{free_port()}"
    following = Following([SPACE], PUBLIC_SECRET)
    keys = SPACE.keyring(PUBLIC_SECRET).block_keys(chain_digests(TOKENS, 16))
    publisher = zmq_asyncio.Context.instance().socket(zmq.XPUB)  # PUB that says who subscribes
    publisher.bind(address)
    task = asyncio.create_task(following.follow(API, address))
    assert await publisher.recv() == b"\x01kv-events"
    for number, stored in ((0, keys[:2]), (1, keys[2:]), (5, keys[:1])):
        events = [{"type": "BlockStored", "block_hashes": stored, "ownership": "host"}]
        await publisher.send_multipart([b"kv-events", number.to_bytes(8, "big"), msgpack.packb([0.0, events, 0])])
        await usable(following, TOKENS, {0: 32, 1: 80, 5: 16}[number])
    task.cancel()
    await asyncio.wait([task])
    publisher.close(0)
