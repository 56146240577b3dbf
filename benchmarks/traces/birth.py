"""A new cluster that starts in the middle of a trace: what was seen before, what comes after, what a set of blocks is worth."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from benchmarks.planner import Model
from benchmarks.traces.remote import MLA, NOTHING, Link, Read, Reader, Remote
from benchmarks.traces.replay import Answers, Keyed
from benchmarks.traces.trace import ROOT, Request
from kvstore.demand import REPORT_SECONDS, prefill_seconds
from kvstore.identity import BlockKey
from kvstore.index import BlockIndex
from kvstore.policy.reuse import Traffic
from kvstore.tiers.object.hotness import HotnessSnapshot, merged
from replication.hotset import MOST_BLOCKS, hot_block, raise_ancestors
from replication.planner import by_value

REHEARSED_BEFORE = 86_400.0
"""Seconds between a rehearsal and the trace."""


@dataclass(frozen=True)
class Served:
    """What the requests of a window got from blocks that were there."""

    hits: int
    references: int
    seconds: float
    """Of prefill that were not spent, less those that requests waited for blocks to be read."""
    fetched: int = 0
    """Blocks read on demand."""

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

    def serve(
        self, sent: Iterable[int], windows: Sequence[float], remote: Remote | None = None, model: Model = MLA
    ) -> list[Served]:
        """Serve the first seconds of each window, given what was sent before the first request, and what may be read."""
        ends = sorted(windows)
        results: dict[float, Served] = {}
        served = Served(0, 0, 0.0)
        for request, found, read in self._play(sent, remote, model):
            while len(results) < len(ends) and request.time - self.time > ends[len(results)]:
                results[ends[len(results)]] = served
            if len(results) == len(ends):
                break
            hits = found + read.blocks
            served = Served(
                served.hits + hits,
                served.references + len(request.blocks),
                served.seconds + self.saved(hits, len(request.blocks), model) - read.seconds,
                served.fetched + read.fetched,
            )
        return [results.get(window, served) for window in windows]

    def _play(self, sent: Iterable[int], remote: Remote | None, model: Model) -> Iterator[tuple[Request, int, Read]]:
        """Every request with its blocks that are here, and what it reads."""
        held = set(sent)
        reader = Reader(remote, model, self.source.trace.block_tokens) if remote else None
        for request in self.after:
            if reader is not None:
                for blocks in reader.arrived(request.time):
                    held.update(blocks)
            found = self.hits(request.blocks, held)
            read = reader.read(request, found) if reader is not None else NOTHING
            if not read.blocks:
                held.update(request.blocks)
            yield request, found, read

    def saved(self, found: int, blocks: int, model: Model) -> float:
        """Seconds of prefill that a request of so many blocks is spared by the first ``found``."""
        tokens, have = blocks * self.source.trace.block_tokens, found * self.source.trace.block_tokens
        return model.seconds(0, tokens) - model.seconds(have, tokens - have)

    @cached_property
    def learnt(self) -> list[int]:
        """What the older region expects back, in the order in which it is sent; as of the birth."""
        return self.by_learning()

    def remote(self, link: Link, most: float = math.inf, ahead: float = 0.0) -> Remote:
        """Reads of what the older region's manifest names; ``ahead`` as for ``by_learning``."""
        listed = self.by_learning(ahead) if ahead else self.learnt
        return Remote(link, frozenset(listed[:MOST_BLOCKS]), most)

    def seconds_to_steady(self, sent: Iterable[int], share: float, remote: Remote | None = None) -> float:
        """From when on the cluster hits ``share`` of what one hits that has everything. Seconds."""
        mine = [found + read.blocks for _, found, read in self._play(sent, remote, MLA)]
        best = [found for _, found, _ in self._play(self.seen, None, MLA)]
        remaining = np.cumsum(np.array([mine, best])[:, ::-1], axis=1)[:, ::-1]
        short = np.flatnonzero(remaining[0] < share * remaining[1])
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
        ends = (self.source.trace.depth + 1) * self.source.trace.block_tokens
        begins = self.source.trace.depth * self.source.trace.block_tokens
        return self.sent(
            {block: prefill_seconds(int(ends[block])) - prefill_seconds(int(begins[block])) for block in asked}
        )

    def sent(self, scores: Mapping[int, float]) -> list[int]:
        """Blocks in the order in which the planner sends them; those without a score are not sent."""
        keys = self.source.keys
        ranked: dict[BlockKey, float] = {keys[block]: score for block, score in scores.items() if score > 0}
        offered = [hot_block(self.source.headers[block]) for block in sorted(scores)]
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
