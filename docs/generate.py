"""Rewrites the generated parts of the user documentation: ``python docs/generate.py`` (``make docs``).

The table of settings comes from the configuration object, the command reference from the command line's own help.
A test holds the files to what this prints.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from kvstore.cli import app
from kvstore.config import fields, load

DOCS = Path(__file__).parent
SHARED = {"config", "overrides", "socket", "json"}
"""Options described once, in the text of cli.md."""


def settings() -> str:
    """One table per section."""
    loaded = load(environ={"XDG_RUNTIME_DIR": "$XDG_RUNTIME_DIR"})
    defaults = {setting.name: setting.value for setting in loaded.settings()}
    # These two depend on who asks.
    defaults["node.socket"] = "$XDG_RUNTIME_DIR/kvstore/node.sock, or /tmp/kvstore-UID/node.sock"
    defaults["node.directory"] = "/var/lib/kvstore for root, else ~/.cache/kvstore"
    out = []
    section = None
    for name, part, _, description in fields():
        if part != section:
            section = part
            out += ["", f"## `[{part}]`", "", "| key | default | what it is |", "|---|---|---|"]
        out.append(f"| `{name}` | {defaults[name] or '(empty)'} | {description} |")
    return "\n".join(out).strip()


def commands() -> str:
    """Arguments and options of every command; those that all share stand in the text before."""
    parts = []
    for name, command in _commands("kvstore", typer.main.get_command(app)):
        own = [f"| `{_usage(p)}` | {p.help} |" for p in command.params if p.name not in SHARED]
        table = "\n".join(("| | |", "|---|---|", *own)) if own else ""
        parts += [f"## `{name}`", command.help, table]
    return "\n\n".join(part for part in parts if part)


def _commands(name: str, group: Any) -> Iterator[tuple[str, Any]]:
    """Every command by its whole name; a group comes before its commands."""
    for part, command in group.commands.items():
        yield f"{name} {part}", command
        if hasattr(command, "commands"):
            yield from _commands(f"{name} {part}", command)


def _usage(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        return str(parameter.metavar)
    value = "" if parameter.is_flag else f" {parameter.metavar}"
    return ", ".join(parameter.opts) + value


GENERATED = {"configuration.md": settings, "cli.md": commands}


def render(file: str) -> str:
    """The text that ``file`` should have: what is between the marks is made anew."""
    text = (DOCS / file).read_text()
    body = f"<!-- generated: make docs -->\n\n{GENERATED[file]()}\n\n<!-- end -->"
    return re.sub(r"<!-- generated: make docs -->.*<!-- end -->", lambda _: body, text, flags=re.S)


if __name__ == "__main__":
    for file in GENERATED:
        (DOCS / file).write_text(render(file))
