"""The document and the app agree: requests made from the document meet no server error, and answers have its shape."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from api_site import Site, api_site
from hypothesis import HealthCheck, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from kvstore.admin.openapi import document

ROOT = Path(__file__).parents[3]

DOCUMENT = document()

schema = schemathesis.openapi.from_dict(DOCUMENT).exclude(path_regex="events$")
"""Streams do not end; their tests are with jobs and snapshots."""


@pytest.fixture(scope="module")
def any_api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """One in a region, that may be changed at will."""
    folder = tmp_path_factory.mktemp("region")
    (folder / "bucket").mkdir()
    (folder / "regions.toml").write_text(f'[regions.local]\nurl = "file://{folder}/bucket"\n')
    with api_site("region.name=local", f"region.topology={folder / 'regions.toml'}") as site:
        yield site


@schema.parametrize()
@settings(max_examples=8, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
def test_requests_from_the_document_meet_no_server_error(case: Any, any_api: Site) -> None:
    checks = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
    case.call_and_validate(base_url=any_api.api.url, checks=checks)


def test_the_kept_document_is_current() -> None:
    kept = json.loads((ROOT / "docs" / "openapi.json").read_text())
    assert kept == DOCUMENT, "run: python -m kvstore.admin.openapi docs/openapi.json"


def test_every_route_is_described() -> None:
    for path, item in DOCUMENT["paths"].items():
        for method, operation in item.items():
            assert operation["tags"], f"{method} {path}"
            assert operation["description"].endswith((".", "`.")), f"{method} {path}"
    names = [operation["operationId"] for item in DOCUMENT["paths"].values() for operation in item.values()]
    assert len(names) == len(set(names))


def test_every_body_and_every_part_of_a_path_has_an_example() -> None:
    def shown(schema: dict[str, Any]) -> bool:
        if reference := schema.get("$ref", "").rpartition("/")[2]:
            return shown(DOCUMENT["components"]["schemas"][reference])
        return bool(schema.keys() & {"examples", "enum"} or any(map(shown, schema.get("properties", {}).values())))

    bare = []
    for path, item in DOCUMENT["paths"].items():
        for method, operation in item.items():
            body = operation.get("requestBody", {}).get("content", {}).get("application/json")
            parts = [one for one in operation.get("parameters", []) if one["in"] == "path"]
            named = {one["name"]: bool(one.get("examples")) or shown(one["schema"]) for one in parts}
            bare += [f"{method} {path}: {name}" for name, has in named.items() if not has]
            bare += [f"{method} {path}"] if body and not shown(body["schema"]) else []
    assert bare == []
