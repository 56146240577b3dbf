"""``kvstore lookup``, ``tree`` and ``models``: what a prompt would find, what it shares with others, whose blocks there are."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from kvstore.cli import options, output, prompts
from kvstore.cli.groups import grouped
from kvstore.cli.output import note, number, print_table, size
from kvstore.cli.overhttp import Api

if TYPE_CHECKING:
    from kvstore.admin.models.insight import Branch, Tree
    from kvstore.admin.models.prompts import LookupAnswer


@grouped
def lookup(prompt: prompts.Named, api: Api, json: options.Json = False) -> None:
    """Show what a prompt would find on the node now: how much each tier could serve, and how soon. Does not count as a use."""
    wanted = prompt.prompt()
    with api.connect() as client:
        found = client.lookup(wanted)
    output.show(json, found, lambda: _print_lookup(found))


@grouped
def tree(prompt: prompts.Named, api: Api, json: options.Json = False) -> None:
    """Show a prompt and the hot prompts that begin as it does: which blocks they share, where those are, where they go apart."""
    wanted = prompt.prompt()
    with api.connect() as client:
        found = client.tree(wanted)
    output.show(json, found, lambda: _print_tree(found))


@grouped
def models(api: Api, json: options.Json = False) -> None:
    """List the models that the node knows, and the namespaces of each."""
    with api.connect() as client:
        spaces = sorted(client.namespaces(), key=lambda space: (space.model, space.digest))
    rows = [
        (
            space.model,
            space.digest,
            str(space.fields.get("tenant", "-")),
            str(space.fields.get("dtype", "-")),
            number(space.block_tokens),
            size(space.block_bytes),
        )
        for space in spaces
    ]
    columns = ("model", "namespace", "tenant", "dtype", ">block tokens", ">block size")
    output.show(json, spaces, lambda: print_table(columns, rows) if rows else note("No model has blocks here yet."))


def _print_lookup(found: LookupAnswer) -> None:
    print(f"{number(found.blocks)} blocks of {number(found.block_tokens)} tokens")
    rows = [
        (tier.medium.value, number(tier.usable_tokens), number(tier.usable_blocks), number(tier.held_blocks),
         f"{tier.seconds:.3f} s")
        for tier in found.tiers
    ]  # fmt: skip
    print_table(("tier", ">usable tokens", ">usable blocks", ">held", ">loaded in"), rows)
    note("Usable is the prefix that a tier and the faster ones hold.")


def _print_tree(found: Tree) -> None:
    print(f"{number(found.blocks)} blocks; compared with {number(found.compared)} hot prompts of its model")
    if found.root is None:
        note("The prompt has no whole block.")
        return
    print_table(("blocks", "shared by", "where", "last block", "prompts that end here"), _rows(found.root, 0))


def _rows(branch: Branch, depth: int) -> Iterator[tuple[str, ...]]:
    whole = branch.end - branch.start
    where = ", ".join(
        tier.value if held == whole else f"{tier.value} {number(held)}" for tier, held in branch.held.items()
    )
    mark = "> " if branch.asked else "  "
    prompts = f"{number(branch.prompts)} prompt{'s' if branch.prompts != 1 else ''}"
    ends = ", ".join(key[:8] for key in branch.ends)
    yield f"{mark}{'  ' * depth}{branch.start}-{branch.end - 1}", prompts, where or "nowhere", branch.key, ends or "-"
    for child in branch.children:
        yield from _rows(child, depth + 1)
