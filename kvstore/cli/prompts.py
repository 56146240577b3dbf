"""How commands are told a prompt: by a request's id, by a block's key, as text, or as token ids."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvstore.cli.blocks import NamespaceOption, key_of, namespace_of
from kvstore.cli.overhttp import given
from kvstore.errors import ConfigError

if TYPE_CHECKING:
    from kvstore.admin.models.prompts import Prompt
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


@dataclass(frozen=True, slots=True)
class Named:
    """A prompt, in one of those ways."""

    request: Request = None
    key: Key = None
    text: Text = None
    file: File = None
    tokens: Tokens = None
    tokenizer: TokenizerName = None
    namespace: NamespaceOption = None
    cache_salt: Salt = ""
    lora: Lora = ""

    @property
    def given(self) -> bool:
        """Whether one was named at all."""
        return any(way is not None for way in (self.request, self.key, self.text, self.file, self.tokens))

    def prompt(self) -> Prompt:
        """As the admin API takes it; text without --tokenizer is for the API's own. Raises ConfigError."""
        from kvstore.admin.models.prompts import Prompt

        self._check()
        if self.request is not None:
            return given(Prompt, request=self.request)
        if self.key is not None:
            return Prompt(key=key_of(self.key).hex())
        if not self.namespace:
            raise ConfigError("--namespace", "", "needed beside tokens or text", "Give a model's name or a digest.")
        about = {"namespace": self.namespace, "cache_salt": self.cache_salt, "lora": self.lora}
        if self.tokens is None and self.tokenizer is None:
            return given(Prompt, text=self.text if self.file is None else read(self.file), **about)
        return given(Prompt, tokens=self._ids(), **about)

    def arguments(self, client: Client) -> dict[str, Any]:
        """For the node's verbs that take a chain. Raises ConfigError unless exactly one way was used."""
        self._check()
        if self.request is not None:
            return {"request": self.request}
        if self.key is not None:
            return {"key": key_of(self.key)}
        return {
            "tokens": packed(self._ids()),
            "namespace": _namespace(client, self.namespace),
            "cache_salt": self.cache_salt,
            "lora": self.lora,
        }

    def _check(self) -> None:
        given = [way for way in (self.request, self.key, self.text, self.file, self.tokens) if way is not None]
        if len(given) != 1:
            raise ConfigError(
                "prompt",
                " ".join(map(str, given)),
                "named in no way, or in several",
                "Give REQUEST, --key, --text, --file or --tokens.",
            )

    def _ids(self) -> list[int]:
        if self.tokens is not None:
            return token_ids(read(self.tokens))
        return _encode(self.text if self.file is None else read(self.file), self.tokenizer)


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
