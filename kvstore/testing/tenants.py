"""A node with several tenants, and their engines' clients."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from kvstore.identity import NO_PARENT, BlockKey, Keyring, Namespace, chain_digests
from kvstore.node.api import NewBlock
from kvstore.tenants.book import TenantBook
from kvstore.tenants.credentials import operator_token
from kvstore.testing.node import PatientClient, RunningNode
from kvstore.tiers.base import Medium

BLOCK_BYTES = 60_000
MODEL = Namespace(
    model="org/toy", weights="1", dtype="float32", layers=1, kv_heads=1, head_dim=1, attention="gqa", rope="",
    block_tokens=16, layout="opaque:test",
)  # fmt: skip
SMALL = ("tenants.host_bytes=4MiB", "disk.bytes=16MiB", "disk.segment_bytes=1MiB", "policy.admission=off")


@dataclass
class TenantSite:
    """A node that can be stopped and started again, and its book."""

    folder: Path
    overrides: tuple[str, ...] = ()
    tokens: dict[str, str] = field(default_factory=dict)

    @property
    def settings(self) -> list[str]:
        return [*SMALL, f"tenants.book={self.folder / 'tenants.json'}", *self.overrides]

    @property
    def book(self) -> TenantBook:
        return TenantBook(self.folder / "tenants.json")

    def running(self) -> RunningNode:
        return RunningNode(self.folder, *self.settings)

    def engine(self, tenant: str) -> PatientClient:
        """What an engine of the tenant connects with."""
        return PatientClient(self.folder / "node.sock", name=f"engine of {tenant}", token=lambda: self.tokens[tenant])

    def operator(self, node: RunningNode) -> PatientClient:
        return PatientClient(node.socket, name="operator", token=lambda: operator_token(node.config))


@contextmanager
def tenant_site(*names: str, overrides: tuple[str, ...] = ()) -> Iterator[TenantSite]:
    """With these tenants in the book; no node runs yet."""
    with tempfile.TemporaryDirectory(prefix="kvt-") as name:
        site = TenantSite(Path(name), overrides)
        for tenant in names:
            site.tokens[tenant] = site.book.create(tenant)[1]
        yield site


def keys_of(client: PatientClient, prompt: list[int]) -> list[BlockKey]:
    """As the tenant's engine derives them."""
    return derive(client.open_namespace(MODEL, BLOCK_BYTES), prompt)


def derive(keyring: Keyring, prompt: list[int]) -> list[BlockKey]:
    return keyring.block_keys(chain_digests(prompt, MODEL.block_tokens))


def prompt_of(blocks: int, start: int = 0) -> list[int]:
    return list(range(start, start + blocks * MODEL.block_tokens))


def save(client: PatientClient, prompt: list[int], fill: int = 1, durable: Medium = Medium.DISK) -> list[BlockKey]:
    """Compute a prompt and keep it; the keys that reached ``durable``. ``fill`` is what the blocks are made of."""
    keys = keys_of(client, prompt)
    blocks = [NewBlock(key, parent, i) for i, (key, parent) in enumerate(zip(keys, [NO_PARENT, *keys], strict=False))]
    reserved = client.reserve(MODEL, blocks)
    written = []
    for key, offset in zip(keys, reserved.offsets, strict=True):
        if offset is not None:
            reserved.arena.slot(offset, BLOCK_BYTES)[:] = bytes([fill]) * BLOCK_BYTES
            written.append(key)
    return list(client.commit(written, durable=durable))


def loaded(client: PatientClient, keys: list[BlockKey]) -> list[int]:
    """The first byte of each block that is delivered."""
    acquired = client.acquire(keys, 50.0)
    found = [acquired.arena.buffer[offset] for offset in acquired.offsets]
    client.release(keys[: len(acquired.offsets)])
    return found


UID = os.geteuid()
