"""Load or recompute: how much of a stored prefix an engine should load, by what loading and computing are measured to take.

An engine loads the beginning of a prompt and then computes the rest, one after the other: the first token comes after
``load(k blocks) + prefill(the tokens behind them)``. Within a run of blocks of one tier the first term grows evenly, and the
second falls ever faster (attention makes late tokens dearer), so the sum is least at an end of a run: those are all the
candidates there are. Taking a run and leaving the next is a split, which beats both loading and computing everything.

Who computes keeps others from computing, and who loads keeps others from loading, so each candidate also pays for what it costs
those who wait for the engine and for the tiers, now or soon (``kvstore.policy.queueing``). A busy engine so loads what a
lone request had better computed, and where a tier is what is short some are computed.

Estimates are wrong at times, so a load has ``Patience``: each block has to be there by the time in which computing would have
brought it, or the engine computes from there on. However slow a tier turns out, the first token is late by no more than the
grace, what the first byte was expected to take, and the window of blocks that was awaited last. Of a tier that nobody measured
yet a load is a trial, that may cost ``TRIAL`` of computing everything: when it takes longer its end is still noted.

Pure functions; the measuring is in ``kvstore.policy.speed`` and ``kvstore.policy.prefill``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum

from kvstore.policy.queueing import EMPTY, Line, Work
from kvstore.tiers.base import Medium

GRACE = 0.05
"""Share of the time of computing everything that a load may be late, before its beginning counts as failed."""

TRIAL = 0.05
"""The same for a load from a tier of which nothing is known: giving it up costs an engine a step or two besides."""

LEAST_PATIENCE = 0.01
"""Seconds. Threads and engine steps are late by so much without a tier being slow."""

BACKGROUND_SECONDS = 10.0
"""What an engine does not wait for is fetched for the next request if the tier can bring it in so long."""

WINDOW = 16
"""Blocks that an engine asks for at a time (``connectors.vllm.worker.LOAD_CHUNK``): each window pays a tier's latency."""

Prefill = Callable[[int, int], float]
"""Seconds to compute so many tokens (second) behind so many (first)."""


class Reason(Enum):
    """What decided."""

    NOT_STORED = "not_stored"
    OFF = "off"
    """The planner is switched off: whatever is stored is loaded."""
    UNMEASURED = "unmeasured"
    """Speeds are not known yet: whatever is stored is loaded."""
    LOAD = "load"
    """Loading all of it is fastest."""
    SPLIT = "split"
    """Loading the beginning and computing the rest is faster than either alone."""
    RECOMPUTE = "recompute"
    """Computing is faster than loading anything."""
    NOT_IN_ARENA = "not_in_arena"
    """``best_effort`` waits for no tier: blocks beyond the arena are left for next time."""
    TOO_LATE = "too_late"
    """The time that ``timeout`` grants a load is too short for more."""


class Prefetch(Enum):
    """How long a load may be awaited; SGLang's names, with their meaning."""

    BEST_EFFORT = "best_effort"
    """Not at all: what is in the arena when the prefill could start is used."""
    WAIT_COMPLETE = "wait_complete"
    """Until it is complete."""
    TIMEOUT = "timeout"
    """A base, and so much more for each 1,024 tokens."""


@dataclass(frozen=True, slots=True)
class Wait:
    """The prefetch mode with its numbers, whose defaults are SGLang's."""

    mode: Prefetch = Prefetch.TIMEOUT
    base: float = 1.0
    per_ki_token: float = 0.25

    def seconds(self, tokens: int) -> float:
        """How long a load of so many tokens may take."""
        if self.mode is Prefetch.TIMEOUT:
            return self.base + self.per_ki_token * tokens / 1024
        return float("inf")


