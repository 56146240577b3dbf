"""A node that reads other regions: what only they have is delivered, kept here, and never in an engine's way."""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import obstore
import pytest
from region_cases import LLAMA, PAYLOAD_BYTES, stored
from region_pair import Pair
from test_remote_tier import NOTHING_AHEAD, offer

from kvstore.encryption import new_key
from kvstore.identity import BlockKey
from kvstore.node.api import About, Miss
from kvstore.testing.blocks import SealedBlock
from kvstore.testing.node import PatientClient, RunningNode, wait_for
from kvstore.testing.tenants import TenantSite, loaded, prompt_of, save, tenant_site
from kvstore.testing.tenants import keys_of as tenant_keys
from kvstore.tiers.base import Medium
from kvstore.tiers.object import ObjectSettings
from kvstore.tiers.object.names import block_name
from kvstore.tiers.object.objects import Objects

pytestmark = pytest.mark.s3

PATIENCE = 50.0


def bucket_of(place: ObjectSettings) -> list[str]:
    return [
        f"object.url={place.url}", f"object.endpoint={place.endpoint}", f"object.region={place.region}",
        f"object.access_key_id={place.access_key_id}", f"object.secret_access_key={place.secret_access_key}",
    ]  # fmt: skip


@contextmanager
def node_in_eu(pair: Pair, folder: Path, *settings: str) -> Iterator[PatientClient]:
    region = ["region.name=eu", f"region.topology={pair.file}", "remote.mode=enforce"]
    with RunningNode(folder, *bucket_of(pair.eu), *region, *settings) as node, PatientClient(node.socket) as client:
        client.open_namespace(LLAMA, PAYLOAD_BYTES)
        yield client


def keys_of(blocks: list[SealedBlock]) -> list[BlockKey]:
    return [block.key for block in blocks]


def runs(client: PatientClient, keys: list[BlockKey]) -> dict[Medium, int]:
    return dict(client.lookup(keys).runs)


def counters(client: PatientClient) -> dict[str, float]:
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
        assert client.call("drain", timeout=PATIENCE)["drained"]
        assert runs(client, keys) == {Medium.HOST: 4}
        assert counters(client)["kvstore_remote_bytes_total{region=na}"] == sum(b.header.envelope_bytes for b in sealed)
        assert counters(client)["kvstore_delivered_blocks_total{tier=remote}"] == 4
    kept = stored(pair.eu)
    assert kept == {block.key: bytes(block.envelope) for block in sealed}, "the next reader needs no WAN"


async def test_observe_counts_and_loads_nothing(pair: Pair, random_source: random.Random, tmp_path: Path) -> None:
    sealed = await offer(pair, random_source)
    keys = keys_of(sealed)
    with node_in_eu(pair, tmp_path, "remote.mode=observe") as client:
        name = "kvstore_observed_tokens_total{tier=remote}"

        def counted() -> bool:
            about = About(request=f"request-{time.monotonic()}")
            assert client.lookup(keys, about=about).blocks == 0
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
        wait_for(lambda: client.acquire(keys, 0.2).miss in (Miss.UNAVAILABLE, Miss.NOT_STORED))  # the breaker is open
        pair.link.heal()
        pair.link.reset()
        wait_for(lambda: bool(runs(client, keys)) and not client.acquire(keys, PATIENCE).miss)


async def test_each_tenant_reads_its_own_blocks_encrypted_as_they_are(pair: Pair) -> None:
    keys = f"encryption.keys={new_key()}"
    with tenant_site("acme", "bank", overrides=(*bucket_of(pair.na), keys)) as site:
        with site.running(), site.engine("acme") as acme, site.engine("bank") as bank:
            for client, fill in ((acme, 1), (bank, 2)):
                assert len(save(client, prompt_of(3), fill, Medium.OBJECT)) == 3
        topology = pair.write(flow=NOTHING_AHEAD, rules='[[residency]]\ntenants = ["bank"]\nallowed = ["US"]')
        await pair.publish()
        await pair.cycle(topology)
        settings = (*bucket_of(pair.eu), "region.name=eu", f"region.topology={pair.file}", "remote.mode=enforce", keys)
        there = TenantSite(site.folder / "eu", settings, site.tokens)
        there.folder.mkdir()
        shutil.copy(site.folder / "tenants.json", there.folder)
        with there.running(), there.engine("acme") as acme, there.engine("bank") as bank:
            theirs, own = tenant_keys(acme, prompt_of(3)), tenant_keys(bank, prompt_of(3))
            wait_for(lambda: runs(acme, theirs) == {Medium.REMOTE: 3})
            assert runs(bank, theirs) == runs(bank, own) == {}
            assert loaded(bank, theirs) == []
            assert loaded(acme, theirs) == [1, 1, 1]
