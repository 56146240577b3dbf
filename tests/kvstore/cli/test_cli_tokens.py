"""``kvstore token`` on the command line."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from kvstore.admin.tokens import TokenBook
from kvstore.cli import app


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Of a node that has not run yet."""
    return tmp_path / "node"


def run(folder: Path, *arguments: str) -> Result:
    settings = ("--set", f"api.tokens={folder / 'tokens.json'}", "--set", f"node.directory={folder}")
    return CliRunner().invoke(app, ["token", *arguments, *settings])


def test_makes_lists_and_ends_tokens(folder: Path) -> None:
    text = run(folder, "create", "night shift", "--role", "operator", "--days", "1").stdout.splitlines()[0]
    token = TokenBook(folder / "tokens.json").check(text)
    assert token is not None
    assert "night shift" in run(folder, "list").stdout
    run(folder, "revoke", token.id)
    assert TokenBook(folder / "tokens.json").check(text) is None


def test_a_token_that_is_made_or_ended_has_a_line_in_the_audit_log(folder: Path) -> None:
    made = run(folder, "create", "acme's own", "--role", "operator", "--tenant", "acme", "--json")
    token = json.loads(made.stdout)
    assert run(folder, "revoke", token["id"]).exit_code == 0
    assert run(folder, "revoke", token["id"]).exit_code != 0
    created, revoked = map(json.loads, (folder / "audit.jsonl").read_text().splitlines())
    asked = {"verb": "create token", "name": "acme's own", "role": "operator", "tenant": "acme"}
    whose = {"who": f"user {os.geteuid()}", "from": "command line", "token": token["id"]}
    assert created.items() >= (asked | whose).items()
    assert (revoked["who"], revoked["verb"], revoked["token"]) == (created["who"], "revoke token", token["id"])
    assert token["token"].split("_", 2)[2] not in (folder / "audit.jsonl").read_text()


def test_looking_leaves_none(folder: Path) -> None:
    assert run(folder, "list", "--json").stdout.strip() == "[]"
    assert not (folder / "audit.jsonl").exists()


def test_a_log_that_cannot_be_written_loses_no_token(folder: Path) -> None:
    folder.write_text("a file")
    made = CliRunner().invoke(
        app, ["token", "create", "x", "--set", f"api.tokens={folder}.json", "--set", f"node.directory={folder}"]
    )
    assert made.exit_code == 0
    assert made.stdout.startswith("kvs_")
