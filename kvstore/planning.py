"""The planner at work in a node: it asks ``kvstore.policy.planner`` with what the node measures and its engines report.

Owned by the node's event loop. Cheap: a decision for 2,048 blocks takes some 0.1 ms.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile
from typing import Any

import msgpack
from prometheus_client import Counter

from kvstore.config.schema import PolicySection
from kvstore.demand import Demand
from kvstore.history import What
from kvstore.identity import BlockKey
from kvstore.namespaces import KnownNamespace
from kvstore.policy.admission import Mode
from kvstore.policy.planner import WINDOW, Decision, Prefetch, Reason, Request, Run, Speed, Wait, load_everything, plan
from kvstore.policy.prefill import PrefillSpeed
from kvstore.policy.queueing import Flow, Line, Work
from kvstore.policy.speed import SpeedMeter
from kvstore.store import Store
from kvstore.tiers.base import Medium

MOST_ENGINES = 64
"""Namespaces whose speeds are remembered; the one that reported longest ago is dropped."""

MOST_LOADING = 1024
"""Loads of an engine that are remembered until they are over."""

_VERSION = 1
_MAX_PACKED = 1 << 20

REMEASURED_SECONDS = 300.0
REMEASURED_BLOCKS = 4
"""Of what only another region has, so many are fetched so often though the engine computes them: the way may have improved."""

PROMISED_SECONDS = 30.0
"""A planned load counts as work ahead of others for so long at most: its request may never be admitted."""


@dataclass(slots=True)
class _Engine:
    """What is known of the engines of one namespace."""

    prefill: PrefillSpeed
    pages: SpeedMeter
    """From the arena to the engine's pages."""


@dataclass(slots=True)
class _Queue:
    """What one engine is asked for."""

    flow: Flow = field(default_factory=Flow)
    loading: dict[BlockKey, tuple[float, float]] = field(default_factory=dict)
    """When requests that load are expected to be loaded and what they then compute, by their last block to load."""
    last: BlockKey | None = None
    """Whose request was planned last: it may ask again."""


