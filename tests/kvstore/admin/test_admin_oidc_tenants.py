"""A claim of the issuer's tokens that limits who bears them to one tenant."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import httpx
import pytest
from oidc_issuer import AUDIENCE, Issuer

from kvstore.testing.admin import RunningApi
from kvstore.testing.tenants import prompt_of, save, tenant_site

PROMPT = prompt_of(3)

Ask = Callable[..., httpx.Response]


@pytest.fixture(scope="module")
def issuer() -> Iterator[Issuer]:
    with Issuer() as issuer:
        yield issuer


@pytest.fixture(scope="module")
def served(issuer: Issuer) -> Iterator[tuple[str, dict[str, set[str]]]]:
    """An API that takes the tenant from a claim, and the keys that each tenant has."""
    with ExitStack() as stack:
        site = stack.enter_context(tenant_site("acme", "globex"))
        stack.enter_context(site.running())
        held = {}
        for fill, tenant in enumerate(("acme", "globex"), 1):
            with site.engine(tenant) as engine:
                held[tenant] = {key.hex() for key in save(engine, PROMPT, fill)}
        oidc = [f"api.oidc_issuer={issuer.url}", f"api.oidc_audience={AUDIENCE}", "api.oidc_tenant_claim=org.tenant"]
        book = f"tenants.book={site.folder / 'tenants.json'}"
        yield stack.enter_context(RunningApi(site.folder, book, *oidc)).url, held


@pytest.fixture
def ask(issuer: Issuer, served: tuple[str, dict[str, set[str]]]) -> Ask:
    def ask(tenant: object, method: str, path: str, **what: Any) -> httpx.Response:
        """As an admin with this value in the claim."""
        claims = {} if tenant is None else {"org": {"tenant": tenant}}
        bearer = {"Authorization": f"Bearer {issuer.token(roles='admin', **claims)}"}
        return httpx.request(method, f"{served[0]}{path}", headers=bearer, timeout=30, **what)

    return ask


def keys(answer: httpx.Response) -> set[str]:
    assert answer.is_success, answer.text
    return {block["key"] for block in answer.json()["items"]}


def test_it_sees_its_tenant_and_nothing_else(ask: Ask, served: tuple[str, dict[str, set[str]]]) -> None:
    _, held = served
    assert ask("acme", "GET", "/v1/whoami").json()["tenant"] == "acme"
    for tenant in ("acme", "globex"):
        assert keys(ask(tenant, "GET", "/v1/blocks", params={"tier": "disk"})) == held[tenant]
    theirs = min(held["globex"])
    assert ask("acme", "GET", f"/v1/blocks/{theirs}").status_code == 404
    assert ask("acme", "DELETE", f"/v1/blocks/{theirs}").json()["deleted"] == {"host": 0, "disk": 0}
    assert ask("acme", "GET", "/v1/tenants/globex").status_code == 404
    for path in ("/v1/status", "/v1/config", "/v1/jobs", "/v1/tenants", "/v1/snapshot", "/v1/events", "/metrics"):
        assert ask("acme", "GET", path).status_code == 403, path
    assert ask("acme", "PATCH", "/v1/policy", json={}).status_code == 403


def test_a_star_is_of_all_tenants(ask: Ask, served: tuple[str, dict[str, set[str]]]) -> None:
    _, held = served
    assert keys(ask("*", "GET", "/v1/blocks", params={"tier": "disk"})) == held["acme"] | held["globex"]
    assert ask("*", "GET", "/v1/tenants").is_success


def test_without_a_tenant_or_with_what_is_none_it_is_nobodys(ask: Ask) -> None:
    for nothing in (None, "", ["acme", "globex"], {"name": "acme"}, "../acme", 7):
        assert ask(nothing, "GET", "/v1/whoami").status_code == 401, nothing


def test_one_that_the_node_does_not_serve_opens_nothing(ask: Ask) -> None:
    for path in ("/v1/blocks", "/v1/pins", "/v1/hot", "/v1/namespaces", "/v1/models", "/v1/tenants/gone"):
        answer = ask("gone", "GET", path, params={"tier": "disk"})
        assert 400 <= answer.status_code < 500, path
        assert "no tenant 'gone'" in answer.json()["detail"], path


def test_where_there_are_no_tenants_it_opens_nothing(issuer: Issuer) -> None:
    with tenant_site() as site:
        oidc = [f"api.oidc_issuer={issuer.url}", f"api.oidc_audience={AUDIENCE}", "api.oidc_tenant_claim=tenant"]
        with RunningApi(site.folder, *oidc) as api:
            for tenant, status in (("acme", 403), ("*", 200)):
                bearer = {"Authorization": f"Bearer {issuer.token(tenant=tenant)}"}
                assert httpx.get(f"{api.url}/v1/whoami", headers=bearer).status_code == status
