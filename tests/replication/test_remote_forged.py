"""Who can write to a bucket cannot make a node that reads other regions take one block for another."""

from __future__ import annotations

import dataclasses
import random

import obstore
import pytest
from prometheus_client import CollectorRegistry
from region_cases import EU_KEY, KEY, LLAMA, hot, manifest_of
from region_pair import Pair
from test_remote_tier import buffer_for, offer, opened

from kvstore.errors import BlockCorrupt, BlockNotFound
from kvstore.identity import BlockKey
from kvstore.testing.blocks import aligned_buffer
from kvstore.tiers.object.names import block_name
from kvstore.tiers.object.objects import Objects
from replication.links import Links
from replication.manifest import MAX_MANIFEST_BYTES
from replication.names import manifest_name

pytestmark = pytest.mark.s3


async def test_a_sound_block_under_anothers_name_is_not_taken_for_it(pair: Pair, random_source: random.Random) -> None:
    """Its checksums are good, and so is its length: what is in its header speaks against it."""
    wanted, other = await offer(pair, random_source, blocks=2)
    bucket = Objects.connect(pair.na).store
    obstore.put(bucket, block_name(LLAMA.digest, wanted.key), bytes(other.envelope))
    async with opened(pair) as (_, tier):
        with pytest.raises(BlockCorrupt):
            await tier.get(wanted.key, buffer_for(wanted))
        assert set(tier.keys()) == {other.key}
        assert tier.stats().quarantined == 1


async def keep(pair: Pair, raw: bytes) -> None:
    """Put bytes where eu keeps na's manifest."""
    async with Links.open([pair.eu]) as bucket:
        await bucket.put(manifest_name("na"), raw, create=False)


async def test_a_manifest_that_na_did_not_sign_offers_nothing(pair: Pair, random_source: random.Random) -> None:
    """Whoever can write to eu's own bucket can put one there."""
    sealed = await offer(pair, random_source, blocks=3)
    sound = manifest_of(hot(sealed), sequence=9).sealed(KEY)
    spoiled = {
        "forged": manifest_of(hot(sealed), sequence=9).sealed(EU_KEY),
        "misplaced": manifest_of(hot(sealed), "eu", sequence=9).sealed(KEY),
        "truncated": sound[:-1],
        "oversize": sound + bytes(MAX_MANIFEST_BYTES),
    }
    registry = CollectorRegistry()
    async with opened(pair, registry=registry) as (regions, tier):
        for reason, raw in spoiled.items():
            assert len(tier.keys()) == 3
            await keep(pair, raw)
            await regions.refresh()
            assert not tier.keys()
            labels = {"region": "na", "reason": reason}
            assert registry.get_sample_value("kvstore_remote_refused_manifests_total", labels) == 1
            with pytest.raises(BlockNotFound):
                await tier.get(sealed[0].key, buffer_for(sealed[0]))
            await keep(pair, sound)
            await regions.refresh()
        await tier.get(sealed[0].key, buffer_for(sealed[0]))


async def test_what_na_signed_of_blocks_that_it_has_not_brings_no_wrong_block(
    pair: Pair, random_source: random.Random
) -> None:
    """Invented blocks, and sound ones of which it says something else, cost a miss each."""
    sealed = await offer(pair, random_source, blocks=3)
    one, two, _ = hot(sealed)
    lies = [
        dataclasses.replace(one, key=BlockKey(b"\x07" * 16)),
        dataclasses.replace(one, length=one.length + 1),
        dataclasses.replace(two, length=1 << 20),
    ]
    await keep(pair, manifest_of(lies, sequence=9).sealed(KEY))
    async with opened(pair) as (_, tier):
        for lie in lies:
            with pytest.raises((BlockNotFound, BlockCorrupt)):
                await tier.get(lie.key, aligned_buffer(2 << 20))
        assert set(tier.keys()) == set()
