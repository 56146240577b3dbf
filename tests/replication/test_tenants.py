"""Tenants side by side in one bucket and one catalog: they share nothing, and one of them can be deleted everywhere."""

from __future__ import annotations

import asyncio
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import obstore
import pytest
from region_pair import Pair
from typer.testing import CliRunner

from kvstore.catalog import open_catalog
from kvstore.cli import app
from kvstore.identity import NO_PARENT, BlockKey, Keyring, Namespace, chain_digests
from kvstore.node.api import NewBlock
from kvstore.testing.node import PatientClient, RunningNode, wait_for
from kvstore.tiers.object import ObjectSettings
from kvstore.tiers.object.names import NAMESPACES, parse_block_name
from kvstore.tiers.object.objects import Objects
from replication.cycle import Cycle
from replication.manifest import Manifest

pytestmark = pytest.mark.s3

BLOCKS = 4
BLOCK_BYTES = 10_000
MODEL = Namespace(
    model="toy", weights="1", dtype="float32", layers=1, kv_heads=1, head_dim=1, attention="gqa", rope="",
    block_tokens=16, layout="opaque:test",
)  # fmt: skip
PROMPT = list(range(BLOCKS * MODEL.block_tokens))
SECRETS = {"acme": "a-secret-of-acme-alone", "globex": "a-secret-of-globex-alone"}


@contextmanager
def node_of(tenant: str, bucket: ObjectSettings, catalog: str, *overrides: str) -> Iterator[PatientClient]:
    """A client of a node of this tenant."""
    settings = [
        f"object.url={bucket.url}", f"object.endpoint={bucket.endpoint}", f"object.access_key_id={bucket.access_key_id}",
        f"object.secret_access_key={bucket.secret_access_key}", f"catalog.url={catalog}", "disk.enabled=false",
        f"identity.tenant={tenant}", f"identity.secret={SECRETS[tenant]}", *overrides,
    ]  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="kvt-") as folder:
        with RunningNode(Path(folder), *settings) as node, PatientClient(node.socket) as client:
            yield client


def keys_of(keyring: Keyring) -> list[BlockKey]:
    return keyring.block_keys(chain_digests(PROMPT, MODEL.block_tokens))


def save(client: PatientClient, claimed_tenant: str = "default") -> list[BlockKey]:
    """Compute the prompt and keep it in the bucket; the keys that had to be computed."""
    namespace = Namespace.from_dict({**MODEL.to_dict(), "tenant": claimed_tenant})
    keys = keys_of(client.open_namespace(namespace, BLOCK_BYTES))
    found = client.lookup(keys).blocks
    blocks = [NewBlock(key, parent, i) for i, (key, parent) in enumerate(zip(keys, [NO_PARENT, *keys], strict=False))]
    reserved = client.reserve(namespace, blocks[found:])
    for offset in reserved.offsets:
        assert offset is not None
        reserved.arena.slot(offset, BLOCK_BYTES)[:] = bytes(BLOCK_BYTES)
    client.commit(keys[found:])
    assert client.call("drain", timeout=50.0)["drained"]
    return keys[found:]


def in_bucket(bucket: ObjectSettings) -> dict[str, set[BlockKey]]:
    """Keys of the blocks that lie there, by tenant, as the bucket itself says."""
    store = Objects.connect(bucket).store
    owners = {}
    for page in obstore.list(store, NAMESPACES):
        for meta in page:
            fields = Namespace.from_dict(json.loads(bytes(obstore.get(store, meta["path"]).bytes())))
            owners[fields.digest] = fields.tenant
    found: dict[str, set[BlockKey]] = {}
    for page in obstore.list(store, "blocks"):
        for meta in page:
            parsed = parse_block_name(meta["path"])
            assert parsed is not None
            found.setdefault(owners[parsed[0]], set()).add(parsed[1])
    return found


def loaded(client: PatientClient, keys: list[BlockKey]) -> int:
    acquired = client.acquire(keys, 10.0)
    client.release(keys[: len(acquired.offsets)])
    return len(acquired.offsets)


