"""The ``kvstore`` command.

    options.py   options that commands share; groups.py makes several of them one parameter
    output.py    tables and JSON
    settings.py  config
    node.py      node, status
    blocks.py    ls, get, verify, rm
    hot.py       hot
    explain.py   explain
    breakers.py  breakers
    pins.py      pin, unpin, pins
    prompts.py   how commands are told a prompt
    checks.py    doctor
    catalog.py   catalog status, catalog rebuild
    api.py       api
    overhttp.py  the admin API, for those that talk to it:
    top.py       top
    insight.py   lookup, tree, models
    evict.py     evict
    jobs.py      jobs
    policy.py    policy
    replication.py  replication
    purge.py     purge
    tenants.py   tenants

Other packages add theirs through the entry-point group ``kvstore.commands``: a function, or a typer.Typer with several.
Commands import what they need when they run, so that ``--help`` is quick.
"""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import Any

import typer
from typer.core import TyperGroup

from kvstore.cli import (
    api,
    blocks,
    breakers,
    catalog,
    checks,
    evict,
    explain,
    hot,
    insight,
    jobs,
    node,
    pins,
    policy,
    purge,
    replication,
    settings,
    tenants,
    tokens,
    top,
)
from kvstore.cli.output import fail
from kvstore.cli.overhttp import TOKEN
from kvstore.errors import AdminRefused, ConfigError, IdentityError, KVStoreError, NodeUnavailable

OK, FOUND_PROBLEM, BAD_INPUT, NO_NODE = range(4)

_EXIT_STATUS = "Exit status: 0 all well, 1 a problem was found, 2 bad input or configuration, 3 no node answers."


class _Commands(TyperGroup):
    """Turns this package's errors into one line and an exit status."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (ConfigError, IdentityError) as error:
            fail(error, BAD_INPUT)
        except NodeUnavailable as error:
            fail(error, NO_NODE, "Start one with `kvstore node`, or say where it is with --socket or --api.")
        except AdminRefused as error:
            status = BAD_INPUT if error.status == 422 else FOUND_PROBLEM
            fail(error, status, f"Put the token into {TOKEN}." if error.status == 401 else "")
        except KVStoreError as error:
            fail(error, FOUND_PROBLEM)


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="KV-cache persistence and sharing for LLM inference.",
    epilog=_EXIT_STATUS,
)
app.command("node")(node.run)
app.command("api")(api.run)
app.command("status")(node.status)
app.command("ls")(blocks.ls)
app.command("get")(blocks.get)
app.command("verify")(blocks.verify)
app.command("rm")(blocks.rm)
app.command("hot")(hot.show)
app.command("explain")(explain.show)
app.command("lookup")(insight.lookup)
app.command("tree")(insight.tree)
app.command("models")(insight.models)
app.command("breakers")(breakers.show)
app.command("pin")(pins.pin)
app.command("unpin")(pins.unpin)
app.command("pins")(pins.show)
app.command("config")(settings.show)
app.command("doctor")(checks.doctor)
app.add_typer(catalog.app, name="catalog")
app.command("top")(top.run)
app.command("evict")(evict.evict)
app.command("purge")(purge.purge)
app.add_typer(jobs.app, name="jobs")
app.add_typer(policy.app, name="policy")
app.add_typer(replication.app, name="replication")
app.add_typer(tenants.app, name="tenants")
app.add_typer(tokens.app, name="token")
app.command("key")(tokens.new_key)
for entry in sorted(entry_points(group="kvstore.commands"), key=lambda entry: entry.name):
    command = entry.load()
    if isinstance(command, typer.Typer):
        app.add_typer(command, name=entry.name)
    else:
        app.command(entry.name)(command)


def main() -> None:
    """Entry point of the ``kvstore`` script."""
    app(prog_name="kvstore")
