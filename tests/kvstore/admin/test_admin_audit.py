"""Every route that changes something leaves a line in the audit log, whether it was allowed, refused or failed."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from kvstore.admin.auth import Role
from kvstore.admin.guard import WRITES
from kvstore.admin.openapi import document
from kvstore.admin.tokens import TokenBook
from kvstore.testing.admin import RunningApi
from kvstore.testing.tenants import tenant_site

QUESTIONS = {
    *("/v1/blocks/query", "/v1/lookup", "/v1/explain", "/v1/tree", "/v1/policy/dry-run", "/v1/replication/holdings"),
    *("/v1/router/lookup", "/v1/router/peek"),
}
"""Asked by POST, since a prompt does not fit into an address; they change nothing."""

ROUTES = [
    (method.upper(), path)
    for path, methods in document()["paths"].items()
    for method in methods
    if method.upper() in WRITES and path not in QUESTIONS
]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[RunningApi, Path, str]]:
    """An API with every route, its audit log, and an admin's token. More strangers a second than are kept otherwise."""
    tokens = tmp_path_factory.mktemp("tokens") / "tokens.json"
    _, text = TokenBook(tokens).create("root", Role.ADMIN)
    with pytest.MonkeyPatch.context() as patch, tenant_site("acme") as site, site.running():
        patch.setattr("kvstore.audit.STRANGERS_PER_SECOND", 1000)
        bucket = site.folder / "bucket"
        topology = site.folder / "regions.toml"
        topology.write_text(f'[regions.eu]\nurl = "file://{bucket}"\n')
        settings = [
            *(f"tenants.book={site.book.path}", f"api.tokens={tokens}", f"object.url=file://{bucket}"),
            *("region.name=eu", f"region.topology={topology}"),
        ]
        with RunningApi(site.folder, *settings) as api:
            yield api, site.folder / "audit.jsonl", text


def test_there_is_no_write_beside_these() -> None:
    assert len(ROUTES) > 15
    assert {path for _, path in ROUTES} & QUESTIONS == set()


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_every_write_is_kept(served: tuple[RunningApi, Path, str], method: str, path: str) -> None:
    api, log, token = served
    address = re.sub(r"{\w+}", "0" * 32, path)
    before = lines(log)
    for headers in ({}, {"Authorization": f"Bearer {token}"}):
        httpx.request(method, api.url + address, headers=headers, timeout=30)
    new = lines(log)[len(before) :]
    assert [(one["who"], one["method"], one["path"]) for one in new] == [
        (None, method, address),
        ("root", method, address),
    ]
    assert new[0]["status"] == 401
    assert new[1]["status"] != 401


def lines(log: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
