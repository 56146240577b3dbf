"""The tier that reads other regions: what it offers, what it delivers, and what it refuses, over two real S3 servers."""

from __future__ import annotations

import dataclasses
import random
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import obstore
import pytest
from prometheus_client import CollectorRegistry
from region_cases import KEY, LLAMA, chain, hot, manifest_of, store, stored
from region_pair import Pair

from kvstore.config import Config, load
from kvstore.errors import BlockCorrupt, BlockNotFound, BlockTooLarge, ConfigError
from kvstore.testing.blocks import SealedBlock, aligned_buffer
from kvstore.tiers.base import Medium, PutResult
from kvstore.tiers.object.names import block_name, tombstone_name
from kvstore.tiers.object.objects import Objects
from kvstore.tombstones import Tombstone
from replication.links import Links
from replication.names import manifest_name
from replication.pause import pause
from replication.remote import Regions, RemoteTier

pytestmark = pytest.mark.s3

NOTHING_AHEAD = "max_bytes = 0"
"""Manifests are pulled, and no block is sent ahead."""


def config_of(pair: Pair, *settings: str) -> Config:
    bucket = [
        f"object.url={pair.eu.url}", f"object.endpoint={pair.eu.endpoint}", f"object.region={pair.eu.region}",
        f"object.access_key_id={pair.eu.access_key_id}", f"object.secret_access_key={pair.eu.secret_access_key}",
    ]  # fmt: skip
    region = ["region.name=eu", f"region.topology={pair.file}", "remote.mode=enforce"]
    return load(None, [*bucket, *region, *settings], environ={}).config


@asynccontextmanager
async def opened(
    pair: Pair, *settings: str, tenant: str = "default", registry: CollectorRegistry | None = None
) -> AsyncIterator[tuple[Regions, RemoteTier]]:
    regions = await Regions.open(config_of(pair, *settings), registry or CollectorRegistry())
    tier = regions.tier(tenant)
    try:
        await regions.refresh()
        yield regions, tier
    finally:
        await tier.close()


async def offer(
    pair: Pair, source: random.Random, blocks: int = 4, flow: str = NOTHING_AHEAD, rules: str = ""
) -> list[SealedBlock]:
    """na has a chain, and eu has its manifest."""
    sealed = chain(source, blocks)
    store(pair.na, sealed)
    topology = pair.write(flow=NOTHING_AHEAD)
    await pair.publish()
    await pair.cycle(topology)
    assert not stored(pair.eu)
    pair.write(flow=flow, rules=rules)
    return sealed


def buffer_for(block: SealedBlock) -> memoryview:
    return aligned_buffer(block.header.envelope_bytes)


async def test_what_was_published_is_read_and_counted(pair: Pair, random_source: random.Random) -> None:
    sealed = await offer(pair, random_source)
    registry = CollectorRegistry()
    async with opened(pair, registry=registry) as (_, tier):
        assert set(tier.keys()) == {block.key for block in sealed}
        nbytes = sum(block.header.envelope_bytes for block in sealed)
        stats = tier.stats()
        assert (stats.medium, stats.blocks, stats.used_bytes, stats.capacity_bytes) == (Medium.REMOTE, 4, nbytes, None)
        for block in sealed:
            stat, into = tier.stat(block.key), buffer_for(block)
            assert stat is not None
            assert (stat.length, stat.namespace, stat.parent) == (
                block.header.length, block.header.namespace, block.header.parent,
            )  # fmt: skip
            assert await tier.get(block.key, into) == block.header
            assert into == block.envelope
        assert registry.get_sample_value("kvstore_remote_bytes_total", {"region": "na"}) == nbytes
        assert await tier.put(sealed[0].header, sealed[0].envelope) is PutResult.REFUSED
        with pytest.raises(BlockTooLarge):
            await tier.get(sealed[0].key, aligned_buffer(4096))
        assert await tier.delete([sealed[0].key]) == 1
        with pytest.raises(BlockNotFound):
            await tier.get(sealed[0].key, into)
        assert tier.stats().used_bytes == nbytes - sealed[0].header.envelope_bytes
    assert len(stored(pair.na)) == 4, "deleting forgets"


async def test_what_is_damaged_or_gone_there_is_forgotten_until_it_is_stored_anew(
    pair: Pair, random_source: random.Random
) -> None:
    bad, gone, large, sound = sealed = await offer(pair, random_source)
    bucket = Objects.connect(pair.na).store
    body = bytearray(bad.envelope)
    body[5000] ^= 1
    obstore.put(bucket, block_name(LLAMA.digest, bad.key), bytes(body))
    obstore.delete(bucket, block_name(LLAMA.digest, gone.key))
    obstore.put(bucket, block_name(LLAMA.digest, large.key), bytes(large.envelope) + bytes(4096))
    async with opened(pair) as (regions, tier):
        for block, error in ((bad, BlockCorrupt), (gone, BlockNotFound), (large, BlockCorrupt)):
            with pytest.raises(error):
                await tier.get(block.key, buffer_for(block))
        assert set(tier.keys()) == {sound.key}
        assert tier.stats().quarantined == 2
        assert len(stored(pair.na)) == 3, "nothing is deleted or set aside there"
        await keep(pair, sealed, sequence=2)
        await regions.refresh()
        assert set(tier.keys()) == {sound.key}, "they are known to be wrong"
        healed = dataclasses.replace(bad.header, created=bad.header.created + 60)
        healed.pack_into(bad.envelope)
        anew = SealedBlock(healed, bad.envelope)
        store(pair.na, [anew])
        await keep(pair, [anew, gone, large, sound], sequence=3)
        await regions.refresh()
        assert set(tier.keys()) == {bad.key, sound.key}
        assert await tier.get(bad.key, buffer_for(bad)) == healed


