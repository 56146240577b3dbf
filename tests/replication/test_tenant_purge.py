"""Several tenants on one node with a bucket: apart there too, and a purge is proved node by node and region by region."""

from __future__ import annotations

import asyncio
import json
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kvstore.assembly import object_settings
from kvstore.cli import app
from kvstore.config import load
from kvstore.encryption import new_key
from kvstore.identity import BlockKey
from kvstore.testing.admin import RunningApi
from kvstore.testing.node import RunningNode, wait_for
from kvstore.testing.tenants import TenantSite, keys_of, loaded, prompt_of, save, tenant_site
from kvstore.tiers.object.names import hotness_name, receipt_name, tombstone_name
from kvstore.tiers.object.objects import Objects
from kvstore.tombstones import Tombstone
from replication import receipts
from replication.receipts import Proof, prove
from replication.site import Site
from replication.topology import Topology

PROMPT = prompt_of(4)


@contextmanager
def two_nodes(*settings: str) -> Iterator[tuple[TenantSite, TenantSite, list[str]]]:
    """Sites of one bucket and one catalog, with the same two tenants, and the settings of that."""
    with tempfile.TemporaryDirectory(prefix="kvb-") as name, ExitStack() as stack:
        (Path(name) / "bucket").mkdir()
        region = [f"object.url=file://{name}/bucket", f"catalog.url=sqlite://{name}/catalog.db", *settings]
        sites = [stack.enter_context(tenant_site(overrides=tuple(region))) for _ in range(2)]
        for tenant in ("acme", "globex"):
            made, sites[0].tokens[tenant] = sites[0].book.create(tenant)
            _, sites[1].tokens[tenant] = sites[1].book.create(tenant, secret=made.secret_bytes())
        yield sites[0], sites[1], region


def save_everywhere(site: TenantSite, node: RunningNode, tenant: str, fill: int) -> list[BlockKey]:
    with site.engine(tenant) as engine:
        keys = save(engine, PROMPT, fill)
    with site.operator(node) as operator:
        assert operator.call("drain", timeout=50.0)["drained"]
    return keys


def test_in_the_bucket_tenants_are_apart_and_each_meets_its_own_of_other_nodes() -> None:
    with two_nodes() as (here, there, _), here.running() as one, there.running():
        theirs, ours = (save_everywhere(here, one, tenant, fill) for tenant, fill in (("acme", 3), ("globex", 4)))
        with there.engine("acme") as acme, there.engine("globex") as globex:
            assert (keys_of(acme, PROMPT), keys_of(globex, PROMPT)) == (theirs, ours)
            wait_for(lambda: acme.lookup(theirs).blocks == 4)
            wait_for(lambda: globex.lookup(ours).blocks == 4)
            assert (loaded(acme, theirs), loaded(globex, ours)) == ([3] * 4, [4] * 4)
            assert globex.lookup(theirs).blocks == 0
            assert loaded(globex, theirs) == []
            assert {b["key"] for b in globex.call("list", medium="object", limit=100)["blocks"]} == set(ours)
            assert globex.call("delete", keys=b"".join(theirs))["deleted"]["object"] == 0


def test_each_tenants_blocks_are_encrypted_with_its_key_and_operators_may_verify_them_all() -> None:
    with two_nodes(f"encryption.keys={new_key()}") as (here, _, _), here.running() as node:
        theirs = save_everywhere(here, node, "acme", 5)
        with here.operator(node) as operator, here.engine("acme") as acme:
            for medium in ("disk", "object"):
                checked = operator.call("verify", 30.0, medium=medium, limit=100)
                assert checked["bad"] == []
            assert operator.call("verify", 30.0, medium="disk", limit=100)["checked"] == 4
            operator.call("evict", keys=b"".join(theirs), medium="host")
            keys_of(acme, PROMPT)
            assert loaded(acme, theirs) == [5] * 4


