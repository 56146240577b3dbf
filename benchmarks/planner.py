"""Load or recompute, in simulated time: the planner against always loading and always computing.

The real policy code (``kvstore.policy.planner``, ``prefill``, ``speed``) runs over simulated tiers and engines. Nothing is handed
to it: it starts knowing nothing, and learns from the timings that its own loads and steps take, which are noisy (0.2 in the
log, one transfer in 50 five times slower) and, in the third quarter of every stream, three times slower. The learning is part
of the figures. The two rivals meet the same requests at the same times.

A case is a tier (bandwidth, latency), a model, a place of the prefix (all in the tier, or its first half in the arena), a
prompt length and a load: ``light`` requests come one by one, ``heavy`` ones so that the better of the two rivals is busy 80 %
of the time, queueing for the tier and for the engine. Its ratio is the planner's mean time to first token over that of the
better rival, which is the policy that is better for all streams of the case; ``slowest`` figures are about the slowest request
of each. The planner is better than both in a case whose ratio is below 0.95, and won by splits where it also split half the
requests.

The mean of 40 requests at 80 % load is mostly luck: one slow transfer in a burst, and everybody behind it is late. So a case is
played with several seeds, and its ratio is about the requests of all. What a single stream can meet is reported beside it:
``worst_ratio_one_stream`` and ``within_1.05_one_stream`` are about each stream alone, and ``spread_of_streams`` is the
standard deviation between the ratios of the streams of a case, the mean of all cases.
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
import statistics
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from rich.console import Console

from benchmarks.study import Study
from kvstore.policy.planner import Decision, Patience, Prefetch, Reason, Request, Run, Wait, plan
from kvstore.policy.prefill import PrefillSpeed, attention
from kvstore.policy.queueing import Flow, Work
from kvstore.policy.speed import SpeedMeter
from kvstore.tiers.base import Medium

BLOCK_TOKENS = 64
WINDOW = 16
"""Blocks per acquire, as the connector asks for them."""
STEP_TOKENS = 8192
BANDWIDTHS = (0.1, 0.5, 2, 8, 60)  # GB/s
LATENCIES = (0.0001, 0.003, 0.1)
LENGTHS = (512, 4096, 24_576, 131_072)
HOST_BANDWIDTH, HOST_LATENCY = 50e9, 0.002
FRESH = 0.05
"""Share of a prompt that nobody has stored."""
LEARNING = 12
"""Requests before a stream, one by one, of which the second half are stored: ``worst_ratio_learning`` is about those."""
STREAM_SEEDS = 1000
"""Between the seeds of two streams of a case: there are fewer cases."""
SLOWER = 3.0
"""How much slower the tier is in the third quarter."""


@dataclass(frozen=True)
class Model:
    """Bytes of a block, and seconds of a step: per step, per token, per pair that attention looks at."""

    name: str
    block_bytes: int
    costs: tuple[float, float, float]

    def seconds(self, start: int, tokens: int) -> float:
        """One step after another, as an engine with a token budget does it."""
        return sum(self.step(start + at, min(STEP_TOKENS, tokens - at)) for at in range(0, tokens, STEP_TOKENS))

    def step(self, start: int, tokens: int) -> float:
        per_step, per_token, per_pair = self.costs
        return per_step + per_token * tokens + per_pair * attention(start, tokens)


MODELS = (
    Model("8B", 8 << 20, (0.005, 28e-6, 6e-10)),  # H100: 8k in 0.25 s, 32k in 1.25 s
    Model("70B", 20 << 20, (0.02, 120e-6, 1.2e-9)),  # TP 4
    Model("MLA", int(4.5 * 2**20), (0.02, 90e-6, 2e-9)),  # 671B, TP 8
)


@dataclass(frozen=True)
class Case:
    bandwidth: float
    latency: float
    model: Model
    half_in_arena: bool
    tokens: int
    heavy: bool


@dataclass
class Job:
    number: int
    arrived: float
    tokens: int
    slower: float
    stored: bool = True
    have: int = 0
    """Tokens loaded."""


@dataclass
class Simulation:
    """One stream of requests under one policy."""

    case: Case
    decide: Callable[[Simulation, Job], Decision]
    seed: int
    learns: bool = False
    now: float = 0.0
    waits: list[float] = field(default_factory=list)
    splits: int = 0
    prefill: PrefillSpeed = field(default_factory=PrefillSpeed)
    pages: SpeedMeter = field(default_factory=lambda: SpeedMeter(Medium.HOST, WINDOW))
    engine: Flow = field(default_factory=Flow)
    loads: Flow = field(default_factory=Flow)
    loading: dict[int, tuple[float, float]] = field(default_factory=dict)
    """When requests that load are expected to be loaded, and what they then compute."""
    meter: SpeedMeter = field(default_factory=lambda: SpeedMeter(Medium.DISK, WINDOW))
    slowness: float = 1.0
    """Of the tier, at the last request."""
    promised: int = 0
    """Bytes that planned loads have yet to ask the tier for, or wait for."""

    def __post_init__(self) -> None:
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()
        self._free_at = 0.0
        self._in_flight: deque[tuple[float, int]] = deque()
        self._busy = False
        self.waiting: deque[Job] = deque()
        self._ready: deque[Job] = deque()
        self._background = 0
        self._fetching = False

    @property
    def behind(self) -> int:
        """Requests that wait for the engine; those that are loading do not yet."""
        return len(self.waiting) + len(self._ready)

    def run(self, arrivals: list[Job]) -> list[float]:
        for job in arrivals:
            self.at(job.arrived, lambda job=job: self._arrive(job))  # type: ignore[misc]
        while len(self.waits) < len(arrivals):
            self.now, _, action = heapq.heappop(self._events)
            action()
        return self.waits

    def at(self, when: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._events, (when, next(self._numbers), action))

    def runs(self, job: Job) -> tuple[Run, ...]:
        blocks = int(job.tokens * (1 - FRESH)) // BLOCK_TOKENS if job.stored else 0
        size = self.case.model.block_bytes
        first = blocks // 2 if self.case.half_in_arena else 0
        runs = (Run(Medium.HOST, first, first * size), Run(Medium.DISK, blocks - first, (blocks - first) * size))
        return tuple(run for run in runs if run.blocks)

    # --- the engine: one step at a time; requests ask in their order, when it is free

    def _arrive(self, job: Job) -> None:
        self.waiting.append(job)
        self._pump()

    def _pump(self) -> None:
        while not self._busy:
            if self._ready:
                self._compute(self._ready.popleft())
            elif self.waiting:
                job = self.waiting.popleft()
                decision = self.decide(self, job)
                self.splits += decision.reason is Reason.SPLIT
                self._fetch_ahead(decision.background)
                if decision.blocks:
                    self._load(job, decision)
                else:
                    self._compute(job)
            else:
                return

    def _compute(self, job: Job) -> None:
        self._busy = True
        end = self.now
        start = job.have
        while start < job.tokens:
            count = min(STEP_TOKENS, job.tokens - start)
            noise = random.Random(f"{self.seed}/{job.number}/step/{start // STEP_TOKENS}").lognormvariate(0, 0.03)
            seconds = self.case.model.step(start, count) * noise
            if self.learns:
                self.prefill.observe(count, attention(start, count), seconds)
            end += seconds
            start += count
        self.at(end, lambda: self._answer(job))

    def _answer(self, job: Job) -> None:
        self._busy = False
        self.waits.append(self.now - job.arrived)
        self._pump()

    # --- loads: a window after the other

    def _load(self, job: Job, decision: Decision) -> None:
        left = decision.blocks
        host = 0
        for run in self.runs(job):
            take = min(run.blocks, left)
            left -= take
            host += take if run.medium is Medium.HOST else 0
        nbytes = host * self.case.model.block_bytes
        copied = self.now + HOST_LATENCY + nbytes / HOST_BANDWIDTH
        if host == decision.blocks:
            self.pages.observe(nbytes, copied - self.now)
        self.promised += (decision.blocks - host) * self.case.model.block_bytes
        begun = self.now
        self.at(copied, lambda: self._window(job, decision.patience, begun, host, decision.blocks))

    def _window(self, job: Job, patience: Patience, begun: float, have: int, wanted: int) -> None:
        size = self.case.model.block_bytes
        count = min(WINDOW, wanted - have)
        deadline = begun + patience.seconds(have + count)
        if count == 0 or deadline <= self.now:
            self.promised -= (wanted - have) * size
            self._loaded(job, have)
            return
        asked, ahead = self.now, self.ahead()
        first, arrives = self._transfer(count * size, f"{job.number}/{have}", job.slower)
        self._under_way(ahead, count * size, first, arrives)

        def end() -> None:
            if self.now >= arrives:
                if self.learns:
                    came()
                self.promised -= count * size
                self._window(job, patience, begun, have + count, wanted)
                return
            if self.meter.known:
                self.meter.at_least(ahead + size, self.now - asked)
            else:  # a trial: what was asked for comes all the same
                self.at(arrives, came)
            self.promised -= (wanted - have) * size
            self._loaded(job, have)

        def came() -> None:
            if count > 1:
                self.meter.observe(ahead + size, first - asked)
            self.meter.observe(ahead + count * size, arrives - asked)

        self.at(min(arrives, deadline), end)

    def _loaded(self, job: Job, blocks: int) -> None:
        job.have = blocks * BLOCK_TOKENS
        self.loading.pop(job.number, None)
        self._ready.append(job)
        self._pump()

    # --- the tier: bytes one after the other, behind a latency

    def _transfer(self, nbytes: int, name: str, slower: float) -> tuple[float, float]:
        """When the first block and when all are here. The same transfer meets the same noise under every policy."""
        rng = random.Random(f"{self.seed}/{name}")
        noise = rng.lognormvariate(0, 0.2) * (5 if rng.random() < 0.02 else 1) * slower
        begins = max(self._free_at, self.now + self.case.latency * noise)
        self._free_at = begins + nbytes / (self.case.bandwidth * 1e9) * noise
        self._in_flight.append((self._free_at, nbytes))
        return begins + self.case.model.block_bytes / (self.case.bandwidth * 1e9) * noise, self._free_at

    def _under_way(self, ahead: int, nbytes: int, first: float, arrives: float) -> None:
        """The meter is told of the first and the last block, as a node tells it of each."""
        for coming, when in ((self.case.model.block_bytes, first), (nbytes, arrives)):
            transfer = self.meter.begin(ahead + coming, self.now)
            self.at(when, partial(self.meter.end, transfer))

    def ahead(self) -> int:
        """Bytes that the tier is busy with."""
        while self._in_flight and self._in_flight[0][0] <= self.now:
            self._in_flight.popleft()
        return sum(nbytes for _, nbytes in self._in_flight)

    def _fetch_ahead(self, blocks: int) -> None:
        self._background = min(self._background + blocks, 4096)
        if not self._fetching and self._background:
            self._fetching = True
            self._fetch()

    def _fetch(self) -> None:
        """Four blocks at a time, for nobody."""
        count = min(4, self._background)
        if count == 0:
            self._fetching = False
            return
        self._background -= count
        asked, ahead, nbytes = self.now, self.ahead(), count * self.case.model.block_bytes
        first, arrives = self._transfer(nbytes, f"ahead/{next(self._numbers)}", self.slowness)
        self._under_way(ahead, nbytes, first, arrives)

        def end() -> None:
            self.meter.observe(ahead + self.case.model.block_bytes, first - asked)
            self.meter.observe(ahead + nbytes, self.now - asked)
            self._fetch()

        self.at(arrives, end)


WAIT = Wait(Prefetch.WAIT_COMPLETE)


def load_all(simulation: Simulation, job: Job) -> Decision:
    blocks = sum(run.blocks for run in simulation.runs(job))
    return Decision(blocks, blocks, Reason.OFF)


def recompute_all(simulation: Simulation, job: Job) -> Decision:
    return Decision(sum(run.blocks for run in simulation.runs(job)), 0, Reason.RECOMPUTE)


def planned(simulation: Simulation, job: Job) -> Decision:
    simulation.slowness = job.slower
    engine, loads, now = simulation.engine, simulation.loads, simulation.now
    coming = [Work(max(comes - now, 0.0), seconds) for comes, seconds in simulation.loading.values()]
    line = engine.line(now, simulation.behind, coming=coming)
    request = Request(simulation.runs(job), 0, job.tokens, BLOCK_TOKENS, line)
    speeds = {Medium.HOST: simulation.pages.speed()}
    if simulation.meter.known:
        speed = simulation.meter.speed(simulation.promised, now)
        waiting = simulation.behind * min(loads.rate(now) / max(engine.rate(now), 1e-9), 1.0)
        speeds[Medium.DISK] = replace(speed, line=loads.line(now, waiting, speed.queued_bytes / speed.bandwidth))
    prefill = simulation.prefill.seconds if simulation.prefill.known else None
    decision = plan(request, speeds, prefill, WAIT)
    engine.add(now, decision.computing)
    if seconds := decision.loading.get(Medium.DISK):
        loads.add(now, seconds)
    if decision.blocks and decision.chosen is not None:
        simulation.loading[job.number] = now + decision.chosen - decision.computing, decision.computing
    return decision


def arrivals(case: Case, count: int, seed: int) -> list[Job]:
    rng = random.Random(seed)
    blocks = int(case.tokens * (1 - FRESH)) // BLOCK_TOKENS
    if case.half_in_arena:
        blocks -= blocks // 2
    link = blocks * case.model.block_bytes / (case.bandwidth * 1e9) + math.ceil(blocks / WINDOW) * case.latency
    compute = case.model.seconds(0, case.tokens)
    rest = case.model.seconds(int(case.tokens * (1 - FRESH)), int(case.tokens * FRESH))
    jobs, now = [], 0.0
    for number in range(LEARNING):
        jobs.append(Job(number, now, case.tokens, 1.0, stored=number >= LEARNING // 2))
        now += 2 * (compute + link)
    for number in range(count):
        tokens = int(case.tokens * rng.uniform(0.8, 1.2)) if case.tokens > LENGTHS[0] else case.tokens
        slower = SLOWER if count // 2 <= number < count * 3 // 4 else 1.0
        jobs.append(Job(LEARNING + number, now, tokens, slower))
        best = min(compute, max(link * slower, rest))
        now += rng.expovariate(0.8 / best) if case.heavy else 2 * (compute + link * slower)
    return jobs


@dataclass(frozen=True)
class Outcome:
    """Of a case: the planner over the better rival."""

    ratio: float
    streams: tuple[float, ...]
    """The same of each stream alone."""
    learning: float
    slowest: float
    splits: float
    """Share of the requests."""


def play(case: Case, number: int, streams: int, requests: int) -> Outcome:
    """The case's streams under the planner and its rivals."""
    waits: dict[Callable[[Simulation, Job], Decision], list[list[float]]] = {}
    splits = 0
    for policy in (load_all, recompute_all, planned):
        waits[policy] = []
        for stream in range(streams):
            seed = number + stream * STREAM_SEEDS
            simulation = Simulation(case, policy, seed, learns=policy is planned)
            waits[policy].append(simulation.run(arrivals(case, requests, seed)))
            splits += simulation.splits

    def ratio(of: Callable[[list[list[float]]], float]) -> float:
        return of(waits[planned]) / min(of(waits[load_all]), of(waits[recompute_all]))

    return Outcome(
        ratio=ratio(lambda each: statistics.fmean(wait for stream in each for wait in stream[LEARNING:])),
        streams=tuple(
            ratio(lambda each, at=stream: statistics.fmean(each[at][LEARNING:]))  # type: ignore[misc]
            for stream in range(streams)
        ),
        learning=ratio(
            lambda each: statistics.fmean(wait for stream in each for wait in stream[LEARNING // 2 : LEARNING])
        ),
        slowest=ratio(lambda each: max(wait for stream in each for wait in stream[LEARNING:])),
        splits=splits / (streams * requests),
    )


def arguments(parser: Any) -> None:
    parser.add_argument("--requests", type=int, default=40, help="length of each stream")
    parser.add_argument("--streams", type=int, default=8, help="streams of each case")
    parser.add_argument("--jobs", type=int, default=2, help="processes")


def run(args: Any) -> Mapping[str, float]:
    console = Console(stderr=True)
    cases = [
        Case(*values)
        for values in itertools.product(BANDWIDTHS, LATENCIES, MODELS, (False, True), LENGTHS, (False, True))
    ]
    count = len(cases)
    with ProcessPoolExecutor(args.jobs) as pool:
        played = pool.map(play, cases, range(count), [args.streams] * count, [args.requests] * count, chunksize=8)
        outcomes = dict(zip(cases, played, strict=True))
    for case in sorted(cases, key=lambda case: -outcomes[case].ratio)[:12]:
        each = " ".join(f"{ratio:.2f}" for ratio in outcomes[case].streams)
        console.print(f"{outcomes[case].ratio:.3f} ({each}) {case}", highlight=False)
    ratios = [outcome.ratio for outcome in outcomes.values()]
    single = [ratio for outcome in outcomes.values() for ratio in outcome.streams]
    better = [outcome for outcome in outcomes.values() if outcome.ratio < 0.95]
    return {
        "worst_ratio_to_best": max(ratios),
        "worst_ratio_light": max(outcome.ratio for case, outcome in outcomes.items() if not case.heavy),
        "worst_ratio_heavy": max(outcome.ratio for case, outcome in outcomes.items() if case.heavy),
        "worst_ratio_one_stream": max(single),
        "worst_ratio_learning": max(outcome.learning for outcome in outcomes.values()),
        "worst_ratio_slowest": max(outcome.slowest for outcome in outcomes.values()),
        "median_ratio_slowest": statistics.median(outcome.slowest for outcome in outcomes.values()),
        "median_ratio": statistics.median(ratios),
        "spread_of_streams": statistics.fmean(statistics.pstdev(outcome.streams) for outcome in outcomes.values()),
        "within_1.05": statistics.fmean(ratio <= 1.05 for ratio in ratios),
        "within_1.05_one_stream": statistics.fmean(ratio <= 1.05 for ratio in single),
        "splits_won": float(sum(outcome.splits >= 0.5 for outcome in better)),
        "better_than_both": float(len(better)),
        "cases": float(count),
        "streams": float(args.streams),
    }


STUDY = Study(
    name="planner",
    summary="Time to first token of the planner over the better of loading all and computing all, simulated tiers",
    run=run,
    targets={"worst_ratio_to_best": "<=1.05", "splits_won": ">=1"},
    arguments=arguments,
)
