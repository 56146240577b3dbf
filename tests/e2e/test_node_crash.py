"""A node killed while engines save: what it said was durable is there, and nothing wrong is ever served."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from kvstore.errors import DeadlineExceeded, NodeUnavailable
from kvstore.identity import NO_PARENT, BlockKey, Namespace, chain_digests
from kvstore.node.api import NewBlock
from kvstore.node.client import Client
from kvstore.testing.node import NodeProcess
from kvstore.tiers.base import Medium

BLOCK_BYTES = 200_000
BLOCKS = 6
KILLS = 12
SMALL = ["host.bytes=32MiB", "host.extent_bytes=1MiB", "disk.bytes=64MiB", "disk.segment_bytes=8MiB"]
NAMESPACE = Namespace(
    model="toy", weights="1", dtype="float32", layers=2, kv_heads=2, head_dim=8, attention="gqa", rope="",
    block_tokens=16, layout="opaque:test",
)  # fmt: skip


def payload_of(key: BlockKey) -> bytes:
    return np.random.default_rng(int.from_bytes(key, "little")).bytes(BLOCK_BYTES)


@pytest.fixture
def node(tmp_path: Path) -> Iterator[NodeProcess]:
    """A node that is not running yet."""
    node = NodeProcess(tmp_path, *SMALL)
    yield node
    node.daemon.stop()


def save_chain(client: Client, seed: int) -> tuple[BlockKey, ...]:
    """Save a chain; the keys that the node said are on disk."""
    keyring = client.open_namespace(NAMESPACE, BLOCK_BYTES)
    tokens = np.random.default_rng(seed).integers(0, 50_000, BLOCKS * NAMESPACE.block_tokens)
    keys = keyring.block_keys(chain_digests(tokens.astype(np.uint32), NAMESPACE.block_tokens))
    blocks = [NewBlock(key, keys[i - 1] if i else NO_PARENT, i) for i, key in enumerate(keys)]
    reserved = client.reserve(NAMESPACE, blocks)
    granted = []
    for key, offset in zip(keys, reserved.offsets, strict=True):
        if offset is not None:
            reserved.arena.buffer[offset : offset + BLOCK_BYTES] = payload_of(key)
            granted.append(key)
    return client.commit(granted, durable=Medium.DISK)


def check(client: Client, keys: list[BlockKey]) -> int:
    """Every block that is delivered is right; how many were."""
    client.open_namespace(NAMESPACE, BLOCK_BYTES)
    delivered = 0
    for key in keys:
        acquired = client.acquire([key], 10.0)
        for offset in acquired.offsets:
            assert bytes(acquired.arena.buffer[offset : offset + BLOCK_BYTES]) == payload_of(key), (
                "a wrong block was served"
            )
            delivered += 1
        client.release([key])
    return delivered


@pytest.mark.timeout(300)
def test_what_was_acknowledged_survives_kill_9(node: NodeProcess) -> None:
    source = random.Random(1)
    acknowledged: list[BlockKey] = []
    for number in range(KILLS):
        node.start()
        killer = threading.Timer(0, lambda: None)
        try:
            with node.client() as client:
                # The disk holds some 300 blocks: what is acknowledged here fits, so nothing may be missing.
                assert check(client, acknowledged) == len(acknowledged)
                killer = threading.Timer(source.uniform(0.01, 0.4), node.kill)
                killer.start()
                seed = 1000 * number
                while len(acknowledged) < 20 * (number + 1):
                    acknowledged += save_chain(client, seed)
                    seed += 1
        except (NodeUnavailable, DeadlineExceeded):
            pass
        finally:
            killer.join()
            if node.daemon.running:
                node.kill()
    assert len(acknowledged) > KILLS
    node.start()
    with node.client() as client:
        assert check(client, acknowledged) == len(acknowledged)
        assert client.call("verify", 60.0, medium="disk", limit=1000)["bad"] == []
    node.stop()


def test_sigterm_writes_down_what_was_saved(node: NodeProcess) -> None:
    node.start()
    with node.client() as client:
        keyring = client.open_namespace(NAMESPACE, BLOCK_BYTES)
        keys = keyring.block_keys([bytes([i]) * 32 for i in range(20)])
        reserved = client.reserve(NAMESPACE, [NewBlock(key, NO_PARENT, 0) for key in keys])
        for key, offset in zip(keys, reserved.offsets, strict=True):
            assert offset is not None
            reserved.arena.buffer[offset : offset + BLOCK_BYTES] = payload_of(key)
        client.commit(keys)
        node.stop()
    node.start()
    with node.client() as client:
        assert check(client, keys) == len(keys)
    node.stop()
