"""``kvstore node`` and ``kvstore status``."""

from __future__ import annotations

from typing import Any

from kvstore.cli import options, output
from kvstore.cli.groups import grouped
from kvstore.cli.output import ago, note, number, print_table, size


@grouped
def run(node: options.Node) -> None:
    """Run this machine's node in the foreground, until SIGINT or SIGTERM."""
    import asyncio

    from kvstore.admin.process import beside
    from kvstore.cli.logs import configure
    from kvstore.node.server import serve

    loaded = node.load()
    configure(loaded.config.node.log_level)
    if loaded.config.identity.is_public and loaded.config.object.url.startswith("s3:"):
        note("Warning: no tenant secret is set, so whoever can list the bucket can guess which prompts are in it.")
        note("Set identity.secret_file on every node that shares the bucket.")

    async def run() -> None:
        async with beside(loaded.config, node.arguments()):
            await serve(loaded.config)

    asyncio.run(run())


@grouped
def status(node: options.Node, json: options.Json = False) -> None:
    """Show the node's tiers, counters and clients."""
    with node.connect() as client:
        document = client.call("status")
    output.show(json, document, lambda: _print(document))


def _print(document: dict[str, Any]) -> None:
    from kvstore.units import human_bytes

    state = "draining" if document["draining"] else "up"
    print(
        f"node {document['epoch']:016x}, version {document['version']}, pid {document['pid']}, "
        f"{state} for {ago(document['uptime_seconds'])}"
    )
    print_table(
        ("tier", ">blocks", ">used", ">capacity", ">full", ">queued", ">evicted", ">refused", ">quarantined"),
        [
            (
                tier["medium"],
                number(tier["blocks"]),
                human_bytes(tier["used_bytes"]),
                human_bytes(tier["capacity_bytes"]) if tier["capacity_bytes"] else "no limit",
                f"{tier['used_bytes'] / tier['capacity_bytes']:.0%}" if tier["capacity_bytes"] else "",
                human_bytes(document["queued_bytes"].get(tier["medium"], 0)),
                number(tier["evicted"]),
                number(tier["refused"]),
                number(tier["quarantined"]),
            )
            for tier in document["tiers"]
        ],
        title="Tiers",
    )
    if document["namespaces"]:
        print_table(
            ("namespace", "model", "tenant", "dtype", ">block tokens", ">block size"),
            [
                (
                    space["digest"].hex(),
                    space["fields"].get("model", "?"),
                    space["fields"].get("tenant", "?"),
                    space["fields"].get("dtype", "?"),
                    str(space["fields"].get("block_tokens", "?")),
                    size(space["block_bytes"]),
                )
                for space in document["namespaces"]
            ],
            title="Namespaces",
        )
    if document["clients"]:
        models = {space["digest"]: space["fields"].get("model", "?") for space in document["namespaces"]}
        print_table(
            ("client", "model", ">pid", ">connected", ">leases"),
            [
                (
                    c["name"],
                    models.get(c["namespace"], ""),
                    str(c["pid"]),
                    ago(c["connected_seconds"]),
                    number(c["leases"]),
                )
                for c in document["clients"]
            ],
            title="Clients",
        )
    samples = sorted(document["counters"].items())
    counted = [(name, number(value)) for name, value in samples if value and "_bucket{" not in name]
    if counted:
        print_table(("counter", ">value"), counted, title="Counters since the start")
