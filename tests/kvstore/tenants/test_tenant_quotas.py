"""A tenant's bytes: under its quota whatever is saved at once, after a restart, and when the quota is lowered."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from kvstore.envelope import envelope_bytes
from kvstore.errors import KVStoreError
from kvstore.node.client import Client
from kvstore.tenants.book import Quota
from kvstore.testing.node import wait_for
from kvstore.testing.tenants import BLOCK_BYTES, TenantSite, keys_of, loaded, prompt_of, save, tenant_site
from kvstore.tiers.base import Medium

SLOT = envelope_bytes(BLOCK_BYTES)
MIB = 1 << 20


def tier(client: Client, medium: str) -> dict[str, Any]:
    return next(tier for tier in client.call("status")["tiers"] if tier["medium"] == medium)


@pytest.mark.parametrize("medium", ["disk", "object"])
def test_the_quota_holds_while_many_save_at_once(medium: str, tmp_path: Path) -> None:
    """Looked at all the while, from beside the savers; the other tenant keeps all that it has."""
    quota = 20 * SLOT
    with tenant_site("acme", "globex", overrides=(f"object.url=file://{tmp_path}/bucket",)) as site:
        site.book.change("acme", quota=Quota(**{medium: quota}))
        with site.running(), site.engine("globex") as globex, site.engine("acme") as watching:
            theirs = save(globex, prompt_of(10, 10**6))
            most, done = [0], threading.Event()

            def watch() -> None:
                while not done.is_set():
                    most.append(tier(watching, medium)["used_bytes"])

            def saver(number: int) -> None:
                with site.engine("acme") as engine:
                    for turn in range(3):
                        save(engine, prompt_of(5, 10_000 * (10 * number + turn)))

            watcher = threading.Thread(target=watch)
            watcher.start()
            with ThreadPoolExecutor(4) as pool:
                list(pool.map(saver, range(4)))
            done.set()
            watcher.join()
            found = tier(watching, medium)
            assert max(most) <= quota
            assert 0 < found["used_bytes"] <= quota == found["capacity_bytes"]
            assert found["evicted"] > 0
            assert (tier(globex, medium)["blocks"], tier(globex, medium)["evicted"]) == (10, 0)
            assert len(loaded(globex, theirs)) == 10


@pytest.mark.parametrize("medium", [Medium.DISK, Medium.OBJECT])
def test_the_quota_counts_what_was_there_before_a_restart(medium: Medium, tmp_path: Path) -> None:
    quota = 8 * SLOT
    with tenant_site("acme", overrides=(f"object.url=file://{tmp_path}/bucket",)) as site:
        site.book.change("acme", quota=Quota(**{medium.value: quota}))
        with site.running(), site.engine("acme") as acme:
            save(acme, prompt_of(8), durable=medium)
            assert tier(acme, medium.value)["used_bytes"] == 8 * SLOT
        with site.running(), site.engine("acme") as acme:
            wait_for(lambda: tier(acme, medium.value)["used_bytes"] == 8 * SLOT)  # before any namespace was opened
            save(acme, prompt_of(3, 10**6), durable=medium)
            assert tier(acme, medium.value)["used_bytes"] <= quota


def test_a_quota_is_lowered_while_the_node_runs_and_while_it_does_not() -> None:
    with tenant_site("acme", "globex") as site:
        with site.running(), site.engine("acme") as acme, site.engine("globex") as globex:
            save(acme, prompt_of(10))
            save(globex, prompt_of(10))
            site.book.change("acme", quota=Quota(disk=4 * SLOT))
            wait_for(lambda: tier(acme, "disk")["used_bytes"] <= 4 * SLOT)
            assert tier(globex, "disk")["blocks"] == 10
            head = keys_of(acme, prompt_of(10))[: tier(acme, "disk")["blocks"]]
            assert acme.call("peek", keys=b"".join(head))["tiers"][1][3] == len(head), "tails went first"
        site.book.change("acme", quota=Quota(disk=2 * SLOT))
        with site.running(), site.engine("acme") as acme:
            assert tier(acme, "disk")["used_bytes"] <= 2 * SLOT


def test_a_quota_of_nothing_keeps_blocks_off_the_disk() -> None:
    with tenant_site("acme") as site:
        site.book.change("acme", quota=Quota(disk=0))
        with site.running(), site.engine("acme") as acme:
            assert save(acme, prompt_of(3)) == []
            assert len(loaded(acme, keys_of(acme, prompt_of(3)))) == 3, "memory has them"
            assert tier(acme, "disk")["refused"] >= 3
            assert tier(acme, "disk")["used_bytes"] == 0


def test_a_tenant_that_cannot_be_served_keeps_nobody_else_waiting() -> None:
    with tenant_site("acme", "globex") as site:
        site.book.change("acme", quota=Quota(host=1 << 50))
        with site.running(), site.engine("acme") as acme, site.engine("globex") as globex:
            assert save(globex, prompt_of(2))
            assert not answers(acme)
            site.book.change("acme", quota=Quota(host=2 * MIB))
            wait_for(lambda: answers(acme))


def fill(site: TenantSite, tenant: str, start: int, chains: int) -> None:
    with site.engine(tenant) as engine:
        for number in range(chains):
            save(engine, prompt_of(10, start + number * 10_000))


def test_under_pressure_who_holds_most_pays() -> None:
    """The disk has room for some 200 blocks; one tenant fills it, the other comes later and gets its part."""
    with tenant_site("acme", "globex", overrides=("disk.bytes=8MiB",)) as site, site.running():
        fill(site, "acme", 0, 14)
        with site.engine("acme") as acme, site.engine("globex") as globex:
            full = tier(acme, "disk")
            assert full["capacity_bytes"] == 8 * MIB
            fill(site, "globex", 0, 4)
            assert tier(globex, "disk")["blocks"] == 40, "nothing of who holds less went"
            assert tier(acme, "disk")["blocks"] < full["blocks"]
            fill(site, "globex", 10**6, 10)
            ours, theirs = tier(globex, "disk")["used_bytes"], tier(acme, "disk")["used_bytes"]
            assert abs(ours - theirs) <= 12 * SLOT, "half each, to within a batch"


def test_a_tenant_is_told_of_its_own_losses_not_for_whom() -> None:
    with (
        tenant_site("acme", "globex", overrides=("disk.bytes=8MiB", "tenants.host_bytes=2MiB")) as site,
        site.running(),
    ):
        fill(site, "acme", 0, 14)
        fill(site, "globex", 0, 8)
        with site.engine("acme") as acme:
            keys_of(acme, [])
            (space,) = acme.call("status")["namespaces"]
            events = []
            for number in range(14):
                tokens = b"".join(t.to_bytes(4, "little") for t in prompt_of(10, number * 10_000))
                explained = acme.call("explain", tokens=tokens, namespace=space["digest"])
                events += [event for block in explained["blocks"] for event in block["events"]]
            for_others = [e for e in events if e["what"] == "evicted" and e["tier"] == "disk"]
            assert for_others
            assert {event["newcomer"] for event in for_others} == {b""}


def answers(client: Client) -> bool:
    try:
        return bool(client.call("status"))
    except KVStoreError:
        return False


def test_the_arena_is_the_host_quota_and_another_one_takes_effect_at_run_time() -> None:
    with tenant_site("acme", "globex") as site:
        site.book.change("acme", quota=Quota(host=2 * MIB))
        with site.running(), site.engine("acme") as acme, site.engine("globex") as globex:
            assert (acme.arena.nbytes, globex.arena.nbytes) == (2 * MIB, 4 * MIB)
            for number in range(10):
                save(acme, prompt_of(10, number * 10_000), durable=Medium.HOST)
            assert tier(acme, "host")["used_bytes"] <= 2 * MIB
            epochs = acme.epoch, globex.epoch
            site.book.change("acme", quota=Quota(host=3 * MIB))
            wait_for(lambda: answers(acme) and acme.arena.nbytes == 3 * MIB)
            assert acme.epoch != epochs[0]
            assert globex.epoch == epochs[1], "who is not changed notices nothing"
            assert save(acme, prompt_of(3, 10**6))