async def keep(pair: Pair, blocks: Sequence[SealedBlock], sequence: int) -> None:
    """Have eu know a later manifest of na."""
    async with Links.open([pair.eu]) as bucket:
        sealed = manifest_of(hot(blocks), sequence=sequence).sealed(KEY)
        await bucket.put(manifest_name("na"), sealed, create=False)


async def test_rules_of_flows_and_residency_hold(pair: Pair, random_source: random.Random) -> None:
    sealed = await offer(pair, random_source)
    for flow, rules in (
        ('models = ["other-*"]', ""),
        ('tenants = ["other"]', ""),
        ("min_score = 1e9", ""),
        ("price_per_gb = 0.02\nmoney_per_month = 0", ""),
        ("", '[[residency]]\nmodels = ["llama"]\nallowed = ["US"]'),
        ("", '[[residency]]\ntenants = ["def*"]\nforbidden = ["eu"]'),
    ):
        pair.write(flow=flow, rules=rules)
        async with opened(pair) as (_, tier):
            assert not tier.keys(), (flow, rules)
            with pytest.raises(BlockNotFound):
                await tier.get(sealed[0].key, buffer_for(sealed[0]))
    pair.write(flow="price_per_gb = 0.02", rules='[[residency]]\nmodels = ["llama"]\nallowed = ["DE"]')
    async with opened(pair) as (_, tier):
        assert len(tier.keys()) == len(sealed)


async def test_one_tenant_is_not_offered_what_another_has(pair: Pair, random_source: random.Random) -> None:
    sealed = await offer(pair, random_source)
    async with opened(pair, tenant="somebody") as (regions, tier):
        assert not tier.keys()
        other = regions.tier("default")
        await regions.refresh()
        assert len(other.keys()) == len(sealed)
        assert not tier.keys()
        await other.close()
        await regions.refresh()


async def test_a_pause_and_tombstones_are_heeded(pair: Pair, random_source: random.Random) -> None:
    sealed = await offer(pair, random_source)
    async with opened(pair) as (regions, tier), Links.open([pair.eu]) as bucket:
        await bury(bucket, Tombstone(time=sealed[0].header.created + 60, prefix=sealed[2].key))
        await regions.refresh()
        assert set(tier.keys()) == {block.key for block in sealed[:2]}
        await bury(bucket, Tombstone(time=sealed[0].header.created - 60, model="llama"))
        await regions.refresh()
        assert len(tier.keys()) == 2, "computed after that purge"
        await pause(bucket, ["na"], "somebody")
        await regions.refresh()
        assert not tier.keys()


async def bury(bucket: Links, stone: Tombstone) -> None:
    await bucket.put(tombstone_name(stone.identity), stone.to_json().encode(), create=True)


async def test_a_region_that_does_not_answer_is_not_offered(pair: Pair, random_source: random.Random) -> None:
    await offer(pair, random_source)
    pair.file.write_text(pair.file.read_text().replace(pair.link.endpoint, "http://127.0.0.1:1"))
    async with opened(pair) as (_, tier):
        assert not tier.keys()


async def test_what_cannot_be_is_said_at_the_start(pair: Pair) -> None:
    pair.write()
    for settings, problem in (
        (["region.name=mars"], "no such region"),
        (["region.name=na", f"object.url={pair.na.url}"], "no flow"),
        (["object.url=s3://elsewhere/prod"], "the topology has"),
    ):
        with pytest.raises(ConfigError, match=problem):
            await Regions.open(config_of(pair, *settings), CollectorRegistry())
    with pytest.raises(ConfigError, match=r"object\.url, region\.name and region\.topology"):
        load(None, ["remote.mode=observe"], environ={})


async def test_a_flow_is_no_faster_than_it_may_be(pair: Pair, random_source: random.Random) -> None:
    sealed = await offer(pair, random_source)
    for flow, settings in (("bytes_per_second = 200000", []), ("", ["remote.bytes_per_second=200000"])):
        pair.write(flow=flow)
        async with opened(pair, *settings) as (_, tier):
            started = time.monotonic()
            for block in sealed:
                await tier.get(block.key, buffer_for(block))
            assert time.monotonic() - started > 0.1, "three blocks' worth of bytes, less than one of it saved up"
