"""Request traces with prefix identity: the Mooncake format, RAGPulse, and traces made from them or from nothing.

A trace is a list of requests in time order; each names its blocks by dense numbers, in chain order. A block's number stands for
the whole prefix up to it, so a block has one parent and one depth.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

ROOT = -1
"""Parent of a chain's first block."""

_RAGPULSE_FIELDS = ("sys_prompt", "passages_ids", "history", "web_search", "user_input")


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt. ``time`` in seconds, ``blocks`` from the head of the chain to its tail."""

    time: float
    blocks: tuple[int, ...]
    input_tokens: int
    output_tokens: int


@dataclass(frozen=True)
class Trace:
    """Requests in time order; ``parent[b]`` and ``depth[b]`` place block ``b`` in the forest of chains."""

    name: str
    requests: list[Request]
    parent: npt.NDArray[np.int64]
    depth: npt.NDArray[np.int64]
    block_tokens: int

    @property
    def unique(self) -> int:
        return len(self.parent)

    @property
    def references(self) -> int:
        return sum(len(request.blocks) for request in self.requests)


def build(name: str, rows: Iterable[tuple[float, Sequence[Any], int, int]], block_tokens: int = 512) -> Trace:
    """A trace of (seconds, ids, input tokens, output tokens). Equal ids after equal prefixes are one block."""
    numbers: dict[tuple[int, Any], int] = {}
    parent: list[int] = []
    depth: list[int] = []
    requests = []
    for time, ids, input_tokens, output_tokens in sorted(rows, key=lambda row: row[0]):
        chain: list[int] = []
        above = ROOT
        for position, name_of_block in enumerate(ids):
            number = numbers.setdefault((above, name_of_block), len(numbers))
            if number == len(parent):
                parent.append(above)
                depth.append(position)
            chain.append(number)
            above = number
        requests.append(Request(time, tuple(chain), input_tokens, output_tokens))
    return Trace(name, requests, np.array(parent, dtype=np.int64), np.array(depth, dtype=np.int64), block_tokens)


def load(path: Path) -> Trace:
    """Read a JSON-lines trace. Rows of the Mooncake format carry milliseconds and a list of ids; rows of RAGPulse carry
    seconds in a string and a dict of lists, which are chained in prompt order."""
    rows: list[tuple[float, Sequence[Any], int, int]] = []
    with path.open() as lines:
        for line in lines:
            if not line.strip():
                continue
            row = json.loads(line)
            ids = row["hash_ids"]
            if isinstance(ids, dict):
                ids = [part for name in _RAGPULSE_FIELDS for part in ids.get(name, ())]
                seconds = float(row["timestamp"])
            else:
                seconds = float(row["timestamp"]) / 1e3
            rows.append((seconds, ids, int(row["input_length"]), int(row["output_length"])))
    return build(path.parent.name + "/" + path.stem, rows)
