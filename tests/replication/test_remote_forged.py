"""Who can write to a bucket cannot make a node that reads other regions take one block for another."""

from __future__ import annotations

import dataclasses
import random

import obstore
import pytest
from region_cases import KEY, LLAMA, hot, manifest_of
from region_pair import Pair
from test_remote_tier import buffer_for, offer, opened

from kvstore.errors import BlockCorrupt, BlockNotFound
from kvstore.identity import BlockKey
from kvstore.testing.blocks import aligned_buffer
from kvstore.tiers.object.names import block_name
from kvstore.tiers.object.objects import Objects
from replication.links import Links
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


async def test_an_offer_that_was_forged_in_the_own_bucket_brings_no_wrong_block(
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
    async with Links.open([pair.eu]) as bucket:
        await bucket.put(manifest_name("na"), manifest_of(lies, sequence=9).sealed(KEY), create=False)
    async with opened(pair) as (_, tier):
        for lie in lies:
            with pytest.raises((BlockNotFound, BlockCorrupt)):
                await tier.get(lie.key, aligned_buffer(2 << 20))
        assert set(tier.keys()) == set()
