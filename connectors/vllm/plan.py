"""What the scheduler's side tells the workers in one engine step, and what they tell it with the step's results.

vLLM pickles both, so they hold plain values only.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata, KVConnectorWorkerMetadata

from kvstore.identity import BlockKey
from kvstore.node.api import NewBlock
from kvstore.policy.planner import ENDLESS, Patience
from kvstore.tiers.base import Medium


@dataclass(frozen=True, slots=True)
class Slots:
    """Where blocks lie in the arena. The scheduler's side holds leases on them until it hears of the step's results."""

    epoch: int
    """Of the node's run that the arena belongs to."""
    offsets: tuple[int, ...]
    media: tuple[Medium, ...]
    """Which tier each block came from, when it was brought to the arena."""

    def first(self, count: int) -> Slots:
        """Of the first blocks only."""
        return Slots(self.epoch, self.offsets[:count], self.media[:count])


@dataclass(frozen=True, slots=True)
class StateLoad:
    """The state behind the last of a load's blocks, see ``connectors/vllm/states.py``."""

    key: BlockKey
    pages: tuple[int, ...]
    """The engine page to fill of each page table of recurrent layers."""


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
    slots: Slots | None = None
    """Set: the step that brings this plan computes with the blocks, so they are copied before it. None: they are acquired and
    copied meanwhile, and a later step computes with them."""
    state: StateLoad | None = None
    """What recurrent layers go on from."""

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
    """Connector metadata of one step."""

    loads: list[Load] = field(default_factory=list)
    saves: list[Save] = field(default_factory=list)
    states: list[Save] = field(default_factory=list)
    """States of recurrent layers to save: one page of each of their page tables."""
    idle: bool = False
    """Nothing is computed in this step: vLLM only asks whether loads have ended."""
    overwritten: frozenset[int] = frozenset()
    """Engine pages that this step hands to requests: copies out of them must be over first."""


@dataclass
class Told(KVConnectorWorkerMetadata):  # type: ignore[misc]
    """What the workers tell. vLLM adds up what the ranks say."""

    ready: Counter[int] = field(default_factory=Counter)
    """Ranks that have prepared the arena of a run of the node since they last told, by its epoch."""
    in_step: bool = False
    """The step computed with blocks that were copied before it."""
    failed: frozenset[str] = frozenset()
    """Requests that a step computed with, or was to compute with, blocks that could not be copied."""
    dropped: frozenset[BlockKey] = frozenset()
    """Blocks that were to be saved and were not, for want of time. Not those that may hold something wrong."""
    arrived: int = 0
    """Steps whose copies have arrived, summed over ranks."""
    arrived_bytes: int = 0
    """Of their blocks, as if each rank had copied all of them."""
    arrived_seconds: float = 0.0
    """From the start of each of these steps' copies to the arrival of the last, summed likewise."""

    def aggregate(self, other: KVConnectorWorkerMetadata) -> Told:
        assert isinstance(other, Told)
        return Told(
            self.ready + other.ready,
            self.in_step or other.in_step,
            self.failed | other.failed,
            self.dropped | other.dropped,
            self.arrived + other.arrived,
            self.arrived_bytes + other.arrived_bytes,
            self.arrived_seconds + other.arrived_seconds,
        )
