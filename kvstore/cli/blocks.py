"""``kvstore ls``, ``get``, ``verify`` and ``rm``."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvstore.cli import options
from kvstore.cli.groups import grouped
from kvstore.cli.output import ago, note, number, print_json, print_table
from kvstore.errors import BlockNotFound, ConfigError, NodeUnavailable

if TYPE_CHECKING:
    from kvstore.identity import BlockKey
    from kvstore.node.client import Client

PATIENCE_SECONDS = 600.0
"""For a page of a scrub or for a deletion: long enough for slow storage, short enough to notice a node that hangs."""

_PAGE = 64

TierOption = Annotated[
    options.TierName | None,
    typer.Option("--tier", metavar="TIER", help="host, disk, object or remote; else all that the node has."),
]
NamespaceOption = Annotated[
    str | None, typer.Option("--namespace", "-n", metavar="NAME", help="Model name, or start of a namespace digest.")
]


@grouped
def ls(
    tier: TierOption = None,
    namespace: NamespaceOption = None,
    prefix: Annotated[str, typer.Option(metavar="HEX", help="Only keys that start so.")] = "",
    after: Annotated[str, typer.Option(metavar="KEY", help="Continue behind this key.")] = "",
    limit: Annotated[int, typer.Option(metavar="N", min=1, max=1000, help="Blocks to show of each tier.")] = 50,
    *,
    node: options.Node,
    json: options.Json = False,
) -> None:
    """List the blocks that a tier holds."""
    start, cursor = _hex("--prefix", prefix), _hex("--after", after)
    with node.connect() as client:
        document = client.call("status")
        names = {space["digest"]: space["fields"].get("model", "") for space in document["namespaces"]}
        digest = namespace_of(namespace, names) if namespace else None
        pages = {
            medium: _list(client, limit, medium=medium, namespace=digest, prefix=start, cursor=cursor)
            for medium in _media(document, tier)
        }
    if json:
        print_json(pages)
        return
    for medium, page in pages.items():
        _print_page(medium, page, names)


def _list(client: Client, limit: int, **query: Any) -> dict[str, Any]:
    """Up to ``limit`` blocks. The node filters page by page, so one request may bring fewer."""
    blocks: list[dict[str, Any]] = []
    while True:
        page = client.call("list", limit=limit - len(blocks), **query)
        blocks += page["blocks"]
        query["cursor"] = page["cursor"]
        if not page["cursor"] or len(blocks) >= limit:
            return {"blocks": blocks, "cursor": page["cursor"]}


def _print_page(medium: str, page: dict[str, Any], names: dict[bytes, str]) -> None:
    from kvstore.units import human_bytes

    now = time.time()
    print_table(
        ("key", "namespace", ">index", ">tokens", ">size", ">hits", ">last use"),
        [
            (
                block["key"].hex(),
                names.get(block["namespace"]) or block["namespace"].hex()[:12],
                str(block["index"]),
                str(block["tokens"]),
                human_bytes(block["length"]),
                number(block["hits"]),
                ago(now - block["accessed"]) if block["accessed"] else "-",
            )
            for block in page["blocks"]
        ],
        title=f"{medium}: {len(page['blocks'])} blocks",
    )
    if page["cursor"]:
        note(f"More in {medium}: --tier {medium} --after {page['cursor'].hex()}")


@grouped
def get(
    key: Annotated[str, typer.Argument(metavar="KEY", help="32 hexadecimal digits, as ls prints them.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="Where to write the payload.")],
    timeout: Annotated[
        float, typer.Option(metavar="SECONDS", min=0.1, max=3600, help="How long to wait for it.")
    ] = 30.0,
    *,
    node: options.Node,
    json: options.Json = False,
) -> None:
    """Write a block's payload to a file. The node verifies it on the way."""
    from kvstore.units import human_bytes

    block = key_of(key)
    with node.connect() as client:
        known = client.call("inspect", key=block)
        if not known["media"]:
            raise BlockNotFound(f"no tier of the node holds {key}")
        acquired = client.acquire([block], timeout)
        if not acquired.offsets:
            reason = acquired.miss.value if acquired.miss else "unknown"
            raise BlockNotFound(f"{key} was not delivered: {reason}")
        try:
            output.write_bytes(acquired.arena.slot(acquired.offsets[0], known["length"]))
        except OSError as error:
            raise ConfigError(
                "--output", str(output), error.strerror or "cannot be written", "Name another file."
            ) from error
        finally:
            client.release([block])
    medium = acquired.media[0].value
    if json:
        print_json({"key": key, "tier": medium, "length": known["length"], "file": str(output)})
    else:
        print(f"{human_bytes(known['length'])} from {medium} to {output}")


