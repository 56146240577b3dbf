"""What to copy, in which order: a pure function of the manifest, of what is there, and of the limits.

Blocks of a region form trees, since prompts share prefixes, and a block is of no use before its ancestors. The order that
makes every moment of a partial copy as useful as can be is therefore that of a scheduling problem, to order jobs of a tree by
value over time with parents first, which Horn's algorithm solves exactly: join the block of the highest score per byte to its
parent, until it comes first. (W. A. Horn, Single-Machine Job Sequencing with Treelike Precedence Ordering, 1972.)
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from enum import Enum

from kvstore.identity import NO_PARENT, BlockKey
from kvstore.tombstones import Tombstone, buried
from replication.manifest import HotBlock, Label

GB = 10**9


class LeftOut(Enum):
    """Why a block of the manifest is not copied."""

    PRESENT = "present"
    TOMBSTONE = "tombstone"
    RESIDENCY = "residency"
    OTHER_FLOW = "other_flow"
    """Another model or tenant than those of the flow."""
    SCORE = "below_min_score"
    BYTES = "max_bytes"
    MONEY = "money"
    ROOM = "bucket_full"
    """Worth less than what the cap of the bucket leaves room for."""
    PARENT = "parent"
    """Of no use without an ancestor that is left out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a plan must not exceed. None: no limit."""

    min_score: float = 0.0
    held_bytes: int | None = None
    """Of the manifest's blocks in the destination, those that are there included."""
    copied_bytes: int | None = None
    """What the money that is left pays for."""


@dataclass(slots=True)
class Tally:
    blocks: int = 0
    nbytes: int = 0

    def add(self, block: HotBlock) -> None:
        self.blocks += 1
        self.nbytes += block.nbytes


@dataclass(frozen=True, slots=True)
class Plan:
    """Blocks to copy, in order: every block after its parent, unless that is in the destination already."""

    blocks: Sequence[HotBlock]
    left_out: Mapping[LeftOut, Tally] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        return sum(block.nbytes for block in self.blocks)

    def without(self, keys: AbstractSet[BlockKey], reason: LeftOut) -> Plan:
        """The plan less some blocks, none of which another one continues."""
        tally = Tally()
        for block in self.blocks:
            if block.key in keys:
                tally.add(block)
        if not tally.blocks:
            return self
        return Plan([b for b in self.blocks if b.key not in keys], {**self.left_out, reason: tally})


def plan(
    blocks: Sequence[HotBlock],
    labels: Mapping[bytes, Label],
    have: AbstractSet[BlockKey],
    limits: Limits,
    tombstones: Sequence[Tombstone] = (),
    wanted: Callable[[Label], LeftOut | None] = lambda label: None,
) -> Plan:
    """Plan the copy of ``blocks`` (parents first) to where ``have`` is. ``wanted`` judges namespaces."""
    refused: dict[BlockKey, LeftOut] = dict.fromkeys(buried(blocks, labels, tombstones), LeftOut.TOMBSTONE)
    verdicts = {digest: wanted(label) for digest, label in labels.items()}
    best = _best_below(blocks)
    held = 0
    for block in blocks:
        if block.key in refused:
            continue
        if (verdict := verdicts[block.namespace]) is not None:
            refused[block.key] = verdict
        elif block.key in have:
            held += block.nbytes
        elif best[block.key] < limits.min_score:
            refused[block.key] = LeftOut.SCORE
    candidates = [block for block in blocks if block.key not in refused]

    usable = {NO_PARENT}
    chosen: list[HotBlock] = []
    left: dict[LeftOut, Tally] = {}
    copied = 0
    for block in by_value(candidates, have):
        if block.key in have:
            reason = LeftOut.PRESENT
            if block.parent in usable:
                usable.add(block.key)
        elif block.parent not in usable:
            reason = LeftOut.PARENT
        elif limits.held_bytes is not None and held + block.nbytes > limits.held_bytes:
            reason = LeftOut.BYTES
        elif limits.copied_bytes is not None and copied + block.nbytes > limits.copied_bytes:
            reason = LeftOut.MONEY
        else:
            chosen.append(block)
            usable.add(block.key)
            held += block.nbytes
            copied += block.nbytes
            continue
        left.setdefault(reason, Tally()).add(block)
    for block in blocks:
        if block.key in refused:
            left.setdefault(refused[block.key], Tally()).add(block)
    return Plan(chosen, left)


def affordable(money: float | None, price_per_gb: float) -> int | None:
    """Bytes that the money pays for; None when money is no limit."""
    if money is None or not price_per_gb:
        return None
    return max(0, math.floor(money / price_per_gb * GB))


def by_value(blocks: Sequence[HotBlock], free: Collection[BlockKey] = ()) -> list[HotBlock]:
    """All blocks, each after its parent if that is among them, in the order that gains the most score per byte soonest.

    Blocks in ``free`` cost nothing. A block whose parent is not among ``blocks`` starts a tree of its own.
    """
    place = {block.key: row for row, block in enumerate(blocks)}
    parent = [place.get(block.parent, -1) for block in blocks]
    score = [block.score for block in blocks]
    size = [0 if block.key in free else block.nbytes for block in blocks]
    # A run is a list of blocks that are taken together; it is known by its first block.
    following = [-1] * len(blocks)
    last = list(range(len(blocks)))
    run_of = list(range(len(blocks)))
    """Towards the first block of the run: followed with path halving."""
    version = [0] * len(blocks)

    def first_of(row: int) -> int:
        while run_of[row] != row:
            run_of[row] = run_of[run_of[row]]
            row = run_of[row]
        return row

    def entry(row: int) -> tuple[float, int, int]:
        density = score[row] / size[row] if size[row] else math.inf
        return -density, row, version[row]

    heap = [entry(row) for row in range(len(blocks))]
    heapq.heapify(heap)
    order: list[HotBlock] = []
    while heap:
        _, row, seen = heapq.heappop(heap)
        if seen != version[row] or run_of[row] != row:
            continue
        if parent[row] == -1 or run_of[parent[row]] == -1:
            while row != -1:
                order.append(blocks[row])
                run_of[row] = -1
                row = following[row]
            continue
        above = first_of(parent[row])
        following[last[above]] = row
        last[above] = last[row]
        run_of[row] = above
        score[above] += score[row]
        size[above] += size[row]
        version[above] += 1
        heapq.heappush(heap, entry(above))
    return order


def _best_below(blocks: Sequence[HotBlock]) -> dict[BlockKey, float]:
    """The highest score among a block and all that continue it: what keeps a chain whole."""
    best = {block.key: block.score for block in blocks}
    for block in reversed(blocks):
        if block.parent in best:
            best[block.parent] = max(best[block.parent], best[block.key])
    return best
