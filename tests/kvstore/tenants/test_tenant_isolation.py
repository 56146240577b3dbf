"""Two tenants on one node: nothing that one of them asks for, or looks at, is the other's."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from kvstore.errors import ProtocolError
from kvstore.identity import BlockKey, Namespace
from kvstore.node.api import About
from kvstore.testing.node import PatientClient, RunningNode, wait_for
from kvstore.testing.tenants import (
    BLOCK_BYTES,
    MODEL,
    UID,
    TenantSite,
    derive,
    keys_of,
    loaded,
    prompt_of,
    save,
    tenant_site,
)

PROMPT = prompt_of(5)


@pytest.fixture
def site() -> Iterator[TenantSite]:
    with tenant_site("acme", "globex") as site:
        yield site


@pytest.fixture
def node(site: TenantSite) -> Iterator[RunningNode]:
    with site.running() as node:
        yield node


def test_equal_prompts_share_no_key_no_hit_and_no_byte(site: TenantSite, node: RunningNode) -> None:
    with site.engine("acme") as acme, site.engine("globex") as globex:
        theirs = save(acme, PROMPT, fill=7)
        assert len(theirs) == 5
        ours = keys_of(globex, PROMPT)
        assert not set(ours) & set(theirs)
        nobodys = [BlockKey(bytes([number]) * 16) for number in range(1, 6)]
        assert globex.lookup(ours) == globex.lookup(nobodys)
        assert save(globex, PROMPT, fill=9) == ours, "nothing of it was there"
        assert (loaded(acme, theirs), loaded(globex, ours)) == ([7] * 5, [9] * 5)


def test_whoever_has_anothers_keys_gets_nothing_by_them(site: TenantSite, node: RunningNode) -> None:
    """Keys are no secret: logs and buckets have them."""
    with site.engine("acme") as acme, site.engine("globex") as globex:
        theirs = save(acme, PROMPT)
        keys_of(globex, PROMPT)
        joined = b"".join(theirs)
        assert globex.lookup(theirs).blocks == 0
        assert globex.holds(theirs) == [False] * 5
        assert loaded(globex, theirs) == []
        assert globex.call("inspect", key=theirs[0]) == {"media": []}
        assert set(globex.call("delete", keys=joined)["deleted"].values()) == {0}
        assert globex.call("evict", keys=joined, medium="disk") == {"evicted": 0}
        assert globex.call("verify", keys=joined, medium="disk")["checked"] == 0
        (host, disk) = globex.call("peek", keys=joined)["tiers"]
        assert (host[1], host[3], disk[1], disk[3]) == (0, 0, 0, 0)
        assert loaded(acme, theirs) == [1] * 5, "and it is all still there"


def test_nothing_that_can_be_listed_is_anothers(site: TenantSite, node: RunningNode) -> None:
    with site.engine("acme") as acme, site.engine("globex") as globex:
        theirs = save(acme, PROMPT)
        acme.lookup(theirs, about=About("acme's request"))
        mine = save(globex, PROMPT[:32])
        status = globex.call("status")
        assert [tier["blocks"] for tier in status["tiers"]] == [2, 2]
        assert {client["name"] for client in status["clients"]} == {"engine of globex"}
        assert {space["fields"]["tenant"] for space in status["namespaces"]} == {"globex"}
        for medium in ("host", "disk"):
            assert {one["key"] for one in globex.call("list", medium=medium, limit=100)["blocks"]} == set(mine)
        with site.engine("acme") as again:
            keys_of(again, PROMPT)
            again.lookup(theirs)
            wait_for(lambda: acme.call("hot", limit=10)["prompts"])
        assert globex.call("hot", limit=10)["prompts"] == []
        assert globex.call("pins") == {"pins": []}
        with pytest.raises(Exception, match="not among the 0"):
            globex.call("explain", request="acme's request")
        (why,) = {block["why"] for block in globex.call("explain", key=mine[-1])["blocks"]}
        assert why == "held"
        with pytest.raises(Exception, match="no tier of the node holds"):
            globex.call("explain", key=theirs[-1])
        text = globex.call("metrics")
        assert b"kvstore_published_blocks_total 2.0" in text
        assert b"acme" not in text
        for verb in ("tenants", "follow_tenants", "purge_tenant"):
            with pytest.raises(ProtocolError, match="unknown verb"):
                globex.call(verb, name="acme")


def test_each_tenant_maps_memory_of_its_own(site: TenantSite, node: RunningNode) -> None:
    """What an engine can read without asking is all that it has mapped."""
    with site.engine("acme") as acme, site.engine("globex") as globex:
        save(acme, PROMPT, fill=0xAB)
        assert bytes([0xAB]) * BLOCK_BYTES in bytes(acme.arena.buffer)
        assert bytes([0xAB]) * 64 not in bytes(globex.arena.buffer)


def test_a_client_cannot_choose_its_tenant(site: TenantSite, node: RunningNode) -> None:
    with site.engine("acme") as acme, site.engine("globex") as globex:
        theirs = save(acme, PROMPT)
        claimed = Namespace.from_dict({**MODEL.to_dict(), "tenant": "acme"})
        assert not set(derive(globex.open_namespace(claimed, BLOCK_BYTES), PROMPT)) & set(theirs)
        assert globex.call("open_namespace", fields=claimed.to_dict(), block_bytes=BLOCK_BYTES, tenant="acme")
        assert globex.call("list", medium="host", limit=10, tenant="acme")["blocks"] == []


@pytest.mark.parametrize("token", ["", "kvt_acme_" + "A" * 43, "kvo_" + "A" * 43, "nonsense", "kvt_nobody_" + "A" * 43])
def test_who_is_in_no_book_is_told_nothing(site: TenantSite, node: RunningNode, token: str) -> None:
    with PatientClient(node.socket, token=lambda: token) as client, pytest.raises(ProtocolError, match="of no tenant"):
        client.call("status")


def test_a_user_is_of_the_tenant_that_the_book_says(site: TenantSite, node: RunningNode) -> None:
    """Also root, and the user of the node itself: else every container that runs as root would be an operator."""
    site.book.change("acme", uids=(UID,))
    with PatientClient(node.socket, token=str) as by_user, site.engine("acme") as acme:
        theirs = save(acme, PROMPT)
        assert keys_of(by_user, PROMPT) == theirs
        assert loaded(by_user, theirs) == [1] * 5
        with pytest.raises(ProtocolError, match="unknown verb"):
            by_user.call("tenants")


def test_tenants_that_were_declared_to_share_do(site: TenantSite, node: RunningNode) -> None:
    site.tokens["subsidiary"] = site.book.create("subsidiary", shares="acme")[1]
    with site.engine("acme") as acme, site.engine("subsidiary") as other, site.engine("globex") as globex:
        theirs = save(acme, PROMPT, fill=5)
        wait_for(lambda: keys_of(other, PROMPT) == theirs)
        assert other.lookup(theirs).blocks == 5
        assert loaded(other, theirs) == [5] * 5
        assert globex.lookup(keys_of(globex, PROMPT)).blocks == 0


def test_a_cache_salt_narrows_and_never_widens(site: TenantSite, node: RunningNode) -> None:
    """It only seeds the chain under the tenant's key: no salt of another tenant leads to the same blocks."""
    with site.engine("acme") as acme, site.engine("globex") as globex:
        theirs = save(acme, PROMPT)
        keys_of(globex, PROMPT)
        digest = globex.call("status")["namespaces"][0]["digest"]
        tokens = b"".join(token.to_bytes(4, "little") for token in PROMPT)
        for salt in ("", "acme", "x"):
            found = globex.call("where", tokens=tokens, namespace=digest, cache_salt=salt, count=10)
            assert set(theirs).isdisjoint(found["keys"][at : at + 16] for at in range(0, 80, 16))
            assert found["media"] == [[]] * 5


