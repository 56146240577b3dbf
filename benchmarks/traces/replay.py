"""Play a trace against a cache and count."""

from __future__ import annotations

import hashlib
import heapq
from dataclasses import dataclass

from benchmarks.traces.baselines import Baseline
from benchmarks.traces.trace import ROOT, Request, Trace
from kvstore.envelope import Header
from kvstore.identity import KEY_BYTES, NO_PARENT, BlockKey
from kvstore.index import BlockIndex
from kvstore.policy.eviction import EvictionPolicy, eviction_order
from kvstore.policy.reuse import Traffic

EVICTED_AT_ONCE = 1 / 64
"""As in ``kvstore.tiers``: a full tier ranks once and gives up this share."""

SECONDS_PER_OUTPUT_TOKEN = 0.03
"""The length of an answer is known when it ends."""


def baseline_hits(trace: Trace, cache: Baseline) -> int:
    """Blocks hit: a block counts only when every block before it in its chain hits. Each request is then touched tail first,
    so that heads stay longest, and its misses are inserted."""
    depth = trace.depth.tolist()
    hits = 0
    for request in trace.requests:
        for block in request.blocks:
            if block not in cache:
                break
            hits += 1
        for block in reversed(request.blocks):
            cache.access(block, depth[block], request.time)
    return hits


@dataclass(frozen=True)
class Keyed:
    """A trace with the keys and headers that a store would see."""

    trace: Trace
    keys: list[BlockKey]
    headers: list[Header]


def keyed(trace: Trace) -> Keyed:
    keys = [
        BlockKey(hashlib.blake2b(block.to_bytes(8, "little"), digest_size=KEY_BYTES).digest())
        for block in range(trace.unique)
    ]
    headers = [
        Header(
            key=key, namespace=bytes(16), parent=NO_PARENT if above == ROOT else keys[above], index=int(depth),
            tokens=trace.block_tokens, length=4096, crc=0,
        )
        for key, above, depth in zip(keys, trace.parent.tolist(), trace.depth, strict=True)
    ]  # fmt: skip
    return Keyed(trace, keys, headers)


class Cache:
    """A tier without bytes: the real index, ranked by the real code."""

    def __init__(self, capacity: int, policy: EvictionPolicy) -> None:
        self.capacity = capacity
        self.index = BlockIndex()
        self._policy = policy
        self.evicted: list[BlockKey] = []
        """By the last ``use``, in order."""

    def use(self, chain: list[BlockKey], headers: list[Header], now: float) -> int:
        """Count a request's hits, touch what is here, make room for the rest and insert it. Returns the hits."""
        self.evicted = []
        index = self.index
        missing = [position for position, key in enumerate(chain) if key not in index]
        index.touch(chain, now)
        added = missing[: self.capacity - (len(chain) - len(missing))]
        self._make_room(len(added), now)
        for position in added:
            index.add(headers[position], 0, now)
        return missing[0] if missing else len(chain)

    def _make_room(self, blocks: int, now: float) -> None:
        excess = len(self.index) + blocks - self.capacity
        if excess <= 0:
            return
        order = eviction_order(self.index, self._policy, self.index.used(), now)
        for row in order[: max(excess, int(self.capacity * EVICTED_AT_ONCE))].tolist():
            self.evicted.append(self.index.key(row))
            self.index.remove(self.evicted[-1])


class Answers:
    """Tells ``Traffic`` how long each answer was, when it has ended."""

    def __init__(self, source: Keyed, traffic: Traffic) -> None:
        self._source, self._traffic = source, traffic
        self._running: list[tuple[float, int, Request]] = []
        self._begun = 0

    def begin(self, request: Request) -> None:
        ends = request.time + request.output_tokens * SECONDS_PER_OUTPUT_TOKEN
        heapq.heappush(self._running, (ends, self._begun, request))
        self._begun += 1

    def until(self, now: float) -> None:
        while self._running and self._running[0][0] <= now:
            done = heapq.heappop(self._running)[2]
            self._traffic.answered([self._source.keys[block] for block in done.blocks], done.output_tokens)


def policy_hits(source: Keyed, cache: Cache, traffic: Traffic | None = None, answers: bool = True) -> int:
    """Blocks hit when the product's policy runs the cache. ``answers``: engines tell how long their answers were."""
    hits = 0
    told = Answers(source, traffic) if traffic and answers else None
    for request in source.trace.requests:
        if told:
            told.until(request.time)
        chain = [source.keys[block] for block in request.blocks]
        if traffic:
            traffic.observe(chain, request.time)
        hits += cache.use(chain, [source.headers[block] for block in request.blocks], request.time)
        if told:
            told.begin(request)
    return hits
