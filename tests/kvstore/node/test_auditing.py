"""What is changed over a node's socket is in the audit log."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from kvstore.errors import KVStoreError
from kvstore.identity import BlockKey
from kvstore.node.auditing import CHANGES
from kvstore.node.protocol import join_keys
from kvstore.testing.node import PatientClient, RunningNode
from kvstore.testing.tenants import prompt_of, save, tenant_site

KEYS = [BlockKey(bytes([number]) * 16) for number in (1, 2)]


def lines(folder: Path) -> list[dict[str, Any]]:
    path = folder / "audit.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_every_change_has_a_line_with_who_and_what_came_of_it(tmp_path: Path) -> None:
    with RunningNode(tmp_path) as node, PatientClient(node.socket, name="a script") as client:
        client.call("status")
        client.call("policy")
        client.call("policy", mode="observe")
        client.call("delete", keys=join_keys(KEYS))
        with pytest.raises(KVStoreError):
            client.call("evict", keys=join_keys(KEYS), medium="nowhere")
        verbs = node.node._verbs.table.keys()
    assert CHANGES - verbs == {"purge_tenant"}, "of a node with several tenants"
    found = lines(tmp_path)
    assert [(line["verb"], line["blocks"], bool(line["problem"])) for line in found] == [
        ("policy", None, False),
        ("delete", 2, False),
        ("evict", 2, True),
    ]
    assert {(line["who"], line["client"], line["pid"]) for line in found} == {
        (f"user {os.geteuid()}", "a script", os.getpid())
    }


def test_the_api_keeps_lines_of_its_own(tmp_path: Path) -> None:
    with RunningNode(tmp_path) as node, PatientClient(node.socket, name="admin API") as client:
        client.call("delete", keys=join_keys(KEYS))
    assert lines(tmp_path) == []


def test_purging_a_tenant_has_one_line_that_names_it() -> None:
    with tenant_site("acme") as site, site.running() as node, site.engine("acme") as engine:
        save(engine, prompt_of(2))
        with site.operator(node) as operator:
            operator.call("purge_tenant", name="acme")
        (line,) = lines(site.folder)
        assert (line["verb"], line["tenant"], line["problem"]) == ("purge_tenant", "acme", "")
