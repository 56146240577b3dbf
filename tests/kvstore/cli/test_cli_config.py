"""Commands that need no node."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kvstore.cli import app

runner = CliRunner()


def test_config_shows_each_value_with_its_origin(tmp_path: Path) -> None:
    file = tmp_path / "node.toml"
    file.write_text('[identity]\nsecret = "correct horse battery staple"\n')
    arguments = ["config", "--config", str(file), "--set", "host.bytes=2GiB"]
    result = runner.invoke(app, arguments, env={"KVSTORE_DISK__THREADS": "7"})
    assert result.exit_code == 0, result.output
    rows = {cells[0]: cells[1:] for line in result.stdout.splitlines() if (cells := line.split())}
    assert rows["host.bytes"] == ["2GiB", "--set"]
    assert rows["disk.threads"] == ["7", "KVSTORE_DISK__THREADS"]
    assert rows["identity.secret"] == ["********", f"{file}:2"]
    assert rows["disk.enabled"] == ["true", "default"]

    result = runner.invoke(app, [*arguments, "--json"], env={"KVSTORE_DISK__THREADS": "7"})
    settings = {setting["name"]: setting for setting in json.loads(result.stdout)}
    assert (settings["disk.threads"]["value"], settings["disk.threads"]["origin"]) == ("7", "KVSTORE_DISK__THREADS")
    assert "staple" not in result.output


@pytest.mark.parametrize("command", ["config", "node", "status", "ls", "doctor"])
def test_a_bad_setting_is_bad_input_everywhere(command: str) -> None:
    result = runner.invoke(app, [command, "--set", "host.byts=1GiB"])
    assert result.exit_code == 2
    assert "Did you mean host.bytes?" in result.stderr


def test_a_node_that_cannot_start_says_what_to_change(tmp_path: Path) -> None:
    overrides = [f"node.directory={tmp_path}", f"node.socket={tmp_path}/s", "host.bytes=100TiB"]
    result = runner.invoke(app, ["node", *(part for text in overrides for part in ("--set", text))])
    assert result.exit_code == 2
    assert "Lower host.bytes" in result.stderr


def test_help_names_the_exit_statuses_and_every_command() -> None:
    result = runner.invoke(app, ["--help"])
    assert result.exit_code == 0
    for expected in ("3 no node answers", "node", "status", "ls", "get", "verify", "rm", "config", "doctor"):
        assert expected in result.stdout


def test_verify_without_node_and_storage_is_bad_input(tmp_path: Path) -> None:
    arguments = ["--set", f"node.directory={tmp_path}/data", "--socket", f"{tmp_path}/none.sock"]
    assert runner.invoke(app, ["verify", *arguments]).exit_code == 2
    assert not (tmp_path / "data").exists()
