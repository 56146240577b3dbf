"""``kvstore policy``."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from kvstore.cli import options, output, prompts
from kvstore.cli.groups import grouped
from kvstore.cli.output import note, number, print_table
from kvstore.cli.overhttp import Api

if TYPE_CHECKING:
    from kvstore.admin.models.policy import Policy

app = typer.Typer(no_args_is_help=True, help="What a node keeps, through its admin API.")


class ModeName(StrEnum):
    """Modes of admission on the command line."""

    off = "off"
    observe = "observe"
    enforce = "enforce"


@app.command("show")
@grouped
def show_policy(api: Api, json: options.Json = False) -> None:
    """Show how blocks are admitted and evicted now, and what the rule of admission said."""
    with api.connect() as client:
        found = client.policy()
    output.show(json, found, lambda: _print(found))


@app.command("set")
@grouped
def set_policy(
    mode: Annotated[ModeName, typer.Argument(metavar="MODE", help="off, observe or enforce.")],
    api: Api,
    json: options.Json = False,
) -> None:
    """Switch admission, until the node stops; policy.admission says how it starts."""
    from kvstore.admin.models.policy import Mode

    with api.connect() as client:
        found = client.set_policy(Mode(mode.value))
    output.show(json, found, lambda: note(f"Admission is in {found.mode} until the node stops."))


@app.command("dry-run")
@grouped
def dry_run(prompt: prompts.Named, api: Api, json: options.Json = False) -> None:
    """Show what enforced admission would do with a prompt's blocks, offered to the slower tiers now. Changes nothing."""
    with api.connect() as client:
        found = client.dry_run(prompt.prompt())
    rows = [
        (tier, number(run.blocks), run.reason, "admits" if run.admits else "refuses")
        for tier, runs in found.tiers.items()
        for run in runs
    ]
    output.show(json, found, lambda: print_table(("tier", ">blocks", "rule", "says"), rows))


def _print(found: Policy) -> None:
    print(f"admission: {found.mode}; eviction: {found.eviction}")
    rows = [(d.tier, d.reason, number(d.blocks), "admits" if d.admits else "refuses") for d in found.decisions]
    print_table(("tier", "rule", ">blocks", "says"), rows, title="Decisions since the node's start")
