"""A new cluster that starts in the middle of a trace: what was seen before, what comes after, what a set of blocks is worth."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from benchmarks.traces.replay import Answers, Keyed
from benchmarks.traces.trace import ROOT, Request
from kvstore.demand import REPORT_SECONDS, prefill_seconds
from kvstore.identity import BlockKey
from kvstore.index import BlockIndex
from kvstore.policy.reuse import Traffic
from kvstore.tiers.object.hotness import HotnessSnapshot, merged
from replication.hotset import hot_block, raise_ancestors
from replication.planner import by_value

BYTES_PER_TOKEN = 128 << 10
"""An 8B model with grouped queries, in bf16."""
REHEARSED_BEFORE = 86_400.0
"""Seconds between a rehearsal and the trace."""


@dataclass(frozen=True)
class Served:
    """What the requests of a window got from blocks that were there."""

    hits: int
    references: int
    seconds: float
    """Of prefill that were not spent."""

    @property
    def percent(self) -> float:
        """Hit ratio. All blocks have as many tokens, so it is one of tokens too."""
        return 100 * self.hits / max(self.references, 1)


class Birth:
    """The moment at which a cluster is born: when a share of the trace's requests is over.

    Its cache never fills. Before it, an older cluster whose bucket holds everything has served the requests.
    """

    def __init__(self, source: Keyed, share: float = 0.5) -> None:
        self.source, self.share = source, share
        trace = source.trace
        first = int(len(trace.requests) * share)
        self.before, self.after = trace.requests[:first], trace.requests[first:]
        self.time = self.after[0].time
        self.counts = Counter(block for request in self.before for block in request.blocks)
        self.seen = sorted(self.counts)
        """Parents first: a block's number is higher than its parent's."""
        spent = [prefill_seconds(depth * trace.block_tokens) for depth in range(int(trace.depth.max()) + 2)]
        self._spent = np.array(spent)

    def serve(self, sent: Iterable[int], windows: Sequence[float]) -> list[Served]:
        """Serve the first seconds of each window, given what was sent before the first request."""
        held = set(sent)
        ends = sorted(windows)
        results: dict[float, Served] = {}
        hits = references = 0
        seconds = 0.0
        for request in self.after:
            while len(results) < len(ends) and request.time - self.time > ends[len(results)]:
                results[ends[len(results)]] = Served(hits, references, seconds)
            if len(results) == len(ends):
                break
            found = self.hits(request.blocks, held)
            hits += found
            references += len(request.blocks)
            seconds += float(self._spent[found])
            held.update(request.blocks)
        last = Served(hits, references, seconds)
        return [results.get(window, last) for window in windows]

    def seconds_to_steady(self, sent: Iterable[int], share: float) -> float:
        """From when on the cluster hits ``share`` of what one hits that has everything. Seconds."""
        held, all_held = set(sent), set(self.seen)
        rows = []
        for request in self.after:
            rows.append((self.hits(request.blocks, held), self.hits(request.blocks, all_held)))
            held.update(request.blocks)
            all_held.update(request.blocks)
        remaining = np.cumsum(np.array(rows)[::-1], axis=0)[::-1]
        short = np.flatnonzero(remaining[:, 0] < share * remaining[:, 1])
        steady = int(short[-1]) + 1 if len(short) else 0
        return self.after[min(steady, len(self.after) - 1)].time - self.time

    @staticmethod
    def hits(blocks: Sequence[int], held: set[int]) -> int:
        for position, block in enumerate(blocks):
            if block not in held:
                return position
        return len(blocks)

    def seen_often(self, times: int) -> list[int]:
        """Blocks with so many uses: the plain threshold. Never a block without its ancestors."""
        return [block for block in self.seen if self.counts[block] >= times]

    def by_count(self) -> list[int]:
        """The plain threshold for any number of blocks."""
        return self.sent({block: float(count) for block, count in self.counts.items()})

    def by_learning(self, ahead: float = 0.0, rehearsed: bool = False) -> list[int]:
        """As a node reports them and the planner sends them: what the older cluster expects back.

        ``ahead``: seconds that the report is old by the time of the birth. ``rehearsed``: the older cluster has served all of the
        trace once before, with other blocks: it knows how such traffic goes on, and not what any one conversation will do.
        """
        trace, keys = self.source.trace, self.source.keys
        traffic, index = Traffic(1 << 20), BlockIndex()
        until = self.time - ahead
        if rehearsed:
            others = [BlockKey(bytes(byte ^ 0xFF for byte in key)) for key in keys]
            earlier = trace.requests[-1].time - trace.requests[0].time + REHEARSED_BEFORE
            requests = [replace(request, time=request.time - earlier) for request in trace.requests]
            teach(traffic, replace(self.source, keys=others), requests, requests[-1].time)
        teach(traffic, self.source, self.before, until)
        for request in self.before:
            if request.time > until:
                break
            index.touch([keys[block] for block in request.blocks], request.time)
            for block in request.blocks:
                if keys[block] not in index:
                    index.add(self.source.headers[block], 0, request.time)
        report = HotnessSnapshot.unpack(HotnessSnapshot.learnt(traffic, index, until, prefill_seconds).pack())
        scores = merged([report], self.time)
        above = trace.parent.tolist()
        told: dict[int, float] = {}
        for block in reversed(self.seen):  # with the ancestors, which a report leaves out
            if block in told or keys[block] in scores:
                told[block] = scores.get(keys[block], 0.0)
                if above[block] != ROOT:
                    told[above[block]] = 0.0
        return self.sent(told)

    def by_hindsight(self, window: float) -> list[int]:
        """The best that is possible for the first ``window`` seconds, to within what the planner's order is from it."""
        asked = {
            block for request in self.after if request.time - self.time <= window for block in request.blocks
        } & self.counts.keys()
        depth = self.source.trace.depth
        return self.sent({block: float(self._spent[depth[block] + 1] - self._spent[depth[block]]) for block in asked})

    def sent(self, scores: Mapping[int, float]) -> list[int]:
        """Blocks in the order in which the planner sends them; those without a score are not sent."""
        keys, length = self.source.keys, self.source.trace.block_tokens * BYTES_PER_TOKEN
        ranked: dict[BlockKey, float] = {keys[block]: score for block, score in scores.items() if score > 0}
        offered = [replace(hot_block(self.source.headers[block]), length=length) for block in sorted(scores)]
        raise_ancestors(offered, ranked)
        number = {keys[block]: block for block in scores}
        order = by_value([replace(block, score=ranked[block.key]) for block in offered if block.key in ranked])
        return [number[block.key] for block in order]


def teach(traffic: Traffic, source: Keyed, requests: Sequence[Request], until: float) -> None:
    """Let a node serve requests. It makes its estimates all along, as for reports, because it judges each by what follows."""
    answers = Answers(source, traffic)
    reported = requests[0].time
    for request in requests:
        if request.time > until:
            break
        if request.time >= reported + REPORT_SECONDS:
            traffic.values(b"", np.zeros(0, dtype=np.intp), np.zeros(0))
            reported = request.time
        answers.until(request.time)
        answers.begin(request)
        traffic.observe([source.keys[block] for block in request.blocks], request.time)
    answers.until(until)
