"""Load or recompute: how much of a stored prefix an engine should load, by what loading and computing are measured to take.

An engine loads the beginning of a prompt and then computes the rest, one after the other: the first token comes after
``load(k blocks) + prefill(the tokens behind them)``. Within a run of blocks of one tier the first term grows evenly, and the
second falls ever faster (attention makes late tokens dearer), so the sum is least at an end of a run: those are all the
candidates there are. Taking a run and leaving the next is a split, which beats both loading and computing everything.

Estimates are wrong at times, so a load has ``Patience``: each block has to be there by the time in which computing would have
brought it, or the engine computes from there on. However slow a tier turns out, the first token is late by no more than the
grace, what the first byte was expected to take, and the window of blocks that was awaited last.

Pure functions; the measuring is in ``kvstore.policy.speed`` and ``kvstore.policy.prefill``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum

from kvstore.tiers.base import Medium

GRACE = 0.05
"""Share of the time of computing everything that a load may be late, before its beginning counts as failed."""

SACRIFICE = 2.0
"""A request may take so many times as long as computing it, to leave the engine to those behind it."""

TRIAL = 0.25
"""The same for the first load from a tier, of which nothing is known."""

LEAST_PATIENCE = 0.01
"""Seconds. Threads and engine steps are late by so much without a tier being slow."""

BACKGROUND_SECONDS = 10.0
"""What an engine does not wait for is fetched for the next request if the tier can bring it in so long."""

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
    window: int = 16
    """Blocks asked for together."""
    queued_bytes: int = 0
    """What the tier has to bring to others first."""

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
    waiting: float = 0.0
    """Requests of this engine that wait to be computed, or that will come while it is computed: they wait for it too."""

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
    if not request.found:
        return Decision(0, 0, Reason.NOT_STORED)
    if prefill is None:
        return load_everything(request, wait, Reason.UNMEASURED)

    def first_token(blocks: int, load: float) -> float:
        """Seconds that this request and those behind it wait for it."""
        return load + rest(blocks) * (1 + request.waiting)

    def rest(blocks: int) -> float:
        have = min(request.start + blocks * request.block_tokens, request.tokens - 1)
        return prefill(have, request.tokens - have)

    recompute_all = rest(0)
    if any(run.medium not in speeds for run in request.runs):
        unknown = load_everything(request, wait, Reason.UNMEASURED)
        saved = (recompute_all - rest(unknown.blocks)) / max(unknown.blocks, 1)
        first = max(TRIAL * recompute_all, LEAST_PATIENCE)
        return replace(unknown, patience=Patience(first, saved, unknown.patience.limit))
    candidates = [(0, 0.0)]
    reason = Reason.RECOMPUTE
    best = 0
    for blocks, load in _ends(request.runs, speeds):
        candidates.append((blocks, load))
    for number, (blocks, load) in enumerate(candidates[1:], 1):
        alone = load + rest(blocks)
        if alone > SACRIFICE * recompute_all or first_token(blocks, load) > first_token(*candidates[best]):
            continue
        if wait.mode is Prefetch.BEST_EFFORT and blocks > _in_arena(request):
            reason = Reason.NOT_IN_ARENA
            break
        if load > wait.seconds(blocks * request.block_tokens):
            reason = Reason.TOO_LATE
            break
        best = number
    blocks, load = candidates[best]
    if blocks == request.found:
        reason = Reason.LOAD
    elif reason is Reason.RECOMPUTE and blocks:
        reason = Reason.SPLIT
    return Decision(
        found=request.found,
        blocks=blocks,
        reason=reason,
        load_all=candidates[-1][1] + rest(request.found),
        recompute_all=recompute_all,
        chosen=load + rest(blocks),
        patience=_patience(request, blocks, speeds, recompute_all, recompute_all - rest(blocks), wait),
        background=_background(request.runs, blocks, speeds),
    )


def _ends(runs: Sequence[Run], speeds: Mapping[Medium, Speed]) -> list[tuple[int, float]]:
    """For each run the blocks up to its end, and the seconds until they are in the engine's pages."""
    pages = speeds.get(Medium.HOST)
    ends = []
    blocks, seconds = 0, pages.latency if pages else 0.0
    for run in runs:
        copy = run.nbytes / pages.bandwidth if pages else 0.0
        seconds += copy if run.medium is Medium.HOST else max(speeds[run.medium].seconds(run), copy)
        blocks += run.blocks
        ends.append((blocks, seconds))
    return ends


def _patience(
    request: Request, blocks: int, speeds: Mapping[Medium, Speed], recompute_all: float, saved: float, wait: Wait
) -> Patience:
    """Blocks may take what computing them would, and the time in which the first byte is expected, and the grace."""
    if not blocks:
        return Patience(0.0, limit=0.0)
    media = {run.medium for run in request.runs}
    start = sum(speeds[medium].start() for medium in media)
    per_block = saved * (1 + request.waiting) / blocks
    return Patience(
        start + max(GRACE * recompute_all, LEAST_PATIENCE), per_block, wait.seconds(blocks * request.block_tokens)
    )


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
