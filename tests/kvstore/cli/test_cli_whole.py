"""What holds of every command."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from kvstore.cli import app

SERVICES = {"node", "api", "up", "region run"}
"""They run until they are stopped, and log."""


def commands(command: Any, *names: str) -> Iterator[tuple[str, Any]]:
    """All of them, by what one types."""
    inner = getattr(command, "commands", None)
    if inner is None:
        yield " ".join(names), command
        return
    for name, one in inner.items():
        yield from commands(one, *names, name)


COMMANDS = dict(commands(get_command(app)))


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_it_says_what_it_does_and_prints_json(name: str) -> None:
    shown = CliRunner().invoke(app, [*name.split(), "--help"])
    assert shown.exit_code == 0
    assert COMMANDS[name].help
    options = {option for one in COMMANDS[name].params for option in one.opts}
    assert ("--json" in options) == (name not in SERVICES)


def test_a_shell_completes_commands() -> None:
    asked = {"_KVSTORE_COMPLETE": "complete_bash", "COMP_WORDS": "kvstore repl", "COMP_CWORD": "1"}
    told = subprocess.run(
        [sys.executable, "-c", "from kvstore.cli import main; main()"],
        env={**os.environ, **asked}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert told.stdout.split() == ["replication"]