async def test_the_same_prompt_of_two_tenants_meets_nowhere(eu: ObjectSettings, tmp_path: Path) -> None:
    """Not in the bucket, not in the catalog, and not in what a lookup answers, which is all that its time could tell of."""
    catalog = f"sqlite://{tmp_path}/catalog.db"
    with node_of("acme", eu, catalog) as acme, node_of("globex", eu, catalog) as globex:
        theirs = save(acme)
        ours = keys_of(globex.open_namespace(MODEL, BLOCK_BYTES))
        index = await open_catalog(catalog, eu.url)
        try:
            assert None not in await index.lookup(theirs)
            assert await index.lookup(ours) == [None] * BLOCKS
        finally:
            await index.close()
        nobodys = [BlockKey(bytes([number]) * 16) for number in range(1, BLOCKS + 1)]
        assert globex.lookup(ours) == globex.lookup(nobodys)
        assert globex.acquire(ours, 5.0) == globex.acquire(nobodys, 5.0)
        assert save(globex) == ours, "nothing of it was there"
        assert in_bucket(eu) == {"acme": set(theirs), "globex": set(ours)}
        assert not set(theirs) & set(ours)


def test_nodes_with_the_name_and_the_secret_of_a_tenant_share_its_blocks(eu: ObjectSettings, tmp_path: Path) -> None:
    catalog = f"sqlite://{tmp_path}/catalog.db"
    with node_of("acme", eu, catalog) as one, node_of("acme", eu, catalog) as other:
        keys = save(one)
        other.open_namespace(MODEL, BLOCK_BYTES)
        wait_for(lambda: other.lookup(keys).blocks == BLOCKS)
        assert loaded(other, keys) == BLOCKS
        assert save(other) == []


def test_a_client_that_names_another_tenant_stays_its_nodes(eu: ObjectSettings, tmp_path: Path) -> None:
    catalog = f"sqlite://{tmp_path}/catalog.db"
    with node_of("acme", eu, catalog) as acme, node_of("globex", eu, catalog) as globex:
        theirs = save(acme)
        ours = save(globex, claimed_tenant="acme")
        assert in_bucket(eu) == {"acme": set(theirs), "globex": set(ours)}


def test_the_keys_of_anothers_blocks_open_and_delete_nothing(eu: ObjectSettings, tmp_path: Path) -> None:
    """They are no secret: whoever may list the bucket has them. Other machines' nodes may be in other hands."""
    catalog = f"sqlite://{tmp_path}/catalog.db"
    with node_of("acme", eu, catalog) as acme, node_of("globex", eu, catalog) as globex:
        theirs = save(acme)
        wait_for(lambda: {b["key"] for b in globex.call("list", medium="object", limit=100)["blocks"]} == set(theirs))
        assert loaded(globex, theirs) == 0
        assert globex.call("delete", keys=b"".join(theirs))["deleted"].get("object", 0) == 0
        (namespace,) = {bytes(b["namespace"]) for b in globex.call("list", medium="object", limit=100)["blocks"]}
        globex.call("delete", namespace=namespace)
        assert in_bucket(eu) == {"acme": set(theirs)}
    with node_of("acme", eu, catalog) as acme:
        acme.open_namespace(MODEL, BLOCK_BYTES)
        wait_for(lambda: loaded(acme, theirs) == BLOCKS)


def test_purging_a_tenant_empties_every_region_of_it_and_leaves_the_other(pair: Pair, tmp_path: Path) -> None:
    catalog = f"sqlite://{tmp_path}/na.db"
    with node_of("acme", pair.na, catalog) as acme, node_of("globex", pair.na, catalog) as globex:
        theirs, ours = set(save(acme)), set(save(globex))
    topology = pair.write()

    async def follow() -> tuple[Manifest, Cycle]:
        return await pair.publish(), await pair.cycle(topology)

    asyncio.run(follow())
    both = {"acme": theirs, "globex": ours}
    assert (in_bucket(pair.na), in_bucket(pair.eu)) == (both, both)

    arguments = ["region", "purge", "-t", str(pair.file), "-r", "na", "--tenant", "acme", "--yes", "--json"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["deleted"] == BLOCKS
    published, cycle = asyncio.run(follow())
    assert {block.key for block in published.blocks} == ours
    assert cycle.buried == BLOCKS
    left = {"globex": ours}
    assert (in_bucket(pair.na), in_bucket(pair.eu)) == (left, left)
