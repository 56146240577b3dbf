"""What a client shows the node when it connects, so that the node knows whose engine, or which operator, it is."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from kvstore.errors import ConfigError

if TYPE_CHECKING:
    from kvstore.config import Config

TOKEN_FILE = "KVSTORE_NODE__TOKEN_FILE"
"""An engine has no configuration file; this is ``node.token_file`` as the environment says it."""
MAX_TOKEN_BYTES = 256


def engine_token() -> str:
    """The token in the file that KVSTORE_NODE__TOKEN_FILE names; empty without one. Raises ConfigError."""
    named = os.environ.get(TOKEN_FILE, "")
    return read_token(Path(named)) if named else ""


def operator_token(config: Config) -> str:
    """For commands and the admin API: ``node.token_file``, else the operator's from the tenant book, for who may read it.

    Raises ConfigError.
    """
    if config.node.token_file is not None:
        return read_token(config.node.token_file)
    book = config.tenants.book
    if book is None or not os.access(book, os.R_OK):
        return ""
    from kvstore.tenants.book import TenantBook

    return TenantBook(book).operator_token()


def read_token(path: Path) -> str:
    """Raises ConfigError."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_TOKEN_BYTES + 1)
        text = data.decode("ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        problem, remedy = "cannot be read as a token", "Write the token of kvstore tenants create into it."
        raise ConfigError("node.token_file", str(path), problem, remedy) from error
    if len(data) > MAX_TOKEN_BYTES:
        raise ConfigError("node.token_file", str(path), "too long for a token", "Name the right file.")
    return text
