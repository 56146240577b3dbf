"""What a node with several tenants tells its region of what is hot."""

from __future__ import annotations

import asyncio
import random
import time
from dataclasses import replace
from pathlib import Path

import pytest

from kvstore import demand
from kvstore.assembly import node_name
from kvstore.catalog import open_catalog
from kvstore.catalog.hotness import Reporter, reports
from kvstore.identity import BlockKey
from kvstore.tenants.ledger import Ledger
from kvstore.tenants.shared import Shared
from kvstore.testing.blocks import random_chain
from kvstore.testing.node import wait_for
from kvstore.testing.tenants import MODEL, keys_of, prompt_of, save, tenant_site
from kvstore.tiers.base import Medium
from kvstore.tiers.object import ObjectSettings, ObjectTier
from kvstore.tiers.object.hotness import HotnessSnapshot
from kvstore.tiers.object.names import hotness_name

PROMPT = prompt_of(4)


@pytest.mark.parametrize("with_catalog", [True, False], ids=["catalog", "bucket alone"])
def test_one_report_tells_of_every_tenant(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, with_catalog: bool) -> None:
    """One, under the node's own name: whoever proves a purge waits for a receipt of each node that reports."""
    monkeypatch.setattr(demand, "REPORT_SECONDS", 0.2)
    bucket, catalog = f"file://{tmp_path}/bucket", f"sqlite://{tmp_path}/catalog.db" if with_catalog else ""
    with tenant_site("acme", "globex", overrides=(f"object.url={bucket}", f"catalog.url={catalog}")) as site:
        last = []

        async def told() -> dict[str, HotnessSnapshot]:
            opened = await open_catalog(catalog, bucket)
            try:
                return dict(await reports(opened.documents))
            finally:
                await opened.close()

        def in_bucket() -> dict[str, HotnessSnapshot]:
            folder = (tmp_path / "bucket" / hotness_name("x")).parent
            return {path.stem: HotnessSnapshot.unpack(path.read_bytes()) for path in folder.glob("*.msgpack")}

        def all_told() -> bool:
            found = asyncio.run(told()) if with_catalog else in_bucket()
            assert set(found) <= {node_name(site.folder)}
            return any(report.scores.keys() >= set(last) for report in found.values())

        with site.running():
            for tenant in ("acme", "globex"):
                with site.engine(tenant) as engine:
                    last.append(save(engine, PROMPT, durable=Medium.OBJECT)[-1])
                    engine.lookup(keys_of(engine, PROMPT))
            wait_for(all_told)
        assert list(in_bucket()) == [node_name(site.folder)]


async def test_a_tenants_blocks_are_worth_what_its_own_requests_teach(tmp_path: Path) -> None:
    """One tenant's prompts come back each minute, the other's never; the last of both looks the same."""
    source, now = random.Random(1), time.time()
    shared = Shared({}, {Medium.DISK: {}, Medium.OBJECT: {}})
    bucket = await ObjectTier.open(ObjectSettings(url=f"file://{tmp_path}/bucket"))
    shared.ledgers[Medium.OBJECT] = Ledger(bucket.index)
    demands = {tenant: demand.Demand(tmp_path / f"{tenant}.msgpack") for tenant in ("own", "faithful", "fickle")}
    shared.demands = lambda: {name: one for name, one in demands.items() if name != "own"}
    last: dict[str, BlockKey] = {}
    for tenant in shared.demands():
        space = replace(MODEL, tenant=tenant)
        shared.adopt(space)
        for number in range(40):
            chain = [block.header for block in random_chain(source, 4, 100)]
            for minute in range(5 if tenant == "faithful" else 1):
                demands[tenant].traffic.observe([header.key for header in chain], now - 3000 + 60 * (number + minute))
        for header in chain:
            bucket.index.add(replace(header, namespace=space.digest), 0, now - 60)
        last[tenant] = chain[-1].key
    await Reporter(demands["own"], bucket, "gpu-7", None, shared.split)()
    for one in demands.values():
        await one.close()
    await bucket.close()
    report = HotnessSnapshot.unpack((tmp_path / "bucket" / hotness_name("gpu-7")).read_bytes())
    assert report.scores.keys() >= set(last.values())
    assert report.scores[last["faithful"]] > 10 * report.scores[last["fickle"]]