def test_a_purged_tenant_is_gone_from_every_node_and_each_confirms_it() -> None:
    with two_nodes() as (here, there, region), here.running() as one, there.running() as other:
        theirs, ours = (save_everywhere(here, one, tenant, fill) for tenant, fill in (("acme", 3), ("globex", 4)))
        with there.engine("acme") as acme:  # so that the other node has them in memory and on disk
            keys_of(acme, PROMPT)
            wait_for(lambda: loaded(acme, theirs) == [3] * 4)
        with RunningApi(here.folder, *region, f"tenants.book={here.folder / 'tenants.json'}") as api:
            done = CliRunner().invoke(app, ["tenants", "purge", "acme", "--yes", "--api", api.url, "--json"])
            assert done.exit_code == 0, done.output
            shown = json.loads(done.stdout)
            assert shown["left"] == {"host": 0, "disk": 0}
            (proof,) = shown["proof"]["regions"].values()
            assert (proof["known"], proof["left"], proof["waiting"]) == (True, 0, [])
            assert len({receipt["node"] for receipt in proof["receipts"]}) == 2
            again = CliRunner().invoke(
                app, ["tenants", "proof", shown["proof"]["tombstone"], "--api", api.url, "--json"]
            )
            assert (again.exit_code, json.loads(again.stdout)["tenant"]) == (0, "acme")
            read = CliRunner().invoke(app, ["tenants", "proof", shown["proof"]["tombstone"], "--api", api.url])
            assert "done everywhere" in read.stdout
            assert CliRunner().invoke(app, ["tenants", "proof", "0" * 32, "--api", api.url]).exit_code == 1
        for site, node in ((here, one), (there, other)):
            with site.engine("acme") as acme, site.engine("globex") as globex, site.operator(node) as operator:
                assert loaded(acme, theirs) == []
                assert {tier["blocks"] for tier in acme.call("status")["tiers"]} == {0}
                keys_of(globex, PROMPT)
                assert loaded(globex, ours) == [4] * 4
                assert operator.call("tenants")
        with here.engine("acme") as acme:
            assert save(acme, PROMPT, 6) == theirs, "what is computed anew lives"


def test_without_a_receipt_or_with_blocks_left_there_is_no_proof() -> None:
    """No node runs: a tombstone alone proves nothing."""
    with two_nodes() as (here, _, _):
        with here.running() as node:
            save_everywhere(here, node, "acme", 3)
            site = Site(node.config)
        stone = Tombstone(time=4e9, tenant="acme")

        asyncio.run(bury(node, stone))
        found = proved(site, stone)
        (region,) = found.regions.values()
        assert (region.known, region.left, region.receipts, region.done) == (True, 4, (), False)
        assert not found.done
        assert asyncio.run(prove(site, "0" * 32)) is None


def test_a_node_that_reports_and_has_not_confirmed_is_waited_for(tmp_path: Path) -> None:
    """There is no catalog: the bucket tells which nodes live."""
    (tmp_path / "bucket").mkdir()
    url = f"file://{tmp_path}/bucket"
    site = Site(load(None, [f"object.url={url}"], environ={}).config)
    stone = Tombstone(time=1.0, tenant="acme")

    async def put(name: str, body: bytes) -> None:
        objects = await asyncio.to_thread(Objects.connect, object_settings(site.config))
        await objects.put(name, body, create=True)
        await objects.close()

    asyncio.run(put(tombstone_name(stone.identity), stone.to_json().encode()))
    assert proved(site, stone).done
    asyncio.run(put(hotness_name("gpu-7"), b""))
    assert proved(site, stone).regions["local"].waiting == ("gpu-7",)
    assert not proved(site, stone).done
    receipt = {"node": "gpu-7", "time": 2.0, "blocks": 1}
    asyncio.run(put(receipt_name(stone.identity, "gpu-7"), json.dumps(receipt).encode()))
    assert proved(site, stone).done


def test_a_region_that_does_not_answer_is_named_and_not_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(receipts, "PATIENCE_SECONDS", 0.1)
    with two_nodes() as (here, _, _), here.running() as node:
        regions = {
            "near": {"url": node.config.object.url},
            "far": {"url": "s3://gone-from-here/x", "endpoints": ["http://127.0.0.1:9"]},
        }
        site = Site(node.config, Topology.model_validate({"regions": regions}), "near")
        stone = Tombstone(time=1.0, tenant="acme")
        asyncio.run(bury(node, stone))
        found = proved(site, stone)
        assert found.regions["near"].known
        assert found.regions["far"].problem
        assert (found.regions["far"].done, found.done) == (False, False)


def proved(site: Site, stone: Tombstone) -> Proof:
    found = asyncio.run(prove(site, stone.identity))
    assert found is not None
    return found


async def bury(node: RunningNode, stone: Tombstone) -> None:
    objects = await asyncio.to_thread(Objects.connect, object_settings(node.config))
    await objects.put(tombstone_name(stone.identity), stone.to_json().encode(), create=True)
    await objects.close()
