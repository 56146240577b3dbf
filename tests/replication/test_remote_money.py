"""Reading on demand spends a flow's money for the month together with the replicator, and never more than there is."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from region_pair import Pair
from test_remote_node import counters, keys_of, node_in_eu, runs
from test_remote_tier import NOTHING_AHEAD, buffer_for, offer, opened

from kvstore.errors import BlockNotFound, TierUnavailable
from kvstore.testing.node import wait_for
from kvstore.tiers.base import Medium
from kvstore.tiers.object import ObjectSettings
from replication import cursor as module
from replication.cursor import Cursor, Ledger, charges, month_of
from replication.links import Links
from replication.planner import LeftOut
from replication.purse import Purse
from replication.status import look
from replication.topology import Flow, load_topology


def priced(nbytes: float) -> str:
    """A flow's money for so many bytes a month."""
    return f"price_per_gb = 1.0\nmoney_per_month = {nbytes / 1e9}"


FLOW = Flow.model_validate({"from": "na", "to": ["eu"], "price_per_gb": 1.0, "money_per_month": 1000 / 1e9})


@pytest.fixture
async def bucket(tmp_path: Path) -> AsyncIterator[Links]:
    async with Links.open([ObjectSettings(url=f"file://{tmp_path}/bucket")]) as links:
        yield links


async def charged(bucket: Links) -> dict[str, int]:
    return await charges(bucket, FLOW.identity, month_of(time.time()))


async def test_many_nodes_and_the_replicator_together_spend_no_more_than_there_is(
    bucket: Links, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("cursor", "purse"):
        monkeypatch.setattr(f"replication.{name}.STEP_BYTES", 90)
    cursor = Cursor("na")
    ledger = Ledger(bucket, cursor, FLOW.identity, 1000)
    purses = [Purse(bucket, FLOW, f"node-{number}") for number in range(6)]
    paid = 0

    async def spend(payer: Purse | Ledger, nbytes: int) -> None:
        nonlocal paid
        for _ in range(10):
            pay = payer.pay if isinstance(payer, Purse) else payer.spend
            if await pay(nbytes):
                paid += nbytes

    await asyncio.gather(spend(ledger, 40), *(spend(purse, 15 + 5 * number) for number, purse in enumerate(purses)))
    assert 0 < paid <= 1000
    await ledger.settle()
    for purse in purses:
        await purse.close()
    spent = cursor.spending(FLOW.identity, time.time()).nbytes
    assert spent + sum((await charged(bucket)).values()) == paid, "what was not used was given back"
    other = Purse(bucket, FLOW, "node-7")
    assert await other.pay(1000 - paid), "and another may use it"
    assert not await other.pay(1)
    assert other.spent


async def test_a_restarted_node_goes_on_and_one_that_was_killed_loses_a_step(
    bucket: Links, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("replication.purse.STEP_BYTES", 300)
    purse = Purse(bucket, FLOW, "node")
    assert await purse.pay(100)
    await purse.close()
    assert await charged(bucket) == {"node": 100}
    killed = Purse(bucket, FLOW, "node")
    assert await killed.pay(100)
    assert await charged(bucket) == {"node": 400}
    again = Purse(bucket, FLOW, "node")
    assert not await again.pay(601)
    assert await again.pay(600)
    await again.look()
    assert again.spent


@pytest.mark.parametrize("answers", [0, 1])
async def test_a_charge_that_could_not_be_checked_pays_for_nothing(
    bucket: Links, monkeypatch: pytest.MonkeyPatch, answers: int
) -> None:
    """The bucket goes away before the charge is written, or just after it."""
    monkeypatch.setattr("replication.purse.STEP_BYTES", 1)
    sound, purse = module.uncharged, Purse(bucket, FLOW, "node")

    async def breaks(*of: Any) -> int:
        nonlocal answers
        answers -= 1
        if answers < 0:
            raise TierUnavailable("away")
        return await sound(*of)

    monkeypatch.setattr("replication.purse.uncharged", breaks)
    with pytest.raises(TierUnavailable):
        await purse.pay(600)
    monkeypatch.setattr("replication.purse.uncharged", sound)
    assert await Purse(bucket, FLOW, "other").pay(300)
    assert await purse.pay(600)
    assert not await purse.pay(200)
    monkeypatch.setattr("replication.purse.uncharged", breaks)
    assert not await purse.pay(200), "and nobody is asked again for every block"
    await purse.close()
    assert (await charged(bucket))["node"] == 600


async def test_a_new_month_has_money_again(bucket: Links, monkeypatch: pytest.MonkeyPatch) -> None:
    purse = Purse(bucket, FLOW, "node")
    assert not await purse.pay(1001)
    assert purse.spent
    for name in ("cursor", "purse"):
        monkeypatch.setattr(f"replication.{name}.month_of", lambda now: "2100-01")
    assert not purse.spent
    assert await purse.pay(1000)


@pytest.mark.s3
async def test_reads_end_with_the_money_and_the_replicator_copies_no_more(
    pair: Pair, random_source: random.Random
) -> None:
    sealed = await offer(pair, random_source)
    size = sealed[0].header.envelope_bytes
    pair.write(flow=priced(2.5 * size))
    registry = CollectorRegistry()

    def value(name: str) -> float | None:
        return registry.get_sample_value(f"kvstore_remote_{name}", {"region": "na"})

    async with opened(pair, registry=registry) as (regions, tier):
        assert (len(tier.keys()), value("money_spent")) == (4, 0)
        for block in sealed[:2]:
            await tier.get(block.key, buffer_for(block))
        with pytest.raises(BlockNotFound):
            await tier.get(sealed[2].key, buffer_for(sealed[2]))
        await regions.refresh()
        assert not tier.keys()
        assert tier.stat(sealed[2].key) is not None, "explain knows that it is there"
        assert (value("money_spent"), value("bytes_total")) == (1, 2 * size)
        assert value("cost_total") == pytest.approx(2 * size / 1e9)
    topology = load_topology(pair.file)
    async with Links.open([pair.eu]) as eu:
        assert (await look(eu, topology, "eu"))["sources"]["na"]["month_bytes"] == 2 * size
    report = (await pair.cycle(topology)).flows[0]
    assert not report.plan.blocks
    assert report.plan.left_out[LeftOut.MONEY].blocks > 0


@pytest.mark.s3
async def test_a_node_that_has_spent_the_money_computes_and_explains_it(
    pair: Pair, random_source: random.Random, tmp_path: Path
) -> None:
    sealed = await offer(pair, random_source)
    keys = keys_of(sealed)
    pair.write(flow=f"{NOTHING_AHEAD}\n{priced(2.5 * sealed[0].header.envelope_bytes)}")
    with node_in_eu(pair, tmp_path) as client:
        wait_for(lambda: runs(client, keys) == {Medium.REMOTE: 4})
        acquired = client.acquire(keys, 10)
        assert acquired.media == (Medium.REMOTE,) * len(acquired.media)
        client.release(keys[: len(acquired.media)])
        assert len(acquired.media) <= 2
        wait_for(lambda: runs(client, keys).get(Medium.REMOTE, 0) == 0)
        assert counters(client)["kvstore_remote_bytes_total{region=na}"] <= 2 * sealed[0].header.envelope_bytes
        why = [block["why"] for block in client.call("explain", key=keys[-1])["blocks"]]
        assert set(why) == {"held", "withheld"}
