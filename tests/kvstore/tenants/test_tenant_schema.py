"""Requests made from the API's document, beside a node that has several tenants."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from kvstore.admin.openapi import document
from kvstore.testing.admin import RunningApi
from kvstore.testing.tenants import tenant_site

schema = schemathesis.openapi.from_dict(document()).include(path_regex="^/v1/tenants")


@pytest.fixture(scope="module")
def served() -> Iterator[RunningApi]:
    with tenant_site("acme", overrides=("tenants.host_bytes=1MiB",)) as site, site.running():
        with RunningApi(site.folder, f"tenants.book={site.folder / 'tenants.json'}") as api:
            yield api


@schema.parametrize()
@settings(max_examples=8, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
def test_requests_about_tenants_meet_no_server_error(case: Any, served: RunningApi) -> None:
    if "name" in case.path_parameters and len(case.path_parameters["name"]) % 2:
        case.path_parameters["name"] = "acme"  # else hardly any request is about a tenant that there is
    checks = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
    case.call_and_validate(base_url=served.url, checks=checks)
