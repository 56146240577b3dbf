"""What may be read of other regions, against the rules that replication goes by."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from hypothesis import given, settings
from hypothesis import strategies as st
from region_cases import EU_KEY, KEY

from kvstore.identity import NO_PARENT, BlockKey
from kvstore.tombstones import Tombstone, buried
from replication.keys import public_text
from replication.manifest import HotBlock, Label, Manifest, Table, open_table
from replication.remoteindex import Offer, compile_offer
from replication.topology import Topology

LABELS = [Label(bytes([number]) * 16, f"model-{number % 2}", f"tenant-{number // 2}", 16) for number in range(4)]


def key(number: int) -> BlockKey:
    return BlockKey(hashlib.blake2b(bytes([number]), digest_size=16).digest())


@st.composite
def manifests(draw: st.DrawFn, region: str = "na") -> Manifest:
    """Trees of blocks, each tree in one namespace."""
    blocks: list[HotBlock] = []
    for number in range(draw(st.integers(0, 12))):
        above = draw(st.sampled_from([None, *blocks]))
        namespace = above.namespace if above else draw(st.sampled_from(LABELS)).digest
        created, score = float(draw(st.integers(0, 5))), float(draw(st.integers(0, 3)))
        parent = above.key if above else NO_PARENT
        blocks.append(HotBlock(key(number), parent, namespace, 1000 * number, created, score))
    labels = {label.digest: label for label in LABELS}
    return Manifest(region=region, sequence=1, published=1.0, labels=labels, blocks=blocks)


stones = st.builds(
    Tombstone,
    time=st.integers(0, 5).map(float),
    tenant=st.sampled_from(["", "tenant-0"]),
    model=st.sampled_from(["", "model-1"]),
    prefix=st.integers(0, 12).map(key),
) | st.builds(Tombstone, time=st.integers(0, 5).map(float), tenant=st.sampled_from(["tenant-0", "tenant-1"]))


def table(manifest: Manifest) -> Table:
    return open_table(manifest.sealed(KEY), manifest.region, KEY.public_key())


def offered(tables: Sequence[Table], rules: Topology, tenants: Sequence[str], dead: Sequence[Tombstone] = ()) -> Offer:
    return compile_offer(tables, rules, "eu", tenants, dead, list(rules.flows_to("eu")))


def topology(**more: object) -> Topology:
    public = public_text(EU_KEY.public_key())
    regions = {
        name: {"url": f"s3://kv-{name}/p", "public_key": public, "location": name.upper()}
        for name in ("na", "ap", "eu")
    }
    flows = [{"from": "ap", "to": ["eu"]}, {"from": "na", "to": ["eu"], "models": ["model-1"], "min_score": 2}]
    return Topology.model_validate({"mode": "enforce", "regions": regions, "flows": flows, **more})


@settings(max_examples=40)
@given(manifests("ap"), st.lists(stones, max_size=3))
def test_tombstones_bury_what_they_bury_elsewhere(manifest: Manifest, dead: Sequence[Tombstone]) -> None:
    offer = offered([table(manifest)], topology(), ["tenant-0", "tenant-1"], dead)
    gone = buried(manifest.blocks, manifest.labels, dead)
    for tenant in ("tenant-0", "tenant-1"):
        mine = [b for b in manifest.blocks if manifest.labels[b.namespace].tenant == tenant and b.key not in gone]
        assert offer.keys(tenant) == {block.key for block in mine}
        assert offer.share(tenant).nbytes == sum(block.nbytes for block in mine)
        for block in mine:
            found = offer.find(tenant, block.key)
            assert found is not None
            assert (found.block, found.tokens, found.flow.source) == (block, 16, "ap")


@settings(max_examples=40)
@given(manifests("na"), manifests("ap"))
def test_the_flow_that_is_named_first_brings_a_block(na: Manifest, ap: Manifest) -> None:
    offer = offered([table(na), table(ap)], topology(), ["tenant-0"])
    of_ap = {block.key for block in ap.blocks if ap.labels[block.namespace].tenant == "tenant-0"}
    of_na = {
        block.key for block in na.blocks if na.labels[block.namespace].digest == LABELS[1].digest and block.score >= 2
    }
    assert offer.keys("tenant-0") == of_ap | of_na
    for name in offer.keys("tenant-0"):
        found = offer.find("tenant-0", name)
        assert found is not None
        assert found.flow.source == ("ap" if name in of_ap else "na")


@settings(max_examples=40)
@given(manifests("ap"))
def test_residency_forbids(manifest: Manifest) -> None:
    strict = topology(residency=[{"models": ["model-0"], "forbidden": ["EU"]}])
    offer = offered([table(manifest)], strict, ["tenant-1"])
    allowed = {block.key for block in manifest.blocks if block.namespace == LABELS[3].digest}
    assert offer.keys("tenant-1") == allowed
    gone = offer.forget("tenant-1", list(allowed)[:1])
    assert offer.keys("tenant-1") == allowed - gone.keys()
    assert offer.share("tenant-1").nbytes == sum(b.nbytes for b in manifest.blocks if b.key in allowed - gone.keys())
