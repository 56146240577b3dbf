"""``kvstore catalog``."""

from __future__ import annotations

import asyncio
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import typer

from kvstore.cli import options
from kvstore.cli.groups import grouped
from kvstore.cli.output import ago, note, number, print_json, print_table
from kvstore.errors import ConfigError

if TYPE_CHECKING:
    from kvstore.catalog import Catalog
    from kvstore.config import Config

app = typer.Typer(no_args_is_help=True, help="The index of the bucket that the nodes of a region share.")


@app.command()
@grouped
def status(source: options.Settings, json: options.Json = False) -> None:
    """Show what the catalog holds, which nodes are alive, and who does the region's duties."""
    from kvstore.catalog.cursors import cursors
    from kvstore.catalog.presence import FOLDER, present
    from kvstore.units import human_bytes

    async def ask(catalog: Catalog) -> Any:
        nodes = present((await catalog.documents.read_all(FOLDER)).values())
        return await catalog.status(), nodes, await cursors(catalog.documents)

    found, nodes, sources = asyncio.run(_with_catalog(source.load().config, ask))
    now = time.time()
    claims = [(claim.name, claim.holder, max(0.0, claim.expires - now)) for claim in found.claims]
    if json:
        print_json(
            {
                "epoch": found.epoch,
                "complete": found.complete,
                "blocks": found.blocks,
                "used_bytes": found.used_bytes,
                "changes": found.changes,
                "claims": [
                    {"name": name, "holder": holder, "seconds_left": round(left, 1)} for name, holder, left in claims
                ],
                "nodes": [asdict(node) for node in nodes],
                "sources": [asdict(cursor) for cursor in sources],
            }
        )
        return
    covers = "covers the bucket" if found.complete else "does not cover the whole bucket yet"
    print(f"{number(found.blocks)} blocks, {human_bytes(found.used_bytes)}; {covers}")
    print(f"epoch {found.epoch}, {number(found.changes)} changes")
    if claims:
        print_table(("claim", "holder", ">runs out in"), [(name, holder, ago(left)) for name, holder, left in claims])
    if nodes:
        print_table(
            ("node", "process", "API", "version", ">up for"),
            [(one.name, one.process, one.api or "none", one.version, ago(max(now - one.started, 0))) for one in nodes],
        )
    if sources:
        print_table(
            ("source", ">manifest", ">copied", ">behind", "problem"),
            [
                (
                    one.source,
                    number(one.sequence),
                    f"{number(one.blocks)} blocks, {human_bytes(one.nbytes)}",
                    ago(max(now - one.caught_up, 0)) if one.caught_up else "never level",
                    one.problem,
                )
                for one in sources
            ],
        )


@app.command()
@grouped
def rebuild(source: options.Settings, json: options.Json = False) -> None:
    """Drop the catalog's index and fill it again from a listing of the bucket. Nodes go on serving meanwhile."""
    from rich.console import Console

    from kvstore.assembly import rebuild_catalog

    settings = source.load().config
    started = time.monotonic()

    async def work(catalog: Catalog) -> int:
        with Console(stderr=True).status("listing the bucket") as shown:
            return await rebuild_catalog(settings, catalog, lambda blocks: shown.update(f"{number(blocks)} blocks"))

    blocks = asyncio.run(_with_catalog(settings, work))
    seconds = time.monotonic() - started
    if json:
        print_json({"blocks": blocks, "seconds": round(seconds, 3)})
    else:
        note(f"Catalog rebuilt: {number(blocks)} blocks in {seconds:.1f} s.")


async def _with_catalog(config: Config, work: Any) -> Any:
    """What ``work`` makes of the configured catalog. Raises ConfigError when there is none."""
    from kvstore.assembly import open_catalog

    catalog = await open_catalog(config)
    if catalog is None:
        raise ConfigError("catalog.url", "", "no catalog is configured", "Set it to redis://host:6379/0, for example.")
    try:
        return await work(catalog)
    finally:
        await catalog.close()
