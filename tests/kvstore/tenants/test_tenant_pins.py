"""Pins of a tenant, on several nodes of a region."""

from __future__ import annotations

import shutil
from contextlib import ExitStack
from pathlib import Path

import pytest

from kvstore.catalog import sharing
from kvstore.node.client import Client
from kvstore.testing.node import wait_for
from kvstore.testing.tenants import TenantSite, keys_of, prompt_of, save, tenant_site
from kvstore.tiers.base import Medium

PROMPT = prompt_of(5)


def test_a_tenants_pin_is_heeded_by_its_other_nodes_and_by_no_other_tenant(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sharing, "DUTY_SECONDS", 0.1)
    region = (f"object.url=file://{tmp_path}/bucket", f"catalog.url=sqlite://{tmp_path}/catalog.db")
    with ExitStack() as stack:
        here = stack.enter_context(tenant_site("acme", "globex", overrides=region))
        there = TenantSite(stack.enter_context(tenant_site()).folder, region, here.tokens)
        shutil.copy2(here.book.path, there.book.path)
        one, two = (site.operator(stack.enter_context(site.running())) for site in (here, there))
        with here.engine("acme") as acme, here.engine("globex") as globex:
            keys = save(acme, PROMPT, durable=Medium.OBJECT)
            assert len(keys) == 5
            theirs = keys_of(globex, PROMPT)

        def pinned(node: Client, tenant: str) -> list[bytes]:
            return [pin["key"] for pin in node.call("pins", tenant=tenant)["pins"]]

        one.call("pin", key=keys[-1], seconds=600)
        wait_for(lambda: pinned(two, "acme") == [keys[-1]])
        assert not pinned(two, "globex")
        assert not set(theirs) & set(keys)
        assert two.call("unpin", key=keys[-1]) == {"unpinned": 5}
        wait_for(lambda: not pinned(one, "acme"))
