"""The requests that engines asked about lately, by their ids: which blocks they have, and what of them was found.

Bounded in requests and in blocks, and kept in memory only.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np

from kvstore.identity import KEY_BYTES, BlockKey

MOST_REQUESTS = 4096
MOST_BLOCKS = 1 << 18
"""Of all remembered requests together: 4 MB of keys."""
MOST_SEEDS = 256

MAX_ID_CHARS = 128


@dataclass(frozen=True, slots=True)
class Asked:
    """A request as its engine's last lookup showed it."""

    request: str
    client: str
    namespace: bytes
    keys: bytes
    """Of its whole blocks, joined."""
    start: int
    """Blocks that the engine had itself."""
    found: int
    """Blocks that some tier held then, in a row from ``start`` on."""
    at: float
    """Seconds since the epoch."""

    @property
    def blocks(self) -> int:
        return len(self.keys) // KEY_BYTES

    def split(self) -> list[BlockKey]:
        cut: list[BlockKey] = np.frombuffer(self.keys, dtype=f"V{KEY_BYTES}").tolist()
        return cut


@dataclass(frozen=True, slots=True)
class Seed:
    """First parent of chains that are not everybody's: of a LoRA adapter, of a cache salt."""

    namespace: bytes
    seed: bytes
    lora: str
    """Digest of the adapter; empty for a salt alone."""


@dataclass
class RecentRequests:
    """Owned by the node's event loop."""

    most_requests: int = MOST_REQUESTS
    most_blocks: int = MOST_BLOCKS
    seeds: OrderedDict[Seed, None] = field(default_factory=OrderedDict)
    """Used lately, newest last."""

    def __post_init__(self) -> None:
        self._asked: OrderedDict[str, Asked] = OrderedDict()
        self._blocks = 0

    def __len__(self) -> int:
        return len(self._asked)

    def __iter__(self) -> Iterator[Asked]:
        """Latest first."""
        return iter(reversed(self._asked.values()))

    def add(self, asked: Asked, seed: bytes = b"", lora: str = "") -> None:
        """Remember a request, or what its engine was told last. Too long a prompt for the bound is not remembered."""
        self._drop(asked.request)
        if asked.blocks > self.most_blocks:
            return
        self._asked[asked.request] = asked
        self._blocks += asked.blocks
        while len(self._asked) > self.most_requests or self._blocks > self.most_blocks:
            self._drop(next(iter(self._asked)))
        if seed:
            self.seeds[Seed(asked.namespace, seed, lora)] = None
            self.seeds.move_to_end(Seed(asked.namespace, seed, lora))
            if len(self.seeds) > MOST_SEEDS:
                self.seeds.popitem(last=False)

    def find(self, request: str) -> Asked | None:
        """The request of that id, else the latest whose id begins so: engines add to the id that their client sees."""
        exact = self._asked.get(request)
        return exact or next((asked for asked in self if asked.request.startswith(request)), None)

    def owners(self) -> Callable[[Iterable[bytes]], dict[bytes, str]]:
        """Finds, in any thread, which of the requests of now asked last for blocks, by the first half of their keys."""
        now = list(self)

        def owners(halves: Iterable[bytes]) -> dict[bytes, str]:
            wanted = np.unique(np.frombuffer(b"".join(halves), dtype="<u8"))
            found: dict[bytes, str] = {}
            for asked in now if len(wanted) else ():
                words = np.frombuffer(asked.keys, dtype="<u8")[:: KEY_BYTES // 8]
                for word in words[np.isin(words, wanted)]:
                    found.setdefault(word.tobytes(), asked.request)
            return found

        return owners

    def _drop(self, request: str) -> None:
        gone = self._asked.pop(request, None)
        self._blocks -= gone.blocks if gone else 0
