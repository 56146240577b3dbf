"""``kvstore pin``, ``unpin`` and ``pins``."""

from __future__ import annotations

import re
import time
from typing import Annotated, Any

import typer

from kvstore.cli import options, output, prompts
from kvstore.cli.groups import grouped
from kvstore.cli.output import ago, note, number, print_table
from kvstore.errors import ConfigError

MOST_SECONDS = 24 * 3600
"""As the node allows."""
_UNITS = {"s": 1, "m": 60, "min": 60, "h": 3600}

Duration = Annotated[
    str, typer.Option("--for", metavar="TIME", help="How long, as 30min or 8h; at most 24h.", show_default=True)
]


@grouped
def pin(prompt: prompts.Named, node: options.Node, duration: Duration = "1h", json: options.Json = False) -> None:
    """Keep a prompt until a deadline, on the node and on those that share its catalog.

    Its blocks are given up last, and admitted to every tier.
    """
    seconds = _seconds(duration)
    with node.connect() as client:
        document = client.call("pin", 30.0, seconds=seconds, **prompt.arguments(client))
    output.show(json, document, lambda: _print(document, duration))


def _print(document: dict[str, Any], duration: str) -> None:
    print(f"{number(document['pinned'])} blocks pinned for {duration}; held now: {_held(document['held'])}.")
    if document["pinned"] < document["blocks"]:
        note(f"{number(document['blocks'] - document['pinned'])} are not: the node holds as many pins as it may.")


@grouped
def unpin(prompt: prompts.Named, node: options.Node, json: options.Json = False) -> None:
    """End the pins of a prompt's blocks, on the node and on those that share its catalog."""
    with node.connect() as client:
        document = client.call("unpin", 30.0, **prompt.arguments(client))
    output.show(json, document, lambda: print(f"{number(document['unpinned'])} blocks are not pinned any more."))


@grouped
def show(node: options.Node, json: options.Json = False) -> None:
    """List what is pinned, and for how long."""
    with node.connect() as client:
        pins = client.call("pins")["pins"]
    output.show(json, pins, lambda: _print_pins(pins))


def _print_pins(pins: list[dict[str, Any]]) -> None:
    if not pins:
        note("Nothing is pinned.")
        return
    print_table(
        ("last block", ">blocks", "held", ">ends in"),
        [
            (
                pin["key"].hex(),
                number(pin["blocks"]),
                _held(pin["held"]),
                ago(max(pin["until"] - time.time(), 0)),
            )
            for pin in pins
        ],
    )


def _held(held: dict[str, Any]) -> str:
    return ", ".join(f"{number(count)} in {medium}" for medium, count in held.items())


def _seconds(duration: str) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]+)", duration.strip())
    if match is None or match[2] not in _UNITS:
        raise ConfigError("--for", duration, "not a time", "Write it as 30min or 8h.")
    seconds = float(match[1]) * _UNITS[match[2]]
    if not 0 < seconds <= MOST_SECONDS:
        raise ConfigError("--for", duration, "a pin lasts at most 24h", "Pin it again before it ends.")
    return seconds
