"""``kvstore pin``, ``unpin`` and ``pins``."""

from __future__ import annotations

import re
import time
from typing import Annotated, Any

import typer

from kvstore.cli import options, prompts
from kvstore.cli.blocks import NamespaceOption
from kvstore.cli.output import ago, note, number, print_json, print_table
from kvstore.errors import ConfigError

_UNITS = {"s": 1, "m": 60, "min": 60, "h": 3600}

Duration = Annotated[
    str, typer.Option("--for", metavar="TIME", help="How long, as 30min or 8h; at most 24h.", show_default=True)
]


def pin(
    request: prompts.Request = None,
    duration: Duration = "1h",
    key: prompts.Key = None,
    text: prompts.Text = None,
    file: prompts.File = None,
    tokens: prompts.Tokens = None,
    tokenizer: prompts.TokenizerName = None,
    namespace: NamespaceOption = None,
    cache_salt: prompts.Salt = "",
    lora: prompts.Lora = "",
    config: options.ConfigFile = None,
    overrides: options.Overrides = None,
    socket: options.Socket = None,
    json: options.Json = False,
) -> None:
    """Ask the node to keep a prompt until a deadline. Its blocks are given up last, and admitted to every tier."""
    seconds = _seconds(duration)
    with options.connect(config, overrides, socket) as client:
        arguments = prompts.chain_arguments(
            client, request, key, text, file, tokens, tokenizer, namespace, cache_salt, lora
        )
        document = client.call("pin", 30.0, seconds=seconds, **arguments)
    if json:
        print_json(document)
        return
    print(f"{number(document['pinned'])} blocks pinned for {duration}; held now: {_held(document['held'])}.")
    if document["pinned"] < document["blocks"]:
        note(f"{number(document['blocks'] - document['pinned'])} are not: the node holds as many pins as it may.")


def unpin(
    request: prompts.Request = None,
    key: prompts.Key = None,
    text: prompts.Text = None,
    file: prompts.File = None,
    tokens: prompts.Tokens = None,
    tokenizer: prompts.TokenizerName = None,
    namespace: NamespaceOption = None,
    cache_salt: prompts.Salt = "",
    lora: prompts.Lora = "",
    config: options.ConfigFile = None,
    overrides: options.Overrides = None,
    socket: options.Socket = None,
    json: options.Json = False,
) -> None:
    """End the pins of a prompt's blocks."""
    with options.connect(config, overrides, socket) as client:
        arguments = prompts.chain_arguments(
            client, request, key, text, file, tokens, tokenizer, namespace, cache_salt, lora
        )
        document = client.call("unpin", 30.0, **arguments)
    if json:
        print_json(document)
    else:
        print(f"{number(document['unpinned'])} blocks are not pinned any more.")


def show(
    config: options.ConfigFile = None,
    overrides: options.Overrides = None,
    socket: options.Socket = None,
    json: options.Json = False,
) -> None:
    """List what is pinned, and for how long."""
    with options.connect(config, overrides, socket) as client:
        pins = client.call("pins")["pins"]
    if json:
        print_json(pins)
        return
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
    return float(match[1]) * _UNITS[match[2]]
