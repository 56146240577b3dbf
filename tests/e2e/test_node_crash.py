"""A node killed while engines save: what it said was durable is there, and nothing wrong is ever served."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from kvstore.errors import DeadlineExceeded, NodeUnavailable
from kvstore.identity import NO_PARENT, BlockKey, Namespace, chain_digests
from kvstore.node.api import NewBlock
from kvstore.node.client import Client
from kvstore.tiers.base import Medium

BLOCK_BYTES = 200_000
BLOCKS = 6
KILLS = 12
NAMESPACE = Namespace(
    model="toy", weights="1", dtype="float32", layers=2, kv_heads=2, head_dim=8, attention="gqa", rope="",
    block_tokens=16, layout="opaque:test",
)  # fmt: skip


def payload_of(key: BlockKey) -> bytes:
    return np.random.default_rng(int.from_bytes(key, "little")).bytes(BLOCK_BYTES)


class NodeProcess:
    """``kvstore node`` in a process that can be killed."""

    def __init__(self, directory: Path, *settings: str) -> None:
        self.socket = directory / "node.sock"
        small = ["host.bytes=8MiB", "host.extent_bytes=1MiB", "disk.bytes=64MiB", "disk.segment_bytes=8MiB"]
        places = [f"node.directory={directory}", f"node.socket={self.socket}", "node.log_level=warning"]
        command = [sys.executable, "-m", "kvstore", "node"]
        self.process = subprocess.Popen([*command, *(f"--set={s}" for s in (*places, *small, *settings))])

    def kill(self) -> None:
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def stop(self) -> None:
        self.process.terminate()
        assert self.process.wait(timeout=30) == 0


Start = Callable[..., NodeProcess]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts nodes in one directory, and leaves none behind."""
    nodes: list[NodeProcess] = []

    def start(*settings: str) -> NodeProcess:
        nodes.append(NodeProcess(tmp_path, *settings))
        return nodes[-1]

    yield start
    for node in nodes:
        if node.process.poll() is None:
            node.kill()


def connected(client: Client) -> Client:
    deadline = time.monotonic() + 30
    while True:
        try:
            client.open_namespace(NAMESPACE, BLOCK_BYTES)
            return client
        except NodeUnavailable:
            assert time.monotonic() < deadline, "the node did not start"
            time.sleep(0.05)


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
def test_what_was_acknowledged_survives_kill_9(start: Start) -> None:
    source = random.Random(1)
    acknowledged: list[BlockKey] = []
    for number in range(KILLS):
        node = start()
        killer = threading.Timer(0, lambda: None)
        try:
            with Client(node.socket) as client:
                connected(client)
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
            if node.process.poll() is None:
                node.kill()
    assert len(acknowledged) > KILLS
    node = start()
    with Client(node.socket) as client:
        assert check(connected(client), acknowledged) == len(acknowledged)
        assert client.call("verify", 60.0, medium="disk", limit=1000)["bad"] == []
    node.stop()


def test_sigterm_writes_down_what_was_saved(start: Start) -> None:
    node = start("host.bytes=32MiB")
    with Client(node.socket) as client:
        connected(client)
        keyring = client.open_namespace(NAMESPACE, BLOCK_BYTES)
        keys = keyring.block_keys([bytes([i]) * 32 for i in range(20)])
        reserved = client.reserve(NAMESPACE, [NewBlock(key, NO_PARENT, 0) for key in keys])
        for key, offset in zip(keys, reserved.offsets, strict=True):
            assert offset is not None
            reserved.arena.buffer[offset : offset + BLOCK_BYTES] = payload_of(key)
        client.commit(keys)
        node.stop()
    node = start()
    with Client(node.socket) as client:
        assert check(connected(client), keys) == len(keys)
    node.stop()
