"""What a node tells operators of its requests, in real lookups over its socket."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from kvstore.identity import NO_PARENT, BlockKey, Namespace, chain_digests
from kvstore.node.api import About, NewBlock, Report
from kvstore.testing.node import PatientClient, RunningNode, wait_for
from kvstore.tiers.wrappers import Faults, Faulty, Wrapped

BLOCK_BYTES, TOKENS = 10_000, 16
NAMESPACE = Namespace(
    model="toy", weights="1", dtype="float32", layers=2, kv_heads=2, head_dim=8, attention="gqa", rope="",
    block_tokens=TOKENS, layout="opaque:test",
)  # fmt: skip


class Site:
    """A node with a chain of four blocks in memory and in its bucket, and a client."""

    def __init__(self, node: RunningNode, client: PatientClient) -> None:
        self.node, self.client = node, client
        keyring = client.open_namespace(NAMESPACE, BLOCK_BYTES)
        self.keys = keyring.block_keys(chain_digests(list(range(6 * TOKENS)), TOKENS))
        held = self.keys[:4]
        client.reserve(NAMESPACE, [NewBlock(key, NO_PARENT, place) for place, key in enumerate(held)])
        client.commit(held)
        assert client.call("drain", timeout=50.0)["drained"]

    def value(self, name: str, **labels: str) -> float:
        return self.node.node.store.metrics.registry.get_sample_value(name, labels) or 0.0

    def lookup(self, request: str, keys: list[BlockKey], start: int = 0, waiting: int | None = None) -> None:
        self.client.lookup(keys, start, about=About(request), waiting=waiting)


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    with RunningNode(tmp_path, "disk.enabled=false", f"object.url=file://{tmp_path}/b") as node:
        with PatientClient(node.socket) as client:
            yield Site(node, client)


def test_a_request_counts_once_however_often_it_is_looked_up(site: Site) -> None:
    for _ in range(3):
        site.lookup("r1", site.keys, start=1)
    assert site.value("kvstore_requests_total") == 1
    assert site.value("kvstore_asked_tokens_total") == 5 * TOKENS
    assert site.value("kvstore_found_tokens_total", tier="host") == 3 * TOKENS
    assert site.value("kvstore_offered_tokens_total") == 3 * TOKENS
    site.lookup("r2", site.keys, start=1)
    assert site.value("kvstore_requests_total") == 2, "another request for the same prompt"
    assert site.value("kvstore_lookup_seconds_count") == 4


def test_states_behind_a_prompt_are_found_and_count_as_no_tokens(site: Site) -> None:
    """The last key of the chain stands for one; what is found counts it, what is planned and what is used does not."""
    found = site.client.lookup(site.keys[:4], about=About("r1"), waiting=0, states=1)
    assert found.blocks == 4
    assert found.plan is not None
    assert found.plan.blocks == 3
    assert site.value("kvstore_asked_tokens_total") == 3 * TOKENS
    assert site.value("kvstore_found_tokens_total", tier="host") == 3 * TOKENS
    assert site.value("kvstore_offered_tokens_total") == 3 * TOKENS


def test_lookups_count_by_what_they_found(site: Site) -> None:
    site.lookup("a", site.keys[:4])
    site.lookup("b", site.keys)
    site.lookup("c", site.keys, start=4)
    found = {outcome: site.value("kvstore_lookups_total", outcome=outcome) for outcome in ("hit", "partial", "miss")}
    assert found == {"hit": 1, "partial": 1, "miss": 1}


def test_spared_prefill_is_what_the_engine_reported_it_would_take(site: Site) -> None:
    site.lookup("before", site.keys[:4])
    assert site.value("kvstore_spared_prefill_seconds_total") == 0, "nobody knows yet"
    site.client.report(Report(steps=[(1000, 500_000.0, 2.0)] * 20))
    site.lookup("after", site.keys[:4])
    spared = site.value("kvstore_spared_prefill_seconds_total")
    assert 0.02 < spared < 2.0, "64 of the 1,000 tokens that took 2 s"


def test_loads_are_timed_by_the_slowest_tier_of_their_blocks(site: Site) -> None:
    site.client.acquire(site.keys[:2], 50.0)
    site.client.release(site.keys[:2])
    site.client.call("evict", medium="host", keys=b"".join(site.keys[1:4]))
    site.client.acquire(site.keys[:4], 50.0)
    assert site.value("kvstore_load_seconds_count", tier="host") == 1
    assert site.value("kvstore_load_seconds_count", tier="object") == 1


def test_a_tier_that_is_away_shows_in_its_breaker(site: Site) -> None:
    assert site.value("kvstore_breaker_state", tier="object", state="closed") == 1
    tier = site.node.node.store.tiers[-1]
    while isinstance(tier, Wrapped) and not hasattr(tier, "state"):
        tier = tier.inner
    assert isinstance(tier, Wrapped)
    tier.inner = Faulty(tier.inner, Faults(unavailable=1.0))
    site.client.call("evict", medium="host", keys=b"".join(site.keys[:4]))
    site.client.acquire(site.keys[:4], 50.0)
    wait_for(lambda: site.value("kvstore_breaker_state", tier="object", state="closed") == 0)
    states = [site.value("kvstore_breaker_state", tier="object", state=state) for state in ("open", "half_open")]
    assert sum(states) == 1


def test_gauges_show_what_the_node_holds(site: Site) -> None:
    assert site.value("kvstore_tier_blocks", tier="host") == 4
    assert site.value("kvstore_tier_blocks", tier="object") == 4
    assert site.value("kvstore_tier_capacity_bytes", tier="host") == 4 << 20
    assert site.value("kvstore_clients") == 1
    assert site.value("kvstore_queue_fill_ratio", tier="object") == 0
