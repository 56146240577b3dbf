"""Tokens of the admin API that are limited to one tenant."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import httpx
import pytest
from typer.testing import CliRunner

from kvstore.admin.auth import Role
from kvstore.admin.tokens import TokenBook
from kvstore.cli import app
from kvstore.testing.admin import RunningApi
from kvstore.testing.tenants import MODEL, keys_of, prompt_of, save, tenant_site

PROMPT = prompt_of(5)
THEIRS = {
    "/v1/whoami", "/v1/hot", "/v1/pins", "/v1/blocks", "/v1/namespaces", "/v1/models", "/v1/breakers",
}  # fmt: skip
"""What a tenant may read, of what has no name in its path."""
EVERYBODYS = {"/", "/healthz", "/readyz", "/docs", "/openapi.json"}

Ask = Callable[..., httpx.Response]


class Book:
    """What a tenant's people and those who run the node ask with."""

    def __init__(self, url: str, tokens: TokenBook) -> None:
        self.url, self.tokens = url, tokens

    def of(self, tenant: str, role: Role = Role.ADMIN) -> Ask:
        _, text = self.tokens.create(f"{role} of {tenant or 'all'}", role, tenant=tenant)
        client = httpx.Client(base_url=self.url, headers={"Authorization": f"Bearer {text}"}, timeout=30)

        def ask(method: str, path: str, **what: object) -> httpx.Response:
            return client.request(method, path, **what)  # type: ignore[arg-type]

        return ask


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[Book, dict[str, list[str]]]]:
    with ExitStack() as stack:
        site = stack.enter_context(tenant_site("acme", "globex"))
        stack.enter_context(site.running())
        held = {}
        for fill, tenant in enumerate(("acme", "globex"), 1):
            with site.engine(tenant) as engine:
                held[tenant] = [key.hex() for key in save(engine, PROMPT, fill)]
                engine.lookup(keys_of(engine, PROMPT))
        tokens = site.folder / "tokens.json"
        book = f"tenants.book={site.folder / 'tenants.json'}"
        api = stack.enter_context(RunningApi(site.folder, book, f"api.tokens={tokens}"))
        yield Book(api.url, TokenBook(tokens)), held


def test_a_tenants_token_sees_its_own_and_nothing_else(served: tuple[Book, dict[str, list[str]]]) -> None:
    book, held = served
    acme, everything = book.of("acme"), book.of("")
    assert acme("GET", "/v1/whoami").json()["tenant"] == "acme"
    for tier in ("host", "disk"):
        listed = acme("GET", "/v1/blocks", params={"tier": tier}).json()["items"]
        assert {block["key"] for block in listed} == set(held["acme"])
    assert len(everything("GET", "/v1/blocks", params={"tier": "disk"}).json()["items"]) == 10
    (space,) = acme("GET", "/v1/namespaces").json()["items"]
    assert space["fields"]["tenant"] == "acme"
    assert {prompt["key"] for prompt in acme("GET", "/v1/hot").json()["items"]} <= set(held["acme"])

    theirs = held["globex"][-1]
    assert acme("GET", f"/v1/blocks/{held['acme'][0]}").status_code == 200
    assert acme("GET", f"/v1/blocks/{theirs}").status_code == 404
    assert acme("POST", "/v1/pins", json={"prompt": {"key": theirs}, "seconds": 60}).status_code == 404
    assert acme("DELETE", f"/v1/blocks/{theirs}").json()["deleted"] == {"host": 0, "disk": 0}
    assert everything("GET", f"/v1/blocks/{theirs}").json()["media"] == ["host", "disk"]
    asked = {"prompt": {"namespace": MODEL.model, "tokens": PROMPT}, "limit": 10}
    found = acme("POST", "/v1/blocks/query", json=asked)
    assert found.status_code == 200, found.text
    assert [block["key"] for block in found.json()["items"]] == held["acme"]


def test_a_tenants_token_opens_no_route_that_is_about_more(served: tuple[Book, dict[str, list[str]]]) -> None:
    book, _ = served
    acme, everything = book.of("acme"), book.of("")
    paths = everything("GET", "/openapi.json").json()["paths"]
    for path, methods in paths.items():
        if "get" in methods and "{" not in path and path not in THEIRS | EVERYBODYS:
            assert acme("GET", path).status_code == 403, path
    assert acme("PATCH", "/v1/policy", json={}).status_code == 403
    assert acme("POST", "/v1/jobs", json={"kind": "scrub"}).status_code == 403
    assert acme("POST", "/v1/router/peek", json={"chains": []}).status_code == 403
    assert acme("PATCH", "/v1/tenants/acme", json={"quota": {"disk": None}}).status_code == 403, (
        "its quota is given to it"
    )


def test_a_tenant_looks_after_itself_as_its_role_allows(served: tuple[Book, dict[str, list[str]]]) -> None:
    book, held = served
    viewer, admin = book.of("globex", Role.VIEWER), book.of("globex")
    assert viewer("GET", "/v1/tenants/globex").json()["name"] == "globex"
    assert viewer("GET", "/v1/tenants/acme").status_code == 404
    assert viewer("POST", "/v1/tenants/globex/purge").status_code == 403
    assert admin("POST", "/v1/tenants/acme/purge").status_code == 404
    assert admin("POST", "/v1/tenants/globex/purge").json()["deleted"] == {"host": 5, "disk": 5}
    assert book.of("")("GET", f"/v1/blocks/{held['acme'][0]}").status_code == 200
    assert admin("POST", "/v1/tenants/globex/rotate-token").status_code == 200


def test_a_token_of_a_tenant_that_is_not_served_opens_nothing(served: tuple[Book, dict[str, list[str]]]) -> None:
    gone = served[0].of("gone")
    for path in THEIRS - {"/v1/whoami"}:
        assert gone("GET", path, params={"tier": "disk"}).status_code >= 400, path


def test_the_command_makes_them(served: tuple[Book, dict[str, list[str]]]) -> None:
    file = served[0].tokens._path
    settings = ("--set", f"api.tokens={file}", "--set", f"node.directory={file.parent}")
    arguments = ["token", "create", "acme's own", "--tenant", "acme", "--json", *settings]
    made = json.loads(CliRunner().invoke(app, arguments).stdout)
    assert made["tenant"] == "acme"
    answer = httpx.get(f"{served[0].url}/v1/whoami", headers={"Authorization": f"Bearer {made['token']}"})
    assert answer.json()["tenant"] == "acme"
    refused = CliRunner().invoke(app, ["token", "create", "x", "--tenant", "a/b", *settings])
    assert refused.exit_code != 0
