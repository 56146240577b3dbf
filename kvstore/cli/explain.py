"""``kvstore explain``."""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import groupby
from typing import Any

from kvstore.cli import options, output, prompts
from kvstore.cli.groups import grouped
from kvstore.cli.output import ago, note, number, print_table

_GIB = 1 << 30
_WORDS = {
    "held": "here",
    "never_stored": "never stored",
    "not_admitted": "not admitted",
    "not_written": "not written down",
    "evicted": "evicted",
    "deleted": "deleted",
    "other_namespace": "stored in another namespace",
    "load_failed": "load failed",
    "deadline": "deadline passed",
    "recompute_preferred": "planner preferred to compute",
    "withheld": "elsewhere, and not offered now",
    "lost": "gone, for no reason on record",
}


@grouped
def show(prompt: prompts.Named, node: options.Node, json: options.Json = False) -> None:
    """Say for each block of a prompt where it is, or why it was missed."""
    with node.connect() as client:
        document = client.call("explain", 30.0, **prompt.arguments(client))
    output.show(json, document, lambda: _print(document))


def _print(document: dict[str, Any]) -> None:
    size, blocks = document["block_tokens"], document["blocks"]
    print(_headline(document))
    for other in document["elsewhere"]:
        fields = "; ".join(
            f"{name} is {mine!r} here and {theirs!r} there" for name, (mine, theirs) in other["differs"].items()
        )
        print(
            f"{number(other['tokens'])} tokens of it are stored in namespace {other['namespace'].hex()[:12]}: {fields}."
        )
    print_table(
        (">blocks", ">tokens", "first key", "now in", ">hits", ">score, s/GiB", "what", "why"),
        [
            (
                _span(first["index"], last["index"]),
                _span(first["index"] * size, (last["index"] + 1) * size - 1),
                first["key"].hex(),
                ", ".join(first["where"]) or "-",
                f"{first['hits']:.1f}",
                f"{first['score'] * _GIB:.3g}" if first["score"] is not None else "-",
                _WORDS[first["why"]],
                first["detail"],
            )
            for first, last in _runs(blocks)
        ],
    )
    if any(block["why"] == "never_stored" for block in blocks):
        reach = ago(max(time.time() - document["history_since"], 0))
        note(f"Never stored: not in the {reach} that this node's history reaches back.")
    if len(blocks) < document["chain_blocks"]:
        note(f"Shown: the first {number(len(blocks))} of {number(document['chain_blocks'])} blocks.")


def _headline(document: dict[str, Any]) -> str:
    blocks, size, usable = document["blocks"], document["block_tokens"], document["usable_blocks"]
    model = document["fields"].get("model", "an unknown model")
    if document["request"]:
        when = ago(max(time.time() - document["asked_at"], 0))
        start, found = document["found"]
        head = f"Request {document['request']} of {document['client']} to {model}, {when} ago: "
        head += f"{number(found)} of the {number(document['chain_blocks'] - start)} blocks that it needed were found"
        if usable < start + found:
            head += f", {number(max(usable - start, 0))} could be loaded"
    else:
        head = f"{number(document['tokens'])} tokens for {model}: "
        head += f"{number(usable)} of {number(document['chain_blocks'])} blocks of {size} tokens can be loaded now"
    if document["usable_blocks"] == len(blocks):
        return f"{head}."
    miss = blocks[document["usable_blocks"]]
    why = miss["detail"] or _WORDS[miss["why"]]
    return f"{head}. Block {miss['index']} ends the prefix: {why}."


def _runs(blocks: list[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """First and last of each run of blocks of which the same is to be said."""

    def alike(block: dict[str, Any]) -> Any:
        causes = [(cause["what"], cause["tier"], cause["rule"]) for cause in block["causes"]]
        return block["where"], block["why"], causes, round(block["hits"], 1)

    for _, run in groupby(blocks, alike):
        members = list(run)
        yield members[0], members[-1]


def _span(first: int, last: int) -> str:
    return str(first) if first == last else f"{first}-{last}"
