"""Reads on demand: what a new region was not sent, but the older one has listed, read over the WAN when a request asks for it.

The product's planner (``kvstore.policy.planner``) decides for each request whether to read or to compute. It is given what a
node measures: the link's bandwidth and latency, the bytes that others wait for, and how busy the link has been. Here it knows
them exactly (the study ``planner`` is about learning them), and what it expects comes true: bytes come one after the other,
in the order in which requests asked, and every burst of blocks that a node asks for together pays the latency once.

The engine is taken to be idle. A busy one is served sooner by loading, so the planner would read more than it does here.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass

from benchmarks.planner import BLOCK_TOKENS, MODELS, Model
from benchmarks.traces.trace import Request
from kvstore.policy import planner
from kvstore.policy.planner import Prefetch, Run, Speed, Wait, plan
from kvstore.policy.queueing import Flow
from kvstore.promotion import BURST
from kvstore.tiers.base import Medium

GQA, _, MLA = MODELS
GBIT = 1e9 / 8
COMPLETE = Wait(Prefetch.WAIT_COMPLETE)


@dataclass(frozen=True)
class Link:
    """Into the new region, from the older region's bucket; all requests share it."""

    bandwidth: float
    """Bytes per second."""
    latency: float
    """Seconds before the first byte."""
    window: int = BURST
    """Blocks of ``BLOCK_TOKENS`` that are asked for together."""


WAN = Link(25 * GBIT, 0.07)


@dataclass(frozen=True)
class Remote:
    """What a new region may read on demand."""

    link: Link
    listed: Container[int]
    """Blocks that the older region tells of."""
    most: float = math.inf
    """Blocks that may be fetched in all."""


@dataclass(frozen=True)
class Read:
    """What a request waits for."""

    blocks: int
    """Of the trace, behind those that are here already."""
    fetched: int
    """Of these, those that nobody had asked the link for before: what costs bytes."""
    seconds: float


NOTHING = Read(0, 0, 0.0)


class Reader:
    """The requests of a new region read over one link."""

    def __init__(self, remote: Remote, model: Model, block_tokens: int) -> None:
        self._remote, self._link = remote, remote.link
        self._model, self._block_tokens = model, block_tokens
        self._nbytes = block_bytes(model, block_tokens)
        self._fetched = 0
        self._free_at = 0.0
        self._loads = Flow()
        self._arriving: dict[int, float] = {}
        self._coming: list[tuple[float, int, tuple[int, ...]]] = []
        self._numbers = itertools.count()

    def arrived(self, now: float) -> Iterator[tuple[int, ...]]:
        """Blocks that are here since the last call."""
        while self._coming and self._coming[0][0] <= now:
            _, _, blocks = heapq.heappop(self._coming)
            for block in blocks:
                self._arriving.pop(block, None)
            yield blocks

    def read(self, request: Request, here: int) -> Read:
        """Decide for a request whose first ``here`` blocks are here. If it reads, its rest is here when that has ``arrived``:
        what it computes, it computes behind what it reads."""
        now, rest = request.time, request.blocks[here:]
        wanted = self._wanted(rest)
        chosen = self._plan(now, wanted, len(request.blocks), here) if wanted else 0
        if not chosen:
            return NOTHING
        new = [block for block in wanted if block not in self._arriving]
        ready = max((self._arriving[block] for block in wanted if block in self._arriving), default=now)
        if new:
            speed = self._speed(now, 0)
            ready = max(ready, now + speed.seconds(self._run(len(new))))
            self._free_at = max(self._free_at, now) + len(new) * self._nbytes / self._link.bandwidth
            self._arriving.update(dict.fromkeys(new, ready))
            self._fetched += len(new)
        heapq.heappush(self._coming, (ready, next(self._numbers), rest))
        return Read(len(wanted), len(new), ready - now)

    def _wanted(self, rest: Sequence[int]) -> list[int]:
        """The beginning of ``rest`` that could be had."""
        wanted = []
        left = self._remote.most - self._fetched
        for block in rest:
            if block not in self._arriving:
                if block not in self._remote.listed or left < 1:
                    break
                left -= 1
            wanted.append(block)
        return wanted

    def _plan(self, now: float, wanted: Sequence[int], blocks: int, here: int) -> int:
        mine = sum(block in self._arriving for block in wanted)
        request = planner.Request(
            runs=(self._run(len(wanted)),),
            start=here * self._block_tokens,
            tokens=blocks * self._block_tokens,
            block_tokens=BLOCK_TOKENS,
        )
        decision = plan(request, {Medium.REMOTE: self._speed(now, mine)}, self._model.seconds, COMPLETE)
        if seconds := decision.loading.get(Medium.REMOTE):
            self._loads.add(now, seconds)
        return decision.blocks

    def _run(self, blocks: int) -> Run:
        return Run(Medium.REMOTE, blocks * self._block_tokens // BLOCK_TOKENS, blocks * self._nbytes)

    def _speed(self, now: float, mine: int) -> Speed:
        """As things are, without ``mine`` blocks that are on their way already."""
        link = self._link
        queued = max(int((self._free_at - now) * link.bandwidth) - mine * self._nbytes, 0)
        line = self._loads.line(now, 0, queued / link.bandwidth)
        return Speed(link.latency, link.bandwidth, link.window, queued, line)


def block_bytes(model: Model, block_tokens: int) -> int:
    """Of a block of so many tokens."""
    return model.block_bytes * block_tokens // BLOCK_TOKENS


def reads_pay(link: Link, model: Model, block_tokens: int, blocks: int) -> bool:
    """Whether a prompt of so many blocks is read rather than computed when nobody else uses the link."""
    prompt = Request(0.0, tuple(range(blocks)), blocks * block_tokens, 0)
    return Reader(Remote(link, range(blocks)), model, block_tokens).read(prompt, 0).blocks > 0
