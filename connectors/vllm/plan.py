"""What the scheduler's side tells the workers in one engine step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata

from kvstore.identity import BlockKey
from kvstore.node.api import NewBlock
from kvstore.policy.planner import ENDLESS, Patience


@dataclass(frozen=True, slots=True)
class Load:
    """Consecutive blocks to bring into a request's pages."""

    request_id: str
    keys: tuple[BlockKey, ...]
    pages: tuple[int, ...]
    """Engine pages to fill, in token order; all of ``keys`` but for a part of the first and of the last. With several page
    tables those of each table in turn, and ABSENT where a window has passed."""
    first_page: int
    """Page of the first block at which ``pages`` starts."""
    patience: Patience = ENDLESS
    """By when blocks have to be there; the engine computes those that are not."""
    traceparent: str = ""
    """The request's trace, when there is one."""

    def parts(self, pages_per_block: int, tables: int = 1) -> Iterator[tuple[BlockKey, tuple[int, ...], int]]:
        """Per block: its key, the engine pages to fill (as in ``BlockCopy``), and the page of the block at which they start."""
        total = len(self.pages) // tables
        columns = [self.pages[at : at + total] for at in range(0, total * tables, total or 1)]
        taken, first = 0, self.first_page
        for key in self.keys:
            stop = taken + pages_per_block - first
            yield key, sum((column[taken:stop] for column in columns), ()), first
            taken, first = stop, 0


@dataclass(frozen=True, slots=True)
class Save:
    """A block that this step completes."""

    block: NewBlock
    pages: tuple[int, ...]
    """As in ``BlockCopy``."""
    traceparent: str = ""
    """The request's trace, when there is one."""


@dataclass
class StepPlan(KVConnectorMetadata):  # type: ignore[misc]
    """Connector metadata of one step. Pickled to the workers by vLLM, so it holds plain values only."""

    loads: list[Load] = field(default_factory=list)
    saves: list[Save] = field(default_factory=list)
    idle: bool = False
    """Nothing is computed in this step: vLLM only asks whether loads have ended."""
    overwritten: frozenset[int] = frozenset()
    """Engine pages that this step hands to requests: copies out of them must be over first."""
