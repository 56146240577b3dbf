"""Text to token ids and back, as the engine does it: with ``transformers`` where that is installed, else ``tokenizers``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvstore.errors import ConfigError


class Tokenizer:
    """A model's tokenizer, from a folder or by its name on the hub."""

    def __init__(self, name: str) -> None:
        """Raises ConfigError."""
        try:
            self._tokenizer = _load(name)
        except ImportError as error:
            raise ConfigError(
                "--tokenizer", name, "needs a package for it", "pip install transformers, or give --tokens."
            ) from error
        except Exception as error:  # each of them raises its own
            reason = str(error).strip().splitlines()
            raise ConfigError(
                "--tokenizer", name, reason[0] if reason else type(error).__name__, "Name the model's folder."
            ) from error

    def encode(self, text: str) -> list[int]:
        """With the special tokens that a model expects around a prompt."""
        ids = self._tokenizer.encode(text)
        return list(getattr(ids, "ids", ids))

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(list(ids))
        return text


def _load(name: str) -> Any:
    try:
        import transformers
    except ImportError:
        import tokenizers

        path = Path(name)
        if path.is_dir():
            return tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
        return tokenizers.Tokenizer.from_pretrained(name)
    return transformers.AutoTokenizer.from_pretrained(name)
