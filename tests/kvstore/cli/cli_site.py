"""A real node for commands to talk to, and a few blocks in it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from typer.testing import CliRunner, Result

from kvstore.cli import app
from kvstore.identity import BlockKey, Namespace, chain_digests
from kvstore.node.api import NewBlock
from kvstore.testing.node import NodeProcess, PatientClient
from kvstore.tiers.base import Medium

BLOCK_BYTES = 100_000
BLOCKS = 5
NAMESPACE = Namespace(
    model="tiny-llama", weights="1", dtype="float32", layers=2, kv_heads=2, head_dim=8, attention="gqa", rope="",
    block_tokens=16, layout="opaque:test",
)  # fmt: skip


@dataclass
class Site:
    """A node's configuration file and what was saved through it."""

    config: Path
    node: NodeProcess
    keys: list[BlockKey] = field(default_factory=list)

    def run(self, *arguments: str) -> Result:
        """A command with this site's configuration."""
        return CliRunner().invoke(app, [arguments[0], "--config", str(self.config), *arguments[1:]])


def payload(index: int) -> bytes:
    return bytes([index]) * BLOCK_BYTES


@contextmanager
def settings_file() -> Iterator[Path]:
    """A configuration file in a short folder: a socket's path has at most 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="kvs-") as name:
        folder = Path(name)
        config = folder / "node.toml"
        config.write_text(
            f'[node]\nsocket = "{folder}/node.sock"\ndirectory = "{folder}/data"\n'
            '[host]\nbytes = "32MiB"\nextent_bytes = "1MiB"\n'
            '[disk]\nbytes = "16MiB"\nsegment_bytes = "4MiB"\n'
        )
        yield config


@contextmanager
def running_site() -> Iterator[Site]:
    """A running node that holds one chain of blocks in host memory and on disk."""
    with settings_file() as settings:
        with NodeProcess(settings.parent, config=settings) as node:
            yield Site(settings, node, save_a_chain(node.socket))


def save_a_chain(socket: Path) -> list[BlockKey]:
    with PatientClient(socket, name="a test") as client:
        keyring = client.open_namespace(NAMESPACE, BLOCK_BYTES)
        keys = keyring.block_keys(chain_digests(range(NAMESPACE.block_tokens * BLOCKS), NAMESPACE.block_tokens))
        parents = [BlockKey(bytes(16)), *keys]
        blocks = [NewBlock(key, parent, index) for index, (key, parent) in enumerate(zip(keys, parents, strict=False))]
        reserved = client.reserve(NAMESPACE, blocks)
        for index, offset in enumerate(reserved.offsets):
            assert offset is not None
            reserved.arena.slot(offset, BLOCK_BYTES)[:] = payload(index)
        assert client.commit(keys, durable=Medium.DISK) == tuple(keys)
    return keys
