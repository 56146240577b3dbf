"""What to send to a region that is about to start: prefill seconds saved there for each byte on the WAN.

A request trace is cut in the middle. A region is born at that moment with the blocks that were sent to it, and serves the second
half with a cache that never fills. Which blocks were sent is planned by ``replication.planner`` with the scores that a node's own
code learnt from the first half:

* learnt: expected uses (``kvstore.policy.reuse``) x prefill seconds, which is what nodes report
* hits: the hot prefixes of ``kvstore.policy.hotness`` alone
* count: blocks used most often, the plain threshold

The benefit of a set is the prefill time that the new region saves in its first minutes beyond what an empty one saves. The
gain is benefit per byte over that of sending everything, with as many bytes as bring 80% of the benefit of everything; 0 if
none do.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.study import Study
from benchmarks.traces.trace import ROOT, Trace, load
from kvstore.demand import prefill_seconds
from kvstore.identity import NO_PARENT, BlockKey
from kvstore.policy.hotness import Hotness
from kvstore.policy.reuse import Traffic
from kvstore.tiers.object.hotness import HotnessSnapshot
from replication.manifest import HotBlock
from replication.planner import by_value

TRACES = Path(__file__).parents[2] / "shared" / "traces"
FILE = "mooncake-fast25/conversation_trace.jsonl"
NAMESPACE = b"trace".ljust(16, b".")
BYTES_PER_TOKEN = 128 << 10
SHARE = 0.8
WINDOWS = {"": 300.0, "_first_minute": 60.0}


class Birth:
    """The moment at which a region is born: what was seen before, and what comes after."""

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self.time = trace.requests[-1].time / 2
        self.before = [request for request in trace.requests if request.time < self.time]
        self.after = [request for request in trace.requests if request.time >= self.time]
        self.seen = sorted({block for request in self.before for block in request.blocks})
        random = np.random.default_rng(1)
        self.keys = [BlockKey(random.bytes(16)) for _ in range(trace.unique)]

    def saved(self, sent: Sequence[int], window: float) -> float:
        """Prefill seconds that the new region saves in its first ``window`` seconds."""
        held = set(sent)
        seconds = 0.0
        for request in self.after:
            if request.time - self.time > window:
                break
            hits = 0
            while hits < len(request.blocks) and request.blocks[hits] in held:
                hits += 1
            seconds += prefill_seconds(hits * self.trace.block_tokens)
            held.update(request.blocks)
        return seconds

    def cost(self, block: int) -> float:
        """Prefill seconds of one block where it stands."""
        tokens = int(self.trace.depth[block]) * self.trace.block_tokens
        return prefill_seconds(tokens + self.trace.block_tokens) - prefill_seconds(tokens)

    def order(self, scores: Mapping[int, float]) -> list[int]:
        """As the planner sends them; blocks without a score are not sent."""
        places = {self.keys[block]: block for block in self.seen}
        length = self.trace.block_tokens * BYTES_PER_TOKEN
        offered = []
        for block in self.seen:
            if scores.get(block, 0.0) > 0:
                above = int(self.trace.parent[block])
                parent = NO_PARENT if above == ROOT else self.keys[above]
                offered.append(HotBlock(self.keys[block], parent, NAMESPACE, length, 0.0, scores[block]))
        return [places[block.key] for block in by_value(offered)]


def learnt(birth: Birth) -> dict[int, float]:
    traffic = Traffic(1 << 20)
    uses, last = dict.fromkeys(birth.seen, 0), dict.fromkeys(birth.seen, 0.0)
    for request in birth.before:
        traffic.observe([birth.keys[block] for block in request.blocks], request.time)
        for block in request.blocks:
            uses[block] += 1
            last[block] = request.time
    joined = b"".join(birth.keys[block] for block in birth.seen)
    age = birth.time - np.array([last[block] for block in birth.seen])
    rates = traffic.values(joined, np.array([uses[block] for block in birth.seen]), age)
    return {block: float(rate) * birth.cost(block) for block, rate in zip(birth.seen, rates, strict=True)}


def hits(birth: Birth) -> dict[int, float]:
    hotness, tokens = Hotness(), birth.trace.block_tokens
    for request in birth.before:
        keys = [birth.keys[block] for block in request.blocks]
        hotness.observe(keys, request.time, tokens, tokens * BYTES_PER_TOKEN)
    reported = HotnessSnapshot.of(hotness, birth.time, prefill_seconds).scores
    scores = {block: reported.get(birth.keys[block], 0.0) for block in birth.seen}
    for block in reversed(birth.seen):  # a block's number is higher than its parent's
        above = int(birth.trace.parent[block])
        if above != ROOT:
            scores[above] = max(scores[above], scores[block])
    return scores


def count(birth: Birth) -> dict[int, float]:
    scores = dict.fromkeys(birth.seen, 0.0)
    for request in birth.before:
        for block in request.blocks:
            scores[block] += 1.0
    return scores


POLICIES: dict[str, Callable[[Birth], dict[int, float]]] = {"learnt": learnt, "hits": hits, "count": count}


def gain(birth: Birth, order: Sequence[int], window: float) -> float:
    """See the module's text."""
    nothing, everything = birth.saved((), window), birth.saved(birth.seen, window)
    goal = nothing + SHARE * (everything - nothing)
    if birth.saved(order, window) < goal:
        return 0.0
    low, high = 0, len(order)
    while low < high:
        middle = (low + high) // 2
        if birth.saved(order[:middle], window) < goal:
            low = middle + 1
        else:
            high = middle
    return SHARE * len(birth.seen) / max(low, 1)


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--traces", type=Path, default=TRACES, help="folder of the traces (default: %(default)s)")


def run(args: Any) -> Mapping[str, float]:
    path = args.traces / FILE
    if not path.exists():
        raise SystemExit(f"no trace at {path}: name the folder that holds {FILE} with --traces")
    birth = Birth(load(path))
    table = Table("policy", "offered", *(f"gain, first {window:.0f} s" for window in WINDOWS.values()))
    figures: dict[str, float] = {"blocks_of_everything": len(birth.seen)}
    for name, policy in POLICIES.items():
        order = birth.order(policy(birth))
        gains = [gain(birth, order, window) for window in WINDOWS.values()]
        table.add_row(name, f"{len(order):,}", *(f"{value:.2f}" for value in gains))
        suffix = "" if name == "learnt" else f"_by_{name}"
        figures.update({f"wan_efficiency_gain{suffix}{w}": value for w, value in zip(WINDOWS, gains, strict=True)})
    Console(stderr=True).print(table)
    return figures


STUDY = Study(
    name="wan",
    summary="Prefill seconds saved per byte sent to a new region, against sending everything (conversation trace)",
    run=run,
    targets={"wan_efficiency_gain": ">=5"},
    arguments=arguments,
)
