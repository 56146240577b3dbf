"""What hosts of opaque bytes save (vLLM's own offloading, LMCache) gets what every block gets: another region has it, warm."""

from __future__ import annotations

import asyncio
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from typer.testing import CliRunner

from connectors.exchange import Exchange
from connectors.lmcache.chunks import Chunks
from connectors.lmcache.options import Options
from kvstore.cli import app
from kvstore.identity import Namespace
from kvstore.testing.node import PatientClient, RunningNode, wait_for
from kvstore.tiers.object import ObjectSettings
from replication.contents import Contents
from replication.keys import public_text
from replication.links import Links
from replication.publisher import publish
from replication.replicator import Replicator
from replication.topology import load_topology

SIZE = 32 << 10
KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
ROWS = Namespace(
    model="m", weights="1", dtype="float16", layers=1, kv_heads=1, head_dim=1, attention="opaque", rope="",
    block_tokens=32, layout="opaque:vllm-offloading-0.32:test",
)  # fmt: skip
DIGESTS = [bytes([number]) * 36 for number in range(5)]
"""As long as vLLM's: a hash and a group."""
CHUNKS = [f"org/model@01000100@0@{number:064x}" for number in range(5)]


@pytest.fixture
def folder() -> Iterator[Path]:
    """Short: a socket's path has at most 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="kvs-") as name:
        yield Path(name)


def node(folder: Path, region: str, number: int = 0) -> RunningNode:
    return RunningNode(folder / f"{region}{number}", f"object.url=file://{folder}/{region}")


def payloads() -> list[np.ndarray]:
    return [np.random.default_rng(number).integers(0, 256, SIZE, dtype=np.uint8) for number in range(5)]


def save(at: RunningNode) -> None:
    """Rows as the tier saves them, chunks as LMCache's adapter does."""
    with PatientClient(at.socket) as client:
        assert all(Exchange(client, ROWS, SIZE).save(DIGESTS, payloads()))
        chunks = Chunks(Options(socket=str(at.socket), autostart=False))
        assert all(chunks.save(CHUNKS, payloads()))
        assert client.call("drain", 35.0, timeout=30.0)["drained"]
        chunks.close()


def loaded(at: RunningNode) -> tuple[int, int]:
    """How many rows and chunks are found, and come as they were saved."""
    with PatientClient(at.socket) as client:
        rows, chunks = Exchange(client, ROWS, SIZE), Chunks(Options(socket=str(at.socket), autostart=False))
        counts = []
        for found, load in (
            (rows.contains(DIGESTS), lambda into: rows.load(DIGESTS, into)),
            (chunks.contains(CHUNKS), lambda into: chunks.load(CHUNKS, into)),
        ):
            buffers = [np.zeros(SIZE, np.uint8) for _ in range(5)]
            delivered = load(buffers)
            assert all(here for here, listed in zip(delivered, found, strict=True) if listed)
            assert all(np.array_equal(a, b) for a, b, here in zip(payloads(), buffers, delivered, strict=True) if here)
            counts.append(sum(found))
        chunks.close()
    return counts[0], counts[1]


async def replicate(folder: Path) -> None:
    topology = folder / "regions.toml"
    topology.write_text(
        f'mode = "enforce"\n[regions.na]\nurl = "file://{folder}/na"\npublic_key = "{public_text(KEY.public_key())}"\n'
        f'[regions.eu]\nurl = "file://{folder}/eu"\n[[flows]]\nfrom = "na"\nto = ["eu"]\n'
    )
    async with Links.open([ObjectSettings(url=f"file://{folder}/na")]) as bucket:
        await publish(Contents(bucket), "na", KEY)
    async with Replicator.open(load_topology(topology), "eu") as replicator:
        assert (await replicator.cycle()).problems == {}


def test_another_node_and_another_region_have_it_and_a_new_node_is_warmed_with_it(folder: Path) -> None:
    with node(folder, "na") as first:
        save(first)
        with node(folder, "na", 1) as second:
            wait_for(lambda: loaded(second) == (5, 5))  # from the bucket that both share, once it was asked
    with node(folder, "eu") as far:
        assert loaded(far) == (0, 0)
    asyncio.run(replicate(folder))
    with node(folder, "eu", 1) as new:
        bucket = f"object.url=file://{folder}/eu"
        place = f"node.directory={new.config.node.directory}"
        command = ["warm", "--socket", str(new.socket), "--set", place, "--set", bucket, "--json"]
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 0, result.output
        assert json.loads(result.stdout)["ready"] == 1.0
        with PatientClient(new.socket) as client:
            tiers = {tier["medium"]: tier["blocks"] for tier in client.call("status")["tiers"]}
        assert tiers["disk"] == 10, "before any engine asked"
        assert loaded(new) == (5, 5)
