"""``kvstore region``. Imports what is heavy when a command runs."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvstore.cli import options
from kvstore.cli.output import note, number, print_json, print_table
from kvstore.errors import ConfigError, KVStoreError
from replication import servicecli
from replication.servicecli import RegionName, TopologyFile, load_site, matching_key
from replication.show import human, print_status, progress_bars, show, show_cycle

if TYPE_CHECKING:
    from replication.site import Site
    from replication.topology import Topology

INTERRUPTED = 130

Watch = Annotated[bool, typer.Option("--watch", help="Go on until SIGINT or SIGTERM.")]
Interval = Annotated[float, typer.Option(metavar="SECONDS", min=0.1, help="Pause between rounds of --watch.")]

region = typer.Typer(
    no_args_is_help=True, help="Replicate hot prompts between regions.", epilog="docs/regions.md walks through it."
)


region.command("run")(servicecli.run)


@region.command()
def key(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Where to write the private key.")],
    json: options.Json = False,
) -> None:
    """Make the key with which a region signs its manifests, and print the public half for the topology file."""
    from replication.keys import create_key, public_text

    public = public_text(create_key(file).public_key())
    show(json, {"public_key": public}, lambda: f'public_key = "{public}"')


@region.command()
def publish(
    topology: TopologyFile,
    region: RegionName,
    signing_key: Annotated[
        Path, typer.Option("--key", metavar="FILE", help="The region's private key.", envvar="KVSTORE_REGION_KEY")
    ],
    watch: Watch = False,
    interval: Interval = 60.0,
    config: options.ConfigFile = None,
    overrides: options.Overrides = None,
    json: options.Json = False,
) -> None:
    """Publish what is hot in the region's bucket, signed, for the other regions to pull.

    With a catalog (--config) the region's nodes are asked first what is hot now.
    """
    from dataclasses import asdict

    from replication.lease import hold
    from replication.publisher import publish as publish_once

    regions, site = _load(topology, region, config, overrides)
    private = matching_key(regions, region, signing_key)

    async def once() -> int:
        async with site.open_contents() as contents, hold(contents.bucket, "publisher"):
            heard = await contents.ask_nodes()
            manifest = await publish_once(contents, region, private)
        size = sum(block.nbytes for block in manifest.blocks)
        show(
            json,
            {
                "sequence": manifest.sequence,
                "blocks": len(manifest.blocks),
                "bytes": size,
                "nodes": heard and asdict(heard),
            },
            lambda: f"Published {number(len(manifest.blocks))} blocks ({human(size)}), sequence {manifest.sequence}.",
        )
        if heard is None:
            note("No catalog to ask the nodes by: what they saved since their last report, every 15 s, may be missing.")
        elif heard.silent:
            named = ", ".join(heard.silent)
            note(f"Did not report in time, so what they saved in the last 15 s may be missing: {named}.")
        return 0

    _repeat(once, watch, interval)


@region.command()
def plan(
    topology: TopologyFile,
    region: RegionName,
    config: options.ConfigFile = None,
    overrides: options.Overrides = None,
    json: options.Json = False,
) -> None:
    """Show what a replication would copy now, what it would cost, and what would be left out and why."""
    from replication.replicator import Replicator

    regions, site = _load(topology, region, config, overrides)

    async def once() -> int:
        async with (
            site.open_catalog() as catalog,
            Replicator.open(regions, region, catalog, capacity=site.capacity) as replicator,
        ):
            cycle = await replicator.plan()
        show_cycle(cycle, json, done=False)
        return int(bool(cycle.problems))

    _repeat(once, False, 0.0)


@region.command()
def replicate(
    topology: TopologyFile,
    region: RegionName,
    watch: Watch = False,
    interval: Interval = 30.0,
    budget: Annotated[
        str, typer.Option(metavar="SIZE", help="Bytes to copy at most in a round, besides the topology's limits.")
    ] = "",
    rate: Annotated[
        str, typer.Option(metavar="SIZE", help="Bytes per second at most, besides the topology's limits.")
    ] = "",
    config: options.ConfigFile = None,
    overrides: options.Overrides = None,
    json: options.Json = False,
) -> None:
    """Pull what is hot elsewhere into the region's bucket. The topology's mode says whether it is only observed."""
    from replication.lease import hold
    from replication.replicator import Replicator

    regions, site = _load(topology, region, config, overrides)
    if regions.mode == "off":
        note('Replication is off: mode = "off" in the topology.')
        return
    regions = regions.limited(options.size("--rate", rate))
    most = options.size("--budget", budget)

    async def once() -> int:
        async with (
            site.open_catalog() as catalog,
            Replicator.open(regions, region, catalog, most, site.capacity) as replicator,
        ):
            if regions.mode == "observe":
                cycle = await replicator.plan()
            else:
                async with hold(replicator.near, "replicator"):
                    with progress_bars() as advance:
                        cycle = await replicator.cycle(advance)
        show_cycle(cycle, json, done=regions.mode == "enforce")
        return int(bool(cycle.problems))

    _repeat(once, watch, interval)


@region.command()
def retire(
    topology: TopologyFile,
    region: RegionName,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would go.")] = False,
    config: options.ConfigFile = None,
    overrides: options.Overrides = None,
    json: options.Json = False,
) -> None:
    """Delete what the topology's retention keeps no longer in this region. In mode "observe" only shows it."""
    from replication.lease import hold
    from replication.retiring import retire as retire_once

    regions, site = _load(topology, region, config, overrides)
    enforce = regions.mode == "enforce" and not dry_run

    async def once() -> int:
        async with site.open_contents() as contents, hold(contents.bucket, "retention"):
            report = await retire_once(contents, regions.retention, enforce)
        rows: list[dict[str, Any]] = [
            {"model": model, "tenant": tenant, "reason": reason, "blocks": count}
            for (model, tenant, reason), count in sorted(report.blocks.items())
        ]
        if json:
            print_json({"retired": enforce, "blocks": rows, "bytes": report.nbytes})
            return 0
        print_table(
            ("model", "tenant", "reason", ">blocks"),
            [(row["model"], row["tenant"], row["reason"], number(row["blocks"])) for row in rows],
        )
        print(f"{human(report.nbytes)} {'deleted' if enforce else 'would be deleted'}")
        return 0

    _repeat(once, False, 0.0)


