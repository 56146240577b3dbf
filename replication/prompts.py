"""Files of prompts: one JSON value a line, either a list of token ids or a text."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from kvstore.errors import ConfigError

MAX_PROMPT_BYTES = 64 << 20

Prompt = str | list[int]


def read_prompts(path: Path, texts: bool = False) -> Iterator[Prompt]:
    """The prompts of a file; texts only where ``texts`` allows them. Raises ConfigError that names the line."""
    remedy = "Write a JSON list of token ids" + (", or a JSON string," if texts else "") + " on each line."
    try:
        with path.open() as lines:
            for place, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                if len(line) > MAX_PROMPT_BYTES:
                    raise ConfigError("--prompts", f"{path}:{place}", "a line is too long", remedy)
                prompt = _parse(line)
                if prompt is None or (isinstance(prompt, str) and not texts):
                    problem = "not a list of token ids" if prompt is None else "a text, which needs --tokenizer"
                    raise ConfigError("--prompts", f"{path}:{place}", problem, remedy)
                yield prompt
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("--prompts", str(path), str(error), remedy) from error


def _parse(line: str) -> Prompt | None:
    try:
        value = json.loads(line)
    except ValueError:
        return None
    if isinstance(value, str) and value:
        return value
    if isinstance(value, list) and value and all(type(token) is int and 0 <= token < 1 << 32 for token in value):
        return value
    return None
