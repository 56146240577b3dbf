"""A node that reads other regions: what only they have is delivered, kept here, and never in an engine's way."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import obstore
import pytest
from conftest import Pair
from region_cases import LLAMA, PAYLOAD_BYTES, stored
from test_remote_tier import offer

from kvstore.identity import BlockKey
from kvstore.node.api import About, Miss, NewBlock
from kvstore.node.client import Client
from kvstore.testing.blocks import SealedBlock
from kvstore.testing.node import RunningNode, wait_for
from kvstore.tiers.base import Medium
from kvstore.tiers.object.names import block_name
from kvstore.tiers.object.objects import Objects

pytestmark = pytest.mark.s3

PATIENCE = 10.0


@contextmanager
def node_in_eu(pair: Pair, folder: Path, *settings: str) -> Iterator[Client]:
    bucket = [
        f"object.url={pair.eu.url}", f"object.endpoint={pair.eu.endpoint}", f"object.region={pair.eu.region}",
        f"object.access_key_id={pair.eu.access_key_id}", f"object.secret_access_key={pair.eu.secret_access_key}",
    ]  # fmt: skip
    region = ["region.name=eu", f"region.topology={pair.file}", "remote.mode=enforce"]
    with RunningNode(folder, *bucket, *region, *settings) as node, Client(node.socket) as client:
        client.open_namespace(LLAMA, PAYLOAD_BYTES)
        yield client


def keys_of(blocks: list[SealedBlock]) -> list[BlockKey]:
    return [block.key for block in blocks]


def runs(client: Client, keys: list[BlockKey]) -> dict[Medium, int]:
    return dict(client.lookup(keys, timeout=PATIENCE).runs)


def counters(client: Client) -> dict[str, float]:
    found: dict[str, float] = client.call("status")["counters"]
    return found


async def test_what_only_another_region_has_is_delivered_and_then_kept_here(
    pair: Pair, random_source: random.Random, tmp_path: Path
) -> None:
    sealed = await offer(pair, random_source)
    keys = keys_of(sealed)
    with node_in_eu(pair, tmp_path, "policy.admission=enforce") as client:
        wait_for(lambda: runs(client, keys) == {Medium.REMOTE: 4})
        acquired = client.acquire(keys, PATIENCE)
        assert acquired.media == (Medium.REMOTE,) * 4
        for block, offset in zip(sealed, acquired.offsets, strict=True):
            assert bytes(acquired.arena.slot(offset, PAYLOAD_BYTES)) == block.payload
        client.release(keys)
        client.call("drain", timeout=PATIENCE)
        assert runs(client, keys) == {Medium.HOST: 4}
        assert counters(client)["kvstore_remote_bytes_total{region=na}"] == sum(b.header.envelope_bytes for b in sealed)
        assert counters(client)["kvstore_delivered_blocks_total{tier=remote}"] == 4
    kept = stored(pair.eu)
    assert kept == {block.key: bytes(block.envelope) for block in sealed}, "the next reader needs no WAN"


async def test_saving_what_only_another_region_has(pair: Pair, random_source: random.Random, tmp_path: Path) -> None:
    sealed = await offer(pair, random_source, 2)
    keys = keys_of(sealed)
    with node_in_eu(pair, tmp_path) as client:
        wait_for(lambda: bool(runs(client, keys)))
        reserved = client.reserve(LLAMA, [NewBlock(b.key, b.header.parent, b.header.index) for b in sealed])
        assert Miss.PRESENT not in reserved.misses
        for offset in reserved.offsets:
            assert offset is not None
            reserved.arena.slot(offset, PAYLOAD_BYTES)[:] = bytes(PAYLOAD_BYTES)
        assert set(client.commit(keys, durable=Medium.OBJECT)) == set(keys)
    assert stored(pair.eu).keys() == set(keys)


async def test_observe_counts_and_loads_nothing(pair: Pair, random_source: random.Random, tmp_path: Path) -> None:
    sealed = await offer(pair, random_source)
    keys = keys_of(sealed)
    with node_in_eu(pair, tmp_path, "remote.mode=observe") as client:
        name = "kvstore_observed_tokens_total{tier=remote}"

        def counted() -> bool:
            about = About(request=f"request-{time.monotonic()}")
            assert client.lookup(keys, timeout=PATIENCE, about=about).blocks == 0
            return counters(client).get(name, 0.0) > 0

        wait_for(counted)
        assert counters(client)[name] % (4 * LLAMA.block_tokens) == 0
        assert client.acquire(keys, PATIENCE).miss is Miss.NOT_STORED
        assert "kvstore_remote_bytes_total{region=na}" not in counters(client)
    assert not stored(pair.eu)


async def test_damage_and_loss_there_are_misses_here(pair: Pair, random_source: random.Random, tmp_path: Path) -> None:
    sealed = await offer(pair, random_source)
    keys = keys_of(sealed)
    bucket = Objects.connect(pair.na).store
    body = bytearray(sealed[1].envelope)
    body[5000] ^= 1
    obstore.put(bucket, block_name(LLAMA.digest, keys[1]), bytes(body))
    obstore.delete(bucket, block_name(LLAMA.digest, keys[3]))
    with node_in_eu(pair, tmp_path) as client:
        wait_for(lambda: runs(client, keys) == {Medium.REMOTE: 4})
        acquired = client.acquire(keys, PATIENCE)
        assert (len(acquired.offsets), acquired.miss) == (1, Miss.CORRUPT)
        assert runs(client, keys) == {Medium.HOST: 1}
        assert client.acquire(keys[3:], PATIENCE).miss is Miss.NOT_STORED
        (bad,) = client.call("status")["bad_blocks"]
        assert (bad["key"], bad["tier"]) == (keys[1], "remote")


async def test_a_cut_link_costs_a_miss_at_the_deadline_and_then_nothing(
    pair: Pair, random_source: random.Random, tmp_path: Path
) -> None:
    sealed = await offer(pair, random_source)
    keys = keys_of(sealed)
    with node_in_eu(pair, tmp_path) as client:
        wait_for(lambda: bool(runs(client, keys)))
        pair.link.cut()
        assert client.acquire(keys, 0.2).miss is Miss.DEADLINE
        wait_for(lambda: not runs(client, keys))  # the breaker opens once requests are given up
        assert client.acquire(keys, 0.2).miss in (Miss.UNAVAILABLE, Miss.NOT_STORED)
        pair.link.heal()
        pair.link.reset()
        wait_for(lambda: bool(runs(client, keys)) and not client.acquire(keys, PATIENCE).miss)
