"""Options that commands share, and what they come to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from kvstore.config import Loaded
    from kvstore.node.client import Client

ConfigFile = Annotated[
    Path | None,
    typer.Option("--config", "-c", metavar="FILE", help="TOML file with settings.", envvar="KVSTORE_CONFIG"),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a setting, as host.bytes=16GiB; repeatable."),
]
Socket = Annotated[Path | None, typer.Option("--socket", metavar="PATH", help="The node's socket; else node.socket.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]


class TierName(StrEnum):
    """Names of tiers on the command line."""

    host = "host"
    disk = "disk"
    object = "object"
    remote = "remote"


def load(config: Path | None, overrides: list[str] | None, socket: Path | None = None) -> Loaded:
    """The configuration that the options ask for; from here on warnings are logged. Raises ConfigError."""
    from kvstore.cli.logs import configure
    from kvstore.config import load as load_sources

    configure("warning")
    return load_sources(config, [*(overrides or ()), *([f"node.socket={socket}"] if socket else ())])


def size(option: str, text: str) -> int | None:
    """The bytes that an option gives, or None when it is empty. Raises ConfigError."""
    from kvstore.errors import ConfigError
    from kvstore.units import parse_bytes

    try:
        return parse_bytes(text) if text else None
    except ValueError as error:
        raise ConfigError(option, text, str(error), "Write it as 16GiB, 500MB, or a number of bytes.") from None


@dataclass(frozen=True, slots=True)
class Settings:
    """Where settings come from."""

    config: ConfigFile = None
    overrides: Overrides = None

    def load(self) -> Loaded:
        """Raises ConfigError."""
        return load(self.config, self.overrides)


@dataclass(frozen=True, slots=True)
class Node:
    """The node of this machine, and its settings."""

    config: ConfigFile = None
    overrides: Overrides = None
    socket: Socket = None

    def load(self) -> Loaded:
        """Raises ConfigError."""
        return load(self.config, self.overrides, self.socket)

    @contextmanager
    def connect(self) -> Iterator[Client]:
        """A client of it. Raises NodeUnavailable on first use."""
        from kvstore.node.client import Client
        from kvstore.tenants.credentials import operator_token

        config = self.load().config
        with Client(config.node.socket, name="kvstore command", token=partial(operator_token, config)) as client:
            yield client

    def arguments(self) -> list[str]:
        """The same options for another command of this package."""
        return [
            *(["--config", str(self.config)] if self.config else []),
            *(f"--set={override}" for override in self.overrides or ()),
            *(["--socket", str(self.socket)] if self.socket else []),
        ]