def test_operators_see_every_tenant_and_name_the_one_they_mean(site: TenantSite, node: RunningNode) -> None:
    with site.engine("acme") as acme, site.operator(node) as operator:
        theirs = save(acme, PROMPT)
        (one, other) = operator.call("tenants")["tenants"]
        assert (one["name"], one["clients"], other["clients"]) == ("acme", 1, 0)
        assert [(tier["medium"], tier["blocks"]) for tier in one["tiers"]] == [("host", 5), ("disk", 5)]
        assert {b["key"] for b in operator.call("list", medium="disk", limit=10)["blocks"]} == set(theirs)
        assert operator.call("list", medium="host", limit=10)["blocks"] == []
        held = operator.call("list", medium="host", limit=10, tenant="acme")["blocks"]
        assert {block["key"] for block in held} == set(theirs)
        for _ in range(2):
            with site.engine("acme") as engine:
                keys_of(engine, PROMPT)
                engine.lookup(theirs)
        wait_for(lambda: operator.call("hot", limit=10)["prompts"])
        whole = operator.call("status")
        assert [(tier["medium"], tier["blocks"]) for tier in whole["tiers"]] == [("host", 5), ("disk", 5)]
        assert whole["counters"]["kvstore_published_blocks_total"] == 5
        assert {client["name"] for client in whole["clients"]} == {"engine of acme", "operator"}
        assert operator.call("pin", key=theirs[-1], seconds=60)["pinned"] == 5
        assert [pin["blocks"] for pin in operator.call("pins")["pins"]] == [5]
        joined = b"".join(theirs)
        assert operator.call("peek", keys=joined)["tiers"][0][1] == 5, "in whose memory it is"
        acme.lookup(theirs, about=About("some request"))
        explained = operator.call("explain", request="some request")
        assert [block["key"] for block in explained["blocks"]] == theirs
        assert operator.call("inspect", key=theirs[0])["media"] == ["host", "disk"]
        assert operator.call("verify", keys=joined, medium="disk")["checked"] == 5
        assert operator.call("evict", keys=joined, medium="host") == {"evicted": 5}
        assert operator.call("delete", keys=joined)["deleted"] == {"host": 0, "disk": 5}
        save(acme, PROMPT)
        (digest,) = {space["digest"] for space in operator.call("status")["namespaces"]}
        assert len(operator.call("list", medium="host", limit=10, namespace=digest)["blocks"]) == 5
        assert operator.call("delete", namespace=digest)["deleted"] == {"host": 5, "disk": 5}
        for form in (False, True):
            lines = operator.call("metrics", openmetrics=form).decode().splitlines()
            assert 'kvstore_published_blocks_total{tenant="acme"} 10.0' in lines
            assert "kvstore_published_blocks_total 0.0" in lines, "of the node's own tenant"
            types = [line for line in lines if line.startswith("# TYPE")]
            assert len(types) == len(set(types)), "a metric is described once"


def test_what_tenants_stored_is_theirs_after_a_restart(site: TenantSite) -> None:
    with site.running(), site.engine("acme") as acme, site.engine("globex") as globex:
        theirs, ours = save(acme, PROMPT, fill=3), save(globex, PROMPT, fill=4)
    with site.running(), site.engine("acme") as acme, site.engine("globex") as globex:
        assert keys_of(acme, PROMPT) == theirs
        assert (loaded(acme, theirs), loaded(globex, ours)) == ([3] * 5, [4] * 5)
        assert loaded(globex, theirs) == []
