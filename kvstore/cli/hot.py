"""``kvstore hot``."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvstore.cli import options, prompts, regionhot
from kvstore.cli.groups import grouped
from kvstore.cli.output import ago, note, number, print_json, print_table

if TYPE_CHECKING:
    from kvstore.node.client import Client


@grouped
def show(
    limit: Annotated[int, typer.Option(metavar="N", min=1, max=1000, help="Prompts to show.")] = 20,
    tokenizer: prompts.TokenizerName = None,
    region: Annotated[bool, typer.Option("--region", help="Of all nodes of the region, from the catalog.")] = False,
    *,
    node: options.Node,
    json: options.Json = False,
) -> None:
    """Show the prompts that engines on this machine ask for most, best score first.

    With --region those of all nodes that share the bucket. With --tokenizer also how they begin and end, where connectors were
    told to say so (preview_tokens).
    """
    from kvstore.units import human_bytes

    if region:
        regionhot.show(node.load().config, limit, json)
        return
    with node.connect() as client:
        hottest = client.call("hot", limit=limit)["prompts"]
        names = {space["digest"]: space["fields"].get("model", "?") for space in client.call("status")["namespaces"]}
        texts = _texts(client, hottest, tokenizer) if tokenizer and hottest else []
    if json:
        for prompt, text in zip(hottest, texts, strict=False):
            prompt["preview"] = text
        print_json(hottest)
        return
    if not hottest:
        note("No prompt was asked for twice yet.")
        return
    rows: list[tuple[str, ...]] = [
        (
            prompt["key"].hex(),
            names.get(prompt["namespace"], "?"),
            number(prompt["tokens"]),
            human_bytes(prompt["bytes"]),
            f"{prompt['hits']:.1f}",
            f"{prompt['hits'] * prompt['seconds_saved']:.2f} s",
            f"{ago(max(time.time() - prompt['last_used'], 0))} ago",
            ", ".join(prompt["media"]) or "nowhere",
        )
        for prompt in hottest
    ]
    columns: tuple[str, ...] = ("prompt", "model", ">tokens", ">size", ">hits", ">prefill saved", "last used", "where")
    if texts:
        columns, rows = (*columns, "text"), [(*row, text or "-") for row, text in zip(rows, texts, strict=True)]
    print_table(columns, rows, title="Hot prompts")
    note("A prompt is named by its deepest shared block. Hits fade by half in an hour; prefill saved is an estimate.")


def _texts(client: Client, hottest: Sequence[dict[str, Any]], tokenizer: str) -> list[str | None]:
    """How each prompt begins, and ends where that is known; None where its text is not."""
    from kvstore.cli.tokenizer import Tokenizer

    decoder = Tokenizer(tokenizer)
    previews = client.call("previews", keys=b"".join(prompt["key"] for prompt in hottest))
    return [
        None if preview is None else " … ".join(decoder.decode(ids) for ids in preview if ids) for preview in previews
    ]