@region.command()
def status(topology: TopologyFile, region: RegionName, json: options.Json = False) -> None:
    """Show the region's manifest, how far it is with every source, and who holds the leases."""
    from replication.links import Links
    from replication.status import duties, look

    regions, _ = _load(topology, region)

    async def once() -> int:
        async with Links.open(regions.links(region)) as bucket:
            found = await look(bucket, regions, region) | {"duties": await duties(bucket)}
        if json:
            print_json(found)
        else:
            print_status(found)
        return 0

    _repeat(once, False, 0.0)


@region.command()
def purge(
    topology: TopologyFile,
    region: RegionName,
    tenant: Annotated[str, typer.Option(metavar="NAME", help="All blocks of this tenant.")] = "",
    model: Annotated[str, typer.Option(metavar="NAME", help="All blocks of this model.")] = "",
    namespace: Annotated[str, typer.Option(metavar="HEX", help="All blocks of this namespace.")] = "",
    prefix: Annotated[str, typer.Option(metavar="KEY", help="This block and all that continue it.")] = "",
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    config: options.ConfigFile = None,
    overrides: options.Overrides = None,
    json: options.Json = False,
) -> None:
    """Delete blocks here and, with the next manifests, in every region. Options together narrow it down."""
    import time

    from kvstore.tombstones import Tombstone, end_of_second
    from replication.publisher import entomb

    _, site = _load(topology, region, config, overrides)
    if not (tenant or model or namespace or prefix):
        raise ConfigError("purge", "", "nothing is named", "Give --tenant, --model, --namespace or --prefix.")
    stone = Tombstone(
        time=end_of_second(time.time()),
        tenant=tenant,
        model=model,
        namespace=_digest("--namespace", namespace),
        prefix=_digest("--prefix", prefix),
    )
    if not yes:
        selectors = {"tenant": tenant, "model": model, "namespace": namespace, "prefix": prefix}
        named = [f"{kind} {name}" for kind, name in selectors.items() if name]
        typer.confirm(f"Delete every block of {', '.join(named)} in all regions?", abort=True, err=True)

    async def once() -> int:
        async with site.open_contents() as contents:
            deleted = await entomb(contents, [stone])
        show(
            json,
            {"tombstone": stone.identity, "deleted": deleted},
            lambda: f"{number(deleted)} blocks deleted here; other regions follow when they see the next manifest.",
        )
        return 0

    _repeat(once, False, 0.0)


def _load(
    path: Path, region: str, config: Path | None = None, overrides: list[str] | None = None
) -> tuple[Topology, Site]:
    """The topology, and the region in it with what its configuration adds. Raises ConfigError."""
    site = load_site(options.load(config, overrides).config, path, region)
    assert site.topology is not None
    return site.topology, site


def _repeat(once: Callable[[], Awaitable[int]], watch: bool, interval: float) -> None:
    """Run once, or until a signal; then a round that fails is said and tried again."""
    import asyncio
    import signal

    async def run() -> int:
        task = asyncio.current_task()
        assert task is not None
        for signum in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(signum, task.cancel)
        while True:
            try:
                status = await once()
            except ConfigError:
                raise
            except KVStoreError as error:
                if not watch:
                    raise
                note(f"{type(error).__name__}: {error}")
            if not watch:
                return status
            await asyncio.sleep(interval)

    try:
        status = asyncio.run(run())
    except asyncio.CancelledError:
        raise typer.Exit(0 if watch else INTERRUPTED) from None
    if status:
        raise typer.Exit(status)


def _digest(option: str, text: str) -> bytes:
    try:
        digest = bytes.fromhex(text)
    except ValueError:
        digest = b"?"
    if digest and len(digest) != 16:
        raise ConfigError(option, text, "not 32 hexadecimal digits", "Copy it from kvstore ls or kvstore status.")
    return digest