class Planning:
    """Plans loads for the requests of a node's engines."""

    def __init__(self, store: Store, mode: Mode, wait: Wait) -> None:
        self.mode = mode
        self.wait = wait
        self._store = store
        self._engines: dict[bytes, _Engine] = {}
        self._queues: dict[object, _Queue] = {}
        self._remeasured = -REMEASURED_SECONDS
        self._loads = {medium: Flow() for medium in store.promoter.meters}
        self._planned = Counter(
            "kvstore_planned_requests",
            "Lookups that found something, by what the planner said of loading it",
            ("reason",),
            registry=store.metrics.registry,
        )
        self._blocks = Counter(
            "kvstore_planned_blocks",
            "Blocks found by lookups, by what the planner said of them",
            ("plan", "reason"),
            registry=store.metrics.registry,
        )

    @classmethod
    def of(cls, settings: PolicySection, store: Store, demand: Demand) -> Planning:
        """As configured, with what was learnt before a restart; ``demand`` keeps what is learnt from now on."""
        wait = Wait(Prefetch(settings.prefetch), settings.prefetch_timeout_base, settings.prefetch_timeout_per_ki_token)
        planning = cls(store, Mode(settings.planner), wait)
        demand.also_keep("speeds", planning.load, planning.pack)
        return planning

    def pack(self) -> bytes:
        """The speeds that were learnt, for a file: some 0.5 KB a tier and an engine."""
        meters = {medium.value: meter.pack() for medium, meter in self._store.promoter.meters.items() if meter.known}
        engines = [
            [
                digest,
                engine.prefill.pack() if engine.prefill.known else None,
                engine.pages.pack() if engine.pages.known else None,
            ]
            for digest, engine in self._engines.items()
        ]
        packed: bytes = msgpack.packb([_VERSION, meters, engines])
        return packed

    def load(self, data: bytes) -> None:
        """What ``pack`` made. Raises ValueError for bytes that it cannot have made. A tier that is gone is left out."""
        if len(data) > _MAX_PACKED:
            raise ValueError("too much for speeds")
        try:
            version, meters, engines = msgpack.unpackb(data)
            if version != _VERSION or not isinstance(meters, dict) or len(engines) > MOST_ENGINES:
                raise ValueError("not speeds of this version")
            for medium, meter in self._store.promoter.meters.items():
                if medium.value in meters:
                    meter.load(meters[medium.value])
            for digest, prefill, pages in engines:
                if not isinstance(digest, bytes):
                    raise ValueError("not a namespace")
                engine = self._engine(digest)
                if prefill is not None:
                    engine.prefill.load(prefill)
                if pages is not None:
                    engine.pages.load(pages)
        except (TypeError, msgpack.UnpackException) as error:
            raise ValueError("not speeds") from error

    def decide(
        self,
        namespace: KnownNamespace,
        keys: Sequence[BlockKey],
        start: int,
        runs: Sequence[tuple[Medium, int]],
        waiting: int = 0,
        asker: object = None,
    ) -> Decision:
        """What the engine is to load of ``runs``, which begin at ``keys[start]``; in ``observe`` what it would be told.

        ``waiting``: requests of the engine ``asker`` that wait to be computed, without those that load. Until its prefill was
        measured, nothing is loaded from another region in ``enforce``: that way may be long.
        """
        assert namespace.block_bytes is not None
        size = namespace.fields.block_tokens
        now = time.monotonic()
        queue = self._queue(asker)
        engine = self._engines.get(namespace.digest)
        prefill = engine.prefill.seconds if engine is not None and engine.prefill.known else None
        if prefill is None and self.mode is Mode.ENFORCE:
            runs = list(takewhile(lambda run: run[0] is not Medium.REMOTE, runs))
        request = Request(
            runs=tuple(Run(medium, blocks, blocks * namespace.block_bytes) for medium, blocks in runs),
            start=start * size,
            tokens=len(keys) * size,
            block_tokens=size,
            line=self._line(queue, now, waiting),
        )
        if self.mode is Mode.OFF:
            decision = load_everything(request, self.wait, Reason.OFF)
        else:
            decision = plan(request, self._speeds(engine, keys, now, queue, waiting), prefill, self.wait)
        if decision.found:
            self._count(decision)
        told = load_everything(request, self.wait, Reason.OFF) if self.mode is Mode.OBSERVE else decision
        self._follow(told, keys[start:], runs, namespace.block_bytes)
        self._join(queue, decision, keys[start:], now)
        return told

    def prefill_seconds(self, namespace: KnownNamespace, start: int, tokens: int) -> float:
        """What computing ``tokens`` behind ``start`` takes the namespace's engines; 0 while that is not known."""
        engine = self._engines.get(namespace.digest)
        return engine.prefill.seconds(start, tokens) if engine is not None and engine.prefill.known else 0.0

    def step(self, namespace: KnownNamespace, tokens: int, pairs: float, seconds: float) -> None:
        """An engine reports a step; see ``PrefillSpeed.observe``."""
        self._engine(namespace.digest).prefill.observe(tokens, pairs, seconds)

    def loaded(self, namespace: KnownNamespace, nbytes: int, seconds: float) -> None:
        """An engine reports a load of blocks that were all in the arena."""
        self._engine(namespace.digest).pages.observe(nbytes, seconds)

    def describe(self) -> Mapping[str, Any]:
        """For people: mode, and what was learnt."""
        meters = {medium: meter for medium, meter in self._store.promoter.meters.items() if meter.known}
        return {
            "mode": self.mode.value,
            "prefetch": self.wait.mode.value,
            "tiers": {medium.value: meter.describe() for medium, meter in meters.items()},
            "engines": [
                {"namespace": digest, "prefill": engine.prefill.describe(), "pages": engine.pages.describe()}
                for digest, engine in self._engines.items()
            ],
        }

    def _engine(self, digest: bytes) -> _Engine:
        engine = self._engines.pop(digest, None) or _Engine(PrefillSpeed(), SpeedMeter(Medium.HOST, WINDOW))
        self._engines[digest] = engine
        if len(self._engines) > MOST_ENGINES:
            del self._engines[next(iter(self._engines))]
        return engine

    def _queue(self, asker: object) -> _Queue:
        queue = self._queues.pop(asker, None) or _Queue()
        self._queues[asker] = queue
        if len(self._queues) > MOST_ENGINES:
            del self._queues[next(iter(self._queues))]
        return queue

    def _line(self, queue: _Queue, now: float, waiting: int) -> Line:
        """Who waits for the engine, and which loads will come back to it."""
        promises = self._store.promoter.promises
        done = [last for last, (comes, work) in queue.loading.items() if comes + work < now and last not in promises]
        for last in done:
            del queue.loading[last]
        coming = [Work(max(comes - now, 0.0), work) for comes, work in queue.loading.values()]
        return queue.flow.line(now, waiting, coming=coming)

    def _join(self, queue: _Queue, decision: Decision, keys: Sequence[BlockKey], now: float) -> None:
        """Count what was planned as work for the engine and the tiers, once for a request that asks again."""
        last = keys[-1] if keys else None
        if decision.blocks and decision.chosen is not None:
            if len(queue.loading) == MOST_LOADING:
                del queue.loading[next(iter(queue.loading))]
            comes = now + decision.chosen - decision.computing
            queue.loading[keys[decision.blocks - 1]] = comes, decision.computing
        if last is not None and last == queue.last:
            return
        queue.last = last
        queue.flow.add(now, decision.computing)
        for medium, seconds in decision.loading.items():
            self._loads[medium].add(now, seconds)

    def _speeds(
        self, engine: _Engine | None, keys: Sequence[BlockKey], now: float, queue: _Queue, waiting: int
    ) -> Mapping[Medium, Speed]:
        """Of what was measured. A load from the arena that nobody timed yet is taken to be as fast as usual."""
        pages = engine.pages if engine is not None else SpeedMeter(Medium.HOST, WINDOW)
        speeds = {Medium.HOST: pages.speed()}
        ahead = self._store.promoter.promises.ahead_of(keys, now)
        requests = queue.flow.rate(now)
        for medium, meter in self._store.promoter.meters.items():
            if meter.known:
                speed = meter.speed(ahead[medium], now)
                loads = self._loads[medium]
                share = min(loads.rate(now) / requests, 1.0) if requests else 0.0
                line = loads.line(now, waiting * share, speed.queued_bytes / speed.bandwidth)
                speeds[medium] = replace(speed, line=line)
        return speeds

    def _count(self, decision: Decision) -> None:
        reason = decision.reason.value
        self._planned.labels(reason).inc()
        self._blocks.labels("load", reason).inc(decision.blocks)
        self._blocks.labels("recompute", reason).inc(decision.found - decision.blocks)

    def _follow(
        self,
        told: Decision,
        keys: Sequence[BlockKey],
        runs: Sequence[tuple[Medium, int]],
        block_bytes: int,
    ) -> None:
        """Remember what was promised, fetch what is for later, and note what is left alone."""
        position = 0
        promoter, arena = self._store.promoter, self._store.host.keys()
        for medium, count in runs:
            stop = min(position + count, told.blocks)
            if medium is not Medium.HOST and stop > position:
                patience = min(told.patience.seconds(told.blocks), PROMISED_SECONDS)
                promoter.promises.make(keys[position:stop], medium, block_bytes, time.monotonic() + patience)
            position += count
        promoter.fetch_ahead([key for key in self._for_later(told, keys, runs) if key not in arena])
        if told.blocks < told.found and told.load_all is not None and told.recompute_all is not None:
            estimates = (told.load_all, told.recompute_all)
            self._store.history.record(What.RECOMPUTED, keys[told.blocks : told.found], estimates=estimates)

    def _for_later(
        self, told: Decision, keys: Sequence[BlockKey], runs: Sequence[tuple[Medium, int]]
    ) -> Sequence[BlockKey]:
        """What to fetch for the next request: not what only another region has, since the engine saves that when it has
        computed it."""
        if not told.background:
            return []
        media = [medium for medium, count in runs for _ in range(count)]
        later = range(told.blocks, told.blocks + told.background)
        near = [keys[place] for place in later if media[place] is not Medium.REMOTE]
        if len(near) < len(later) and time.monotonic() - self._remeasured >= REMEASURED_SECONDS:
            self._remeasured = time.monotonic()
            near += [keys[place] for place in later if media[place] is Medium.REMOTE][:REMEASURED_BLOCKS]
        return near
