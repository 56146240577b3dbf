"""Quotas of tenants in a region's bucket."""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import obstore
import pytest
from hypothesis import given
from hypothesis import strategies as st
from region_cases import LLAMA, chain, store, stored
from region_pair import Pair

from kvstore.catalog import open_catalog
from kvstore.catalog.base import Entry
from kvstore.config import load
from kvstore.errors import ConfigError
from kvstore.identity import NO_PARENT, BlockKey
from kvstore.testing.blocks import SealedBlock
from kvstore.tiers.object import ObjectSettings
from kvstore.tiers.object.names import block_name, namespace_name
from kvstore.tiers.object.objects import Objects
from replication.contents import Contents
from replication.duties import read_standing
from replication.links import Links
from replication.planner import LeftOut
from replication.quotas import beyond, keep_quotas
from replication.service import Pace, serve
from replication.site import Site

OTHER = replace(LLAMA, tenant="other")
OWNERS = {LLAMA.digest: LLAMA.tenant, OTHER.digest: OTHER.tenant}


def of_other(settings: ObjectSettings, blocks: list[SealedBlock]) -> list[SealedBlock]:
    """The blocks as the other tenant's, in the bucket."""
    bucket, sealed = Objects.connect(settings).store, []
    for block in blocks:
        header = replace(block.header, namespace=OTHER.digest)
        header.pack_into(block.envelope)
        obstore.put(bucket, block_name(OTHER.digest, block.key), bytes(block.envelope))
        sealed.append(SealedBlock(header, block.envelope))
    obstore.put(bucket, namespace_name(OTHER.digest), json.dumps(OTHER.to_dict()).encode())
    return sealed


@given(st.data())
def test_each_tenant_gives_up_its_own_and_just_enough(data: st.DataObject) -> None:
    blocks = []
    for number in range(data.draw(st.integers(0, 30))):
        namespace = data.draw(st.sampled_from([*OWNERS, b"nobody's........"]))
        key = BlockKey(bytes([number + 1]) * 16)
        blocks.append(Entry(key, data.draw(st.integers(1, 30_000)), namespace, 16, 0, NO_PARENT, number))
    quotas = {"default": data.draw(st.integers(1 << 20, 1 << 22)) // 8, "unknown": 1 << 20}
    gone = beyond(blocks, OWNERS, {}, quotas)
    assert {OWNERS.get(entry.namespace) for entry in gone} <= {"default"}
    used = Counter({"default": 0})
    for entry in blocks:
        used[OWNERS.get(entry.namespace, "")] += entry.envelope_bytes
    left = used["default"] - sum(entry.envelope_bytes for entry in gone)
    assert left <= quotas["default"]
    if gone:
        assert left + max(entry.envelope_bytes for entry in gone) > quotas["default"] * 0.8, "not more than it must"


async def test_a_tenant_beyond_its_quota_loses_blocks_and_the_other_none(
    tmp_path: Path, random_source: random.Random
) -> None:
    bucket = ObjectSettings(url=f"file://{tmp_path}/bucket")
    ours, theirs = chain(random_source, 20), chain(random_source, 20)
    store(bucket, ours)
    theirs = of_other(bucket, theirs)
    quotas = {"default": 16 * ours[0].header.envelope_bytes}
    catalog = await open_catalog(f"sqlite://{tmp_path}/catalog.db", bucket.url)
    async with Links.open([bucket]) as link, Contents.open(link, catalog) as contents:
        assert await keep_quotas(contents, quotas, enforce=True) == 0, "not before the catalog covers the bucket"
        await catalog.record({block.key: Entry.of(block.header) for block in [*ours, *theirs]})
        await catalog.complete((await catalog.status()).epoch)
        assert await keep_quotas(contents, quotas, enforce=False) == 6
        assert len(stored(bucket)) == 40, "only counted"
        assert await keep_quotas(contents, quotas, enforce=True) == 6
        assert await keep_quotas(contents, quotas, enforce=True) == 0
    assert stored(bucket).keys() == {block.key for block in [*ours[:14], *theirs]}, "tails first"
    await catalog.close()


@pytest.mark.s3
async def test_replication_does_not_bring_what_a_quota_would_push_out(pair: Pair, random_source: random.Random) -> None:
    blocks = chain(random_source, 120)
    store(pair.na, blocks)
    await pair.publish()
    size = blocks[0].header.envelope_bytes
    topology = pair.write(rules='[[quota]]\ntenant = "default"\nbytes = "1MiB"')
    fits = int((1 << 20) * 7 / 8) // size
    report = (await pair.cycle(topology)).flows[0]
    assert report.plan.left_out[LeftOut.ROOM].blocks == len(blocks) - fits
    assert stored(pair.eu).keys() == {block.key for block in blocks[:fits]}
    assert (await pair.cycle(topology)).flows[0].plan.blocks == [], "at rest"


@pytest.mark.s3
async def test_the_regions_service_keeps_quotas(pair: Pair, tmp_path: Path, random_source: random.Random) -> None:
    blocks = chain(random_source, 120)
    store(pair.eu, blocks)
    topology = pair.write(rules='[[quota]]\ntenant = "default"\nbytes = "1MiB"')
    url = f"sqlite://{tmp_path}/eu.db"
    catalog = await open_catalog(url, pair.eu.url)
    await catalog.record({block.key: Entry.of(block.header) for block in blocks})
    await catalog.complete((await catalog.status()).epoch)
    await catalog.close()
    config = load(None, [f"object.url={pair.eu.url}", f"catalog.url={url}"], environ={}).config
    stop = asyncio.Event()
    service = asyncio.create_task(serve(Site(config, topology, "eu"), None, stop, pace=Pace(quota=0.1)))
    async with Links.open([pair.eu]) as bucket, asyncio.timeout(60):
        while (standing := await read_standing(bucket, "quotas")) is None or not standing.did:
            await asyncio.sleep(0.1)
    stop.set()
    await service
    kept = int((1 << 20) * 7 / 8) // blocks[0].header.envelope_bytes
    assert standing.did == f"evicted {len(blocks) - kept} blocks"
    assert stored(pair.eu).keys() == {block.key for block in blocks[:kept]}


def test_a_tenant_has_one_quota(pair: Pair) -> None:
    quota = '[[quota]]\ntenant = "default"\nbytes = "1MiB"\n'
    with pytest.raises(ConfigError, match="a tenant has two quotas"):
        pair.write(rules=2 * quota)
