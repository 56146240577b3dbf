"""The Python client has a method for every route, and marks writes as such."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic import ValidationError

from kvstore.admin.calls import ASKING
from kvstore.admin.client import AdminClient
from kvstore.admin.models.base import TierName
from kvstore.admin.models.policy import Mode
from kvstore.admin.models.prompts import Prompt
from kvstore.admin.models.tenants import NewTenant, TenantChange

DOCUMENT = json.loads((Path(__file__).parents[3] / "docs" / "openapi.json").read_text())
OPERATIONS = {
    operation["operationId"]: (method.upper(), path, operation)
    for path, item in DOCUMENT["paths"].items()
    for method, operation in item.items()
}
KEY, PROMPT = "ab" * 16, Prompt(request="r")

CALLS: dict[str, Callable[[AdminClient], Any]] = {
    "healthz": lambda c: c.health(), "readyz": lambda c: c.ready(), "metrics": lambda c: c.metrics(),
    "snapshot": lambda c: c.snapshot(), "events": lambda c: list(c.events()), "whoami": lambda c: c.whoami(),
    "config": lambda c: c.config(), "catalog": lambda c: c.catalog(), "nodes": lambda c: c.nodes(),
    "status": lambda c: c.status(), "tiers": lambda c: c.tiers(), "tier": lambda c: c.tier(TierName.DISK),
    "clients": lambda c: c.clients(), "warmth": lambda c: c.warmth(),
    "job_kinds": lambda c: c.job_kinds(), "list_jobs": lambda c: list(c.jobs()), "create_job": lambda c: c.run_job("scrub"),
    "show_job": lambda c: c.job("a"), "job_events": lambda c: list(c.watch_job("a")),
    "cancel_job": lambda c: c.cancel_job("a"), "resume_job": lambda c: c.resume_job("a"),
    "list_blocks": lambda c: list(c.blocks(TierName.HOST)), "query_blocks": lambda c: list(c.blocks_of(PROMPT)),
    "evict_blocks": lambda c: c.evict(TierName.HOST, [KEY]), "delete_blocks": lambda c: c.delete([KEY]),
    "show_block": lambda c: c.block(KEY), "delete_block": lambda c: c.delete_block(KEY),
    "verify_block": lambda c: c.verify(KEY), "list_pins": lambda c: c.pins(), "pin": lambda c: c.pin(PROMPT, 60),
    "unpin": lambda c: c.unpin(KEY), "lookup": lambda c: c.lookup(PROMPT), "explain": lambda c: c.explain(PROMPT),
    "router_lookup": lambda c: c.router_lookup([PROMPT]), "router_peek": lambda c: c.router_peek([bytes(16)]),
    "hot": lambda c: list(c.hot()), "tree": lambda c: c.tree(PROMPT), "breakers": lambda c: c.breakers(),
    "list_namespaces": lambda c: list(c.namespaces()), "show_namespace": lambda c: c.namespace(KEY),
    "delete_namespace_blocks": lambda c: c.delete_namespace(KEY), "list_models": lambda c: c.models(),
    "show_policy": lambda c: c.policy(), "change_policy": lambda c: c.set_policy(Mode.OFF),
    "dry_run": lambda c: c.dry_run(PROMPT), "list_tenants": lambda c: list(c.tenants()),
    "create_tenant": lambda c: c.create_tenant(NewTenant(name="a")), "show_tenant": lambda c: c.tenant("a"),
    "change_tenant": lambda c: c.change_tenant("a", TenantChange()), "remove_tenant": lambda c: c.remove_tenant("a"),
    "rotate_secret": lambda c: c.rotate_secret("a"), "rotate_token": lambda c: c.rotate_token("a"),
    "purge_tenant": lambda c: c.purge_tenant("a"), "show_purge": lambda c: c.purge_proof(KEY),
    "replication": lambda c: c.replication(), "topology": lambda c: c.topology(),
    "pause_replication": lambda c: c.pause_replication([]), "resume_replication": lambda c: c.resume_replication(["na"]),
    "holdings": lambda c: c.holdings(bytes(16)),
}  # fmt: skip


def test_every_route_has_a_method() -> None:
    assert set(CALLS) == set(OPERATIONS)


@pytest.mark.parametrize("operation", sorted(OPERATIONS))
def test_it_asks_that_route_and_names_writes_and_only_these(operation: str) -> None:
    asked: list[httpx.Request] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request)
        return httpx.Response(200, json={"items": [], "cursor": ""})

    with AdminClient("http://api", transport=httpx.MockTransport(answer)) as client, suppress(ValidationError):
        CALLS[operation](client)
    (request,), (method, path, described) = asked, OPERATIONS[operation]
    assert request.method == method
    assert re.fullmatch(re.sub(r"\{\w+\}", "[^/]+", path), request.url.path)
    writes = any(one["name"].lower() == "idempotency-key" for one in described.get("parameters", ()))
    assert ("idempotency-key" in request.headers) == writes
    assert (path in ASKING) == (method == "POST" and not writes)


def test_a_name_stays_one_part_of_the_path() -> None:
    asked: list[bytes] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request.url.raw_path)
        return httpx.Response(404, json={"detail": "none", "remedy": ""})

    with AdminClient("http://api", transport=httpx.MockTransport(answer)) as client:
        for name in ("../jobs", "a?b=c", "a/b#c"):
            with pytest.raises(Exception, match="none"):
                client.tenant(name)
    assert asked == [b"/v1/tenants/..%2Fjobs", b"/v1/tenants/a%3Fb%3Dc", b"/v1/tenants/a%2Fb%23c"]
