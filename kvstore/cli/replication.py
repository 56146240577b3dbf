"""``kvstore replication``."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated

import typer

from kvstore.cli import options, output
from kvstore.cli.groups import grouped
from kvstore.cli.jobs import follow_job, show_job
from kvstore.cli.output import ago, note, number, print_table
from kvstore.cli.overhttp import Api

if TYPE_CHECKING:
    from kvstore.admin.models.replication import Paused, ReplicationStatus, TopologyInfo

Sources = Annotated[
    list[str] | None, typer.Argument(metavar="[SOURCE]...", help="Regions to pull from; all, if none is named.")
]
Follow = Annotated[bool, typer.Option(help="Wait for its end.")]

app = typer.Typer(no_args_is_help=True, help="What flows into a region, through the admin API of its node or service.")


@app.command()
@grouped
def status(api: Api, json: options.Json = False) -> None:
    """Show how far the region is with each source, what that cost, and what it has published itself."""
    with api.connect() as client:
        found = client.replication()
    output.show(json, found, lambda: _print(found))


@app.command()
@grouped
def topology(api: Api, json: options.Json = False) -> None:
    """Show which regions there are, and what may flow between them."""
    with api.connect() as client:
        found = client.topology()
    output.show(json, found, lambda: _print_topology(found))


@app.command()
@grouped
def pause(sources: Sources = None, *, api: Api, json: options.Json = False) -> None:
    """Copy nothing from sources from the next round on, in any process of the region. Purges arrive all the same."""
    with api.connect() as client:
        _show_paused(client.pause_replication(sources or []), json)


@app.command()
@grouped
def resume(sources: Sources = None, *, api: Api, json: options.Json = False) -> None:
    """Go on copying."""
    with api.connect() as client:
        _show_paused(client.resume_replication(sources or []), json)


@app.command()
@grouped
def plan(follow: Follow = True, *, api: Api, json: options.Json = False) -> None:
    """Show what a replication would copy now, what it would cost, and what would be left out. Changes nothing."""
    _run("replication-plan", follow, api, json)


@app.command()
@grouped
def resync(follow: Follow = True, *, api: Api, json: options.Json = False) -> None:
    """List the bucket anew and copy what it lacks. Ctrl-C leaves it running."""
    _run("resync", follow, api, json)


def _show_paused(found: Paused, json: bool) -> None:
    paused = [f"{source} is paused: {why}" for source, why in found.paused.items()]
    output.show(json, found, lambda: note("\n".join(paused) or "Nothing is paused."))


def _run(kind: str, follow: bool, api: Api, json: bool) -> None:
    with api.connect() as client:
        job = client.run_job(kind)
        show_job(follow_job(client, job) if follow else job, json)


def _print(found: ReplicationStatus) -> None:
    from kvstore.units import human_bytes

    own, now = found.manifest, time.time()
    published = (
        f"manifest of {number(own.blocks)} blocks ({human_bytes(own.bytes)}), {ago(now - own.published)} ago"
        if own
        else "no manifest published yet"
    )
    print(f"{found.region} ({found.mode}): {published}")
    print_table(
        ("source", "state", ">behind", ">blocks", ">bytes", ">this month", ">cost"),
        [
            (
                source,
                state_of(row.paused, row.problem),
                "never level" if row.lag_seconds is None else ago(row.lag_seconds),
                number(row.blocks),
                human_bytes(row.bytes),
                human_bytes(row.month_bytes),
                f"{row.month_cost:.2f}",
            )
            for source, row in found.sources.items()
        ],
        title="Sources",
    )
    duties = [(duty, lease.holder if lease.held else "nobody") for duty, lease in found.leases.items()]
    if duties:
        print_table(("duty", "done by"), duties, title="Duties")


def state_of(paused: str, problem: str) -> str:
    """What keeps a source from being copied, if anything does."""
    return f"paused: {paused}" if paused else problem or "copies"


def _print_topology(found: TopologyInfo) -> None:
    print(f"This is {found.region}; mode {found.mode}.")
    print_table(
        ("region", "bucket", "location", "publishes"),
        [(row.name, row.url, row.location or "-", "yes" if row.publishes else "no") for row in found.regions],
        title="Regions",
    )
    print_table(
        ("from", "to", "models", "tenants", ">bytes/s", ">per GB"),
        [
            (
                flow.source,
                ", ".join(flow.to),
                ", ".join(flow.models) or "all",
                ", ".join(flow.tenants) or "all",
                number(flow.bytes_per_second) if flow.bytes_per_second else "no limit",
                f"{flow.price_per_gb:.4f}",
            )
            for flow in found.flows
        ],
        title="Flows",
    )
