"""A new cluster on a budget of bytes: what is sent ahead of the first request, and what is kept for reads on demand.

A block that is sent ahead is asked for with a probability below one; a block that is read is always a hit. So a small budget is
best kept. But requests can only read what the link brings, and long before it is full they wait for each other and had better
compute. So docs/regions.md advises to keep what the link brings in half a minute, which is half of its load in a cluster's first
minute, when most is asked for, and to send the rest ahead. Where the planner would not even read a usual prompt over an idle
link nothing is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from benchmarks.planner import Model
from benchmarks.traces.birth import Birth, Served
from benchmarks.traces.remote import MLA, WAN, Link, block_bytes, reads_pay

TIMES = (5, 3, 2)
"""Thresholds of the count: the budgets are as many blocks as were used so often."""
KEPT_SECONDS = 30
"""Of the link, kept for reads on demand."""
HEADROOM_POINTS = 1.0

ADVISED, COUNT, COUNT_READING, EVERYTHING = "advised", "count", "count_with_reads", "everything"
SENT_AHEAD = "share_100"


def share_ahead(share: float, budget: int, per_second: float) -> int:
    return int(share * budget)


def link_kept(seconds: float, budget: int, per_second: float) -> int:
    return max(budget - int(seconds * per_second), 0)


DIVISIONS: Mapping[str, Callable[[int, float], int]] = {
    **{f"share_{100 * share:.0f}": partial(share_ahead, share) for share in (0.0, 0.25, 0.5, 0.75, 1.0)},
    **{f"kept_{seconds}s": partial(link_kept, seconds) for seconds in (15, KEPT_SECONDS, 60)},
}
"""How many blocks are sent ahead of a budget, over a link that brings so many blocks per second."""


def division(birth: Birth, link: Link = WAN, model: Model = MLA) -> str:
    """As docs/regions.md advises: the product bounds what is sent ahead, and an operator says how much that is."""
    usual = int(np.median([len(request.blocks) for request in birth.before]))
    pay = reads_pay(link, model, birth.source.trace.block_tokens, usual)
    return f"kept_{KEPT_SECONDS}s" if pay else SENT_AHEAD


def blocks_ahead(birth: Birth, budget: int, name: str, link: Link = WAN, model: Model = MLA) -> int:
    return DIVISIONS[name](budget, link.bandwidth / block_bytes(model, birth.source.trace.block_tokens))


@dataclass(frozen=True)
class Point:
    """All contestants at equal bytes, at the end of one window."""

    trace: str
    birth: float
    times: int
    blocks: int
    window: float
    served: Mapping[str, Served]

    def gain(self, choice: str = ADVISED) -> float:
        """Hits over those of the count, in percent of tokens."""
        return self.served[choice].percent - self.served[COUNT].percent

    def seconds_gained(self, choice: str = ADVISED) -> float:
        """Prefill seconds saved beyond the count's."""
        return self.served[choice].seconds - self.served[COUNT].seconds

    @property
    def counts(self) -> bool:
        return self.served[EVERYTHING].percent - self.served[COUNT].percent > HEADROOM_POINTS


def points_of(birth: Birth, windows: Sequence[float], link: Link = WAN, model: Model = MLA) -> list[Point]:
    """All budgets and windows."""

    def spent(order: Sequence[int], budget: int, name: str) -> list[Served]:
        first = blocks_ahead(birth, budget, name, link, model)
        return birth.serve(order[:first], windows, birth.remote(link, budget - first), model)

    everything, by_count = birth.serve(birth.seen, windows, model=model), birth.by_count()
    chosen = division(birth, link, model)
    points = []
    for times in TIMES:
        often = birth.seen_often(times)
        budget = len(often)
        results = {name: spent(birth.learnt, budget, name) for name in DIVISIONS}
        results |= {
            ADVISED: results[chosen],
            COUNT: birth.serve(often, windows, model=model),
            COUNT_READING: spent(by_count, budget, chosen),
            EVERYTHING: everything,
        }
        for place, window in enumerate(windows):
            served = {choice: one[place] for choice, one in results.items()}
            points.append(Point(birth.source.trace.name, birth.share, times, budget, window, served))
    return points
