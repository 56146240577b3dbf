"""``kvstore hot``."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from kvstore.cli import options
from kvstore.cli.output import ago, note, number, print_json, print_table


def show(
    limit: Annotated[int, typer.Option(metavar="N", min=1, max=1000, help="Prompts to show.")] = 20,
    config: options.ConfigFile = None,
    overrides: options.Overrides = None,
    socket: options.Socket = None,
    json: options.Json = False,
) -> None:
    """Show the prompts that engines on this machine ask for most, best score first."""
    from kvstore.units import human_bytes

    with options.connect(config, overrides, socket) as client:
        prompts = client.call("hot", limit=limit)["prompts"]
        names = {space["digest"]: space["fields"].get("model", "?") for space in client.call("status")["namespaces"]}
    if json:
        print_json(prompts)
        return
    if not prompts:
        note("No prompt was asked for twice yet.")
        return
    print_table(
        ("prompt", "model", ">tokens", ">size", ">hits", ">prefill saved", "last used", "where"),
        [
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
            for prompt in prompts
        ],
        title="Hot prompts",
    )
    note("A prompt is named by its deepest shared block. Hits fade by half in an hour; prefill saved is an estimate.")
