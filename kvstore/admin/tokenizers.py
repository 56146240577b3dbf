"""Text to token ids, for who has no tokenizer at hand: the models' own tokenizer files, from a folder."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from kvstore.admin.problems import Problem

FILES_KEPT = 8


class Tokenizers:
    """Calls are ``(model, text)``."""

    def __init__(self, folder: Path | None) -> None:
        """``folder`` holds ``MODEL/tokenizer.json``, where MODEL may have slashes."""
        self._folder = folder
        self._load = lru_cache(FILES_KEPT)(_load)

    async def __call__(self, model: str, text: str) -> Sequence[int]:
        """Token ids as the tokenizer gives them for a plain prompt, special tokens included. Raises Problem (422)."""
        if self._folder is None:
            raise Problem(422, "no-tokenizer", "text needs a tokenizer", "Send token ids, or set api.tokenizers.")
        folder = self._folder.resolve()
        path = (folder / model / "tokenizer.json").resolve()
        if not path.is_relative_to(folder) or not path.is_file():
            raise Problem(
                422, "no-tokenizer", f"there is no tokenizer of {model!r}", "Send token ids, or put its file there."
            )
        return await asyncio.to_thread(self._encode, path, text)

    def _encode(self, path: Path, text: str) -> Sequence[int]:
        ids: Sequence[int] = self._load(path).encode(text).ids
        return ids


def _load(path: Path) -> Any:
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise Problem(
            422, "no-tokenizer", "the tokenizers package is not installed here", "Send token ids, or install it."
        ) from None
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise Problem(422, "no-tokenizer", f"{path.name} of the model cannot be used: {error}") from None