@grouped
def verify(
    tier: TierOption = None,
    *,
    node: options.Node,
    json: options.Json = False,
) -> None:
    """Read every block of a tier and check it. What is bad is dropped and quarantined, and the exit status is 1.

    What other regions hold is read only when it is named, with --tier remote.

    Through the node, or on the files and objects themselves while no node runs.
    """
    try:
        with node.connect() as client:
            media = _media(client.call("status"), tier)
            results = {m: _scrub(client, m) for m in media if tier is not None or m != options.TierName.remote}
    except NodeUnavailable:
        if tier is options.TierName.host:
            raise
        from kvstore.scrub import scrub_offline

        note("No node answers: reading the storage itself.")
        results = scrub_offline(node.load().config, tier.value if tier else None)
    if json:
        print_json(results)
    else:
        _print_scrub(results)
    if any(result["bad"] for result in results.values()):
        raise typer.Exit(1)


def _scrub(client: Client, medium: str) -> dict[str, Any]:
    from rich.console import Console

    total: dict[str, Any] = {"checked": 0, "bytes": 0, "bad": []}
    cursor = b""
    with Console(stderr=True).status(f"{medium}: reading") as progress:
        while True:
            page = client.call("verify", PATIENCE_SECONDS, medium=medium, cursor=cursor, limit=_PAGE)
            total = {name: total[name] + page[name] for name in total}
            progress.update(f"{medium}: {number(total['checked'])} blocks read")
            cursor = page["cursor"]
            if not cursor:
                return total


def _print_scrub(results: dict[str, dict[str, Any]]) -> None:
    from kvstore.units import human_bytes

    print_table(
        ("tier", ">checked", ">read", ">bad"),
        [(medium, number(r["checked"]), human_bytes(r["bytes"]), str(len(r["bad"]))) for medium, r in results.items()],
    )
    for medium, result in results.items():
        for bad in result["bad"]:
            print(f"{medium}: {bad['key'].hex()}: {bad['reason']}; quarantined, the next save heals it")


@grouped
def rm(
    keys: Annotated[list[str] | None, typer.Argument(metavar="[KEY]...", help="Keys as ls prints them.")] = None,
    namespace: NamespaceOption = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    *,
    node: options.Node,
    json: options.Json = False,
) -> None:
    """Delete blocks from every tier: the named keys, or all of a namespace."""
    from kvstore.node.protocol import join_keys

    if bool(keys) == bool(namespace):
        raise ConfigError("rm", " ".join(keys or ()), "needs keys or --namespace, one of the two", "See kvstore ls.")
    blocks = [key_of(key) for key in keys or ()]
    with node.connect() as client:
        digest, what = None, f"{len(blocks)} block(s)"
        if namespace:
            spaces = client.call("status")["namespaces"]
            names = {space["digest"]: space["fields"].get("model", "") for space in spaces}
            digest = namespace_of(namespace, names)
            what = f"every block of namespace {digest.hex()} ({names[digest] or 'unknown model'})"
        if not yes:
            typer.confirm(f"Delete {what} from all tiers?", abort=True, err=True)
        deleted = client.call("delete", PATIENCE_SECONDS, keys=join_keys(blocks), namespace=digest)["deleted"]
    if json:
        print_json({"deleted": deleted})
    else:
        print(", ".join(f"{medium}: {number(count)} deleted" for medium, count in deleted.items()))


def _media(document: dict[str, Any], tier: options.TierName | None) -> list[str]:
    present = [known["medium"] for known in document["tiers"]]
    if tier is None:
        return present
    if tier.value not in present:
        raise ConfigError("--tier", tier.value, "the node has no such tier", f"It has: {', '.join(present)}.")
    return [tier.value]


def namespace_of(wanted: str, names: dict[bytes, str]) -> bytes:
    """The one namespace of that model name or digest."""
    found = [digest for digest, model in names.items() if model == wanted or digest.hex().startswith(wanted.lower())]
    if len(found) == 1:
        return found[0]
    if not found:
        raise ConfigError("--namespace", wanted, "the node knows no such namespace", "See kvstore status.")
    digests = ", ".join(digest.hex()[:12] for digest in found)
    raise ConfigError("--namespace", wanted, f"{len(found)} namespaces match", f"Give one of: {digests}.")


def _hex(option: str, text: str) -> bytes:
    try:
        return bytes.fromhex(text)
    except ValueError:
        raise ConfigError(option, text, "not whole bytes in hexadecimal", "Copy it from kvstore ls.") from None


def key_of(text: str) -> BlockKey:
    from kvstore.identity import KEY_BYTES, BlockKey

    key = _hex("KEY", text)
    if len(key) != KEY_BYTES:
        raise ConfigError("KEY", text, f"not {2 * KEY_BYTES} hexadecimal digits", "Copy it from kvstore ls.")
    return BlockKey(key)