@dataclass(frozen=True, slots=True)
class Run:
    """Consecutive blocks in one tier."""

    medium: Medium
    blocks: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Speed:
    """What a tier, or the way from the arena to the engine's pages, was measured to do."""

    latency: float
    """Seconds before the first byte, for each window of blocks that are asked for together."""
    bandwidth: float
    """Bytes per second, all loads together."""
    window: int = WINDOW
    """Blocks asked for together."""
    queued_bytes: int = 0
    """What the tier has to bring to others first."""
    line: Line = EMPTY
    """Loads that wait for this tier."""

    def start(self) -> float:
        """Seconds until the first byte, behind what others wait for."""
        return self.latency + self.queued_bytes / self.bandwidth

    def seconds(self, run: Run) -> float:
        """Seconds for a run, behind what others wait for."""
        windows = -(-run.blocks // self.window)
        return windows * self.latency + (self.queued_bytes + run.nbytes) / self.bandwidth


@dataclass(frozen=True, slots=True)
class Patience:
    """How long a load may take: block ``n`` (from 1) has to be there ``first + n * per_block`` seconds after the start."""

    first: float
    per_block: float = 0.0
    limit: float = float("inf")
    """Seconds for all of it."""

    def seconds(self, blocks: int) -> float:
        """By when so many blocks have to be there."""
        return min(self.first + blocks * self.per_block, self.limit)


ENDLESS = Patience(float("inf"))


@dataclass(frozen=True, slots=True)
class Request:
    """What is to be decided about."""

    runs: tuple[Run, ...]
    """The stored prefix beyond what the engine has."""
    start: int
    """Tokens that the engine has already."""
    tokens: int
    """Tokens of the prompt, ``start`` included."""
    block_tokens: int
    line: Line = EMPTY
    """Requests that wait for this engine."""

    @property
    def found(self) -> int:
        return sum(run.blocks for run in self.runs)


@dataclass(frozen=True, slots=True)
class Decision:
    """How many blocks to load, why, and the estimates behind it."""

    found: int
    """Blocks of the stored prefix."""
    blocks: int
    """Blocks to load, from the beginning of the prefix."""
    reason: Reason
    load_all: float | None = None
    """Estimated seconds to the first token when everything found is loaded; None where speeds are not known."""
    recompute_all: float | None = None
    """... when nothing is loaded."""
    chosen: float | None = None
    """... when ``blocks`` are."""
    patience: Patience = ENDLESS
    background: int = 0
    """Blocks behind ``blocks`` to fetch into the arena for next time."""
    computing: float = 0.0
    """Estimated seconds of the engine: what others wait for. 0 where speeds are not known."""
    loading: Mapping[Medium, float] = field(default_factory=dict)
    """Estimated seconds of each slower tier."""


def load_everything(request: Request, wait: Wait, reason: Reason) -> Decision:
    """What is done without a planner, and before anything is known."""
    blocks = request.found
    if blocks == 0:
        return Decision(0, 0, Reason.NOT_STORED)
    if wait.mode is Prefetch.BEST_EFFORT:
        blocks = _in_arena(request)
        reason = reason if blocks == request.found else Reason.NOT_IN_ARENA
    limit = wait.seconds(blocks * request.block_tokens)
    return Decision(request.found, blocks, reason, patience=Patience(limit), background=request.found - blocks)


def plan(request: Request, speeds: Mapping[Medium, Speed], prefill: Prefill | None, wait: Wait) -> Decision:
    """Decide. ``speeds[HOST]`` is the way from the arena to the engine's pages.

    A medium that is missing in ``speeds`` was not measured; then, and while ``prefill`` is None, all that is found is loaded.
    """
    if prefill is None:
        return load_everything(request, wait, Reason.UNMEASURED)

    def rest(blocks: int) -> float:
        have = min(request.start + blocks * request.block_tokens, request.tokens - 1)
        return prefill(have, request.tokens - have)

    def cost(candidate: _Candidate) -> float:
        """Seconds of this request and of those that wait for it."""
        others = sum(
            speeds[medium].line.cost(Work(0.0, seconds)) - seconds for medium, seconds in candidate.loading.items()
        )
        return others + request.line.cost(Work(candidate.seconds, rest(candidate.blocks)))

    recompute_all = rest(0)
    if not request.found:
        return Decision(0, 0, Reason.NOT_STORED, computing=recompute_all)
    if any(run.medium not in speeds for run in request.runs):
        unknown = load_everything(request, wait, Reason.UNMEASURED)
        computing = rest(unknown.blocks)
        patience = _trial(request, unknown.blocks, recompute_all, recompute_all - computing, wait)
        return replace(unknown, patience=patience, computing=computing)
    candidates = [_Candidate(0, 0.0, {}), *_ends(request.runs, speeds)]
    reason = Reason.RECOMPUTE
    best = candidates[0]
    alone = least = cost(best)
    for candidate in candidates[1:]:
        together = cost(candidate)
        if together > least:
            continue
        if wait.mode is Prefetch.BEST_EFFORT and candidate.blocks > _in_arena(request):
            reason = Reason.NOT_IN_ARENA
            break
        if candidate.seconds > wait.seconds(candidate.blocks * request.block_tokens):
            reason = Reason.TOO_LATE
            break
        best, least = candidate, together
    blocks = best.blocks
    if blocks == request.found:
        reason = Reason.LOAD
    elif reason is Reason.RECOMPUTE and blocks:
        reason = Reason.SPLIT
    return Decision(
        found=request.found,
        blocks=blocks,
        reason=reason,
        load_all=candidates[-1].seconds + rest(request.found),
        recompute_all=recompute_all,
        chosen=best.seconds + rest(blocks),
        patience=_patience(request, blocks, speeds, recompute_all, alone - least + best.seconds, wait),
        background=_background(request.runs, blocks, speeds),
        computing=rest(blocks),
        loading=best.loading,
    )


@dataclass(frozen=True, slots=True)
class _Candidate:
    blocks: int
    seconds: float
    """Until they are in the engine's pages."""
    loading: Mapping[Medium, float]
    """Seconds that each slower tier is busy with them."""


def _ends(runs: Sequence[Run], speeds: Mapping[Medium, Speed]) -> list[_Candidate]:
    """For each run the blocks up to its end."""
    pages = speeds.get(Medium.HOST)
    ends = []
    blocks, seconds = 0, pages.latency if pages else 0.0
    loading: dict[Medium, float] = {}
    for run in runs:
        copy = run.nbytes / pages.bandwidth if pages else 0.0
        if run.medium is Medium.HOST:
            seconds += copy
        else:
            tier = speeds[run.medium]
            seconds += max(tier.seconds(run), copy)
            loading = {**loading, run.medium: loading.get(run.medium, 0.0) + run.nbytes / tier.bandwidth}
        blocks += run.blocks
        ends.append(_Candidate(blocks, seconds, loading))
    return ends


def _patience(
    request: Request, blocks: int, speeds: Mapping[Medium, Speed], recompute_all: float, saved: float, wait: Wait
) -> Patience:
    """Blocks may take what computing them would, and the time in which the first byte is expected, and the grace."""
    if not blocks:
        return Patience(0.0, limit=0.0)
    media = {run.medium for run in request.runs}
    start = sum(speeds[medium].start() for medium in media)
    grace = max(GRACE * recompute_all, LEAST_PATIENCE)
    return Patience(start + grace, saved / blocks, wait.seconds(blocks * request.block_tokens))


def _trial(request: Request, blocks: int, recompute_all: float, saved: float, wait: Wait) -> Patience:
    """The first window may take the trial's share, each block behind it what computing it would."""
    per_block = saved / max(blocks, 1)
    awaited = min(blocks, WINDOW)
    first = max(TRIAL * recompute_all, LEAST_PATIENCE) - awaited * per_block
    return Patience(first, per_block, wait.seconds(blocks * request.block_tokens))


def _background(runs: Sequence[Run], skipped: int, speeds: Mapping[Medium, Speed]) -> int:
    """How many blocks behind the first ``skipped`` the tiers can bring in ``BACKGROUND_SECONDS``."""
    blocks, left = 0, BACKGROUND_SECONDS
    for run in runs:
        mine = max(run.blocks - skipped, 0)
        skipped = max(skipped - run.blocks, 0)
        if mine and run.medium is not Medium.HOST:
            speed = speeds[run.medium]
            left -= speed.start()
            fits = int(left * speed.bandwidth * run.blocks / run.nbytes) if left > 0 else 0
            left -= mine * run.nbytes / run.blocks / speed.bandwidth
            mine, whole = min(mine, fits), fits >= mine
            blocks += mine
            if not whole:
                break
        else:
            blocks += mine
    return blocks


def _in_arena(request: Request) -> int:
    first = request.runs[0] if request.runs else None
    return first.blocks if first is not None and first.medium is Medium.HOST else 0
