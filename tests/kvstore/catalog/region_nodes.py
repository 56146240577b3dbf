"""Nodes of a region for tests: a bucket in a folder, and a catalog."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from kvstore.identity import BlockKey, Namespace, chain_digests
from kvstore.node.api import NewBlock
from kvstore.testing.node import PatientClient, RunningNode
from kvstore.tiers.base import Medium
from kvstore.tiers.object import ObjectTier
from kvstore.tiers.object.names import block_name
from kvstore.tiers.wrappers import Wrapped

BLOCK_BYTES = 50_000
SPACE = Namespace(
    model="tiny", weights="1", dtype="float32", layers=2, kv_heads=2, head_dim=8, attention="gqa", rope="",
    block_tokens=16, layout="opaque:test",
)  # fmt: skip


class Region:
    """Nodes over one bucket (a folder) and one catalog."""

    def __init__(self, folder: Path, catalog: str, stack: ExitStack) -> None:
        self.folder = folder
        self.bucket = f"file://{folder}/bucket"
        self.catalog = catalog
        self._stack = stack
        self._nodes = 0

    def node(self, *overrides: str) -> Peer:
        self._nodes += 1
        directory = self.folder / f"node-{self._nodes}"
        settings = [f"object.url={self.bucket}", f"catalog.url={self.catalog}", "disk.enabled=false"]
        running = RunningNode(directory, *settings, *overrides)
        self._stack.callback(running.stop)
        client = PatientClient(running.socket, name="test")
        self._stack.callback(client.close)
        return Peer(running, client)

    def object(self, key: BlockKey) -> Path:
        return self.folder / "bucket" / block_name(SPACE.digest, key)


class Peer:
    """A node and a client of it."""

    def __init__(self, running: RunningNode, client: PatientClient) -> None:
        self.running = running
        self.client = client
        self.keyring = client.open_namespace(SPACE, BLOCK_BYTES)

    def chain(self, seed: int, blocks: int = 3) -> list[BlockKey]:
        tokens = range(seed * 100_000, seed * 100_000 + blocks * SPACE.block_tokens)
        return self.keyring.block_keys(chain_digests(tokens, SPACE.block_tokens))

    def save(self, seed: int, blocks: int = 3) -> list[BlockKey]:
        """A chain, durable in the bucket on return."""
        keys, durable = self.offer(seed, blocks)
        assert durable == tuple(keys)
        return keys

    def offer(self, seed: int, blocks: int = 3) -> tuple[list[BlockKey], tuple[BlockKey, ...]]:
        """Save a chain; its blocks, and those that the bucket took."""
        keys = self.chain(seed, blocks)
        parents = [BlockKey(bytes(16)), *keys]
        new = [NewBlock(key, parent, index) for index, (key, parent) in enumerate(zip(keys, parents, strict=False))]
        reserved = self.client.reserve(SPACE, new)
        for key, offset in zip(keys, reserved.offsets, strict=True):
            assert offset is not None
            reserved.arena.slot(offset, BLOCK_BYTES)[:] = payload(key)
        return keys, self.client.commit(keys, durable=Medium.OBJECT)

    def load(self, keys: list[BlockKey]) -> int:
        """How many of a prefix are delivered; each as it was saved."""
        acquired = self.client.acquire(keys, 50)
        for key, offset in zip(keys, acquired.offsets, strict=False):
            assert bytes(acquired.arena.slot(offset, BLOCK_BYTES)) == payload(key)
        self.client.release(keys[: len(acquired.offsets)])
        return len(acquired.offsets)

    def lists(self, keys: list[BlockKey]) -> int:
        """How many of a prefix the bucket's tier of this node lists."""
        return sum(key in self.bucket.keys() for key in keys)

    @property
    def bucket(self) -> ObjectTier:
        """To look at, not to call: it belongs to the node's thread."""
        (tier,) = (tier for tier in self.running.node.store.tiers if tier.medium is Medium.OBJECT)
        while isinstance(tier, Wrapped):
            tier = tier.inner
        assert isinstance(tier, ObjectTier)
        return tier


def payload(key: BlockKey) -> bytes:
    return (key * (BLOCK_BYTES // len(key) + 1))[:BLOCK_BYTES]


def wait_for(condition: Callable[[], object], seconds: float = 60) -> float:
    """Seconds until ``condition`` held."""
    started = time.monotonic()
    while not condition():
        assert time.monotonic() < started + seconds, "waited in vain"
        time.sleep(0.01)
    return time.monotonic() - started
