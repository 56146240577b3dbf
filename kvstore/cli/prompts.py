"""How commands are told a prompt: by a request's id, by a block's key, as text, or as token ids."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvstore.cli.blocks import key_of, namespace_of
from kvstore.errors import ConfigError

if TYPE_CHECKING:
    from kvstore.node.client import Client

MAX_PROMPT_BYTES = 64 << 20

Request = Annotated[
    str | None,
    typer.Argument(metavar="[REQUEST]", help="Id of a request that an engine made lately, or how the id begins."),
]
Key = Annotated[str | None, typer.Option("--key", metavar="KEY", help="The prompt that ends in this block.")]
Text = Annotated[str | None, typer.Option("--text", metavar="TEXT", help="The prompt itself; needs --tokenizer.")]
File = Annotated[
    Path | None, typer.Option("--file", metavar="FILE", help="File with the prompt's text, - for standard input.")
]
Tokens = Annotated[
    Path | None, typer.Option("--tokens", metavar="FILE", help="File with token ids, - for standard input.")
]
TokenizerName = Annotated[
    str | None, typer.Option("--tokenizer", metavar="NAME", help="Folder or hub name of the model's tokenizer.")
]
Salt = Annotated[str, typer.Option("--cache-salt", metavar="TEXT", help="cache_salt that the requests carry.")]
Lora = Annotated[str, typer.Option("--lora", metavar="DIGEST", help="Digest of the LoRA adapter's weights.")]


def chain_arguments(
    client: Client,
    request: str | None,
    key: str | None,
    text: str | None,
    file: Path | None,
    tokens: Path | None,
    tokenizer: str | None,
    namespace: str | None,
    salt: str,
    lora: str,
) -> dict[str, Any]:
    """Arguments for the node's verbs that take a chain. Raises ConfigError unless exactly one way was used."""
    given = [way for way in (request, key, text, file, tokens) if way is not None]
    if len(given) != 1:
        raise ConfigError(
            "prompt",
            " ".join(map(str, given)),
            "named in no way, or in several",
            "Give REQUEST, --key, --text or --tokens.",
        )
    if request is not None:
        return {"request": request}
    if key is not None:
        return {"key": key_of(key)}
    ids = token_ids(read(tokens)) if tokens is not None else _encode(text if file is None else read(file), tokenizer)
    return {
        "tokens": packed(ids),
        "namespace": _namespace(client, namespace),
        "cache_salt": salt,
        "lora": lora,
    }


def read(path: Path | None) -> str:
    """A file, or standard input for ``-``. Raises ConfigError."""
    assert path is not None
    try:
        data = sys.stdin.buffer.read(MAX_PROMPT_BYTES + 1) if str(path) == "-" else path.read_bytes()
        if len(data) > MAX_PROMPT_BYTES:
            raise ConfigError("prompt", str(path), "longer than 64 MiB", "Give one prompt.")
        return data.decode()
    except OSError as error:
        raise ConfigError("prompt", str(path), error.strerror or "cannot be read", "Name a readable file.") from error
    except UnicodeDecodeError:
        raise ConfigError("prompt", str(path), "not UTF-8", "Give text, or token ids with --tokens.") from None


def token_ids(text: str) -> list[int]:
    """Ids from a JSON list, or from numbers with anything but digits between them. Raises ConfigError."""
    try:
        found = json.loads(text) if text.lstrip().startswith("[") else [int(n) for n in re.findall(r"-?\d+", text)]
    except ValueError:
        found = None
    if not isinstance(found, list) or not all(type(n) is int and 0 <= n < 1 << 32 for n in found):
        raise ConfigError("--tokens", text[:40], "not token ids", "Write them as [1, 15043, 3186].")
    return found


def packed(ids: list[int]) -> bytes:
    import numpy as np

    return np.array(ids, dtype="<u4").tobytes()


def _encode(text: str | None, tokenizer: str | None) -> list[int]:
    from kvstore.cli.tokenizer import Tokenizer

    assert text is not None
    if tokenizer is None:
        raise ConfigError("--tokenizer", "", "needed to turn text into tokens", "Name the folder of the model.")
    return Tokenizer(tokenizer).encode(text)


def _namespace(client: Client, wanted: str | None) -> bytes:
    spaces = client.call("status")["namespaces"]
    names = {space["digest"]: space["fields"].get("model", "") for space in spaces}
    if wanted:
        return namespace_of(wanted, names)
    used = [space["digest"] for space in spaces if space["block_bytes"]]
    if len(used) == 1 or len(names) == 1:
        only: bytes = (used or list(names))[0]
        return only
    listed = ", ".join(f"{digest.hex()[:12]} ({name})" for digest, name in names.items())
    raise ConfigError("--namespace", "", "the node serves several, or none yet", f"Give one of: {listed or 'none'}.")
