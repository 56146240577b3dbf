"""Eviction by learnt reuse: keep what is most likely to be used soon, as this node's own traffic shows.

Every request tells what followed from earlier ones. A block's kind is what was known when it was last used:

* how often it was used before (a system prompt, a conversation, or nothing yet),
* how many blocks of the request nobody had sent before: a conversation adds a few to a known chain, a one-off prompt or a
  long document brings many,
* whether it was the last block of the prompt, which the next turn seldom repeats,
* how long the answer was, where the engine says so.

``Traffic`` watches requests and learns how soon blocks of each kind return (``kvstore.policy.hazard``), whether or not any
tier kept them. ``Reuse`` ranks a tier's blocks by it. Nothing is tuned to a workload, and what was learnt long ago fades.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import msgpack
import numpy as np
import numpy.typing as npt
import structlog

from kvstore.identity import BlockKey
from kvstore.index import BlockIndex, Rows
from kvstore.policy.eviction import EvictionPolicy, Values
from kvstore.policy.hazard import BINS, Floats, Hazards, chance, fit, hopeful, interpolate, log_likelihood, worth
from kvstore.policy.sightings import WAYS, Sightings, words_of

log = structlog.get_logger(__name__)

Kinds = npt.NDArray[np.intp]

USES = 4  # 0, 1, 2, 3 or more
FRESH = 13  # 0, 1, 2-3, 4-7, ... 1024-2047, more
ANSWER = 7  # unknown, then 0-1, 2-7, 8-31, 32-127, 128-511 tokens, more
_SHAPE = (USES, FRESH + 1, 2, ANSWER)
_UNKNOWN_FRESH = FRESH

WATCHED = 1 << 18
"""Entries of the table whose fate is learnt from, at most; an estimate from so many takes some 30 ms."""

REFIT_EVERY = 256
"""Requests between two estimates, at most."""

SHRINK_PROMPTS = 5
"""An estimate counts from about so many prompts on."""

MEMORY = 1 << 20
"""Uses after which what was learnt is halved, so that it follows a change of traffic."""


_VERSION = 1
_MAX_PACKED = 1 << 30


FADE = 0.9
"""What a comparison of views counts after the next one."""

_TRAITS = [levels.ravel() for levels in np.indices(_SHAPE)]
_WITHOUT_ANSWER = [levels.ravel() for levels in np.indices(_SHAPE[:-1])]


def kind_of(uses: npt.NDArray[np.integer], fresh: int, last: npt.NDArray[np.bool_], answer: int) -> Kinds:
    """Kind of blocks used in one request, of which ``fresh`` blocks were new."""
    many = np.minimum(uses.astype(np.intp), USES - 1)
    level = min(fresh.bit_length(), FRESH - 1) if fresh >= 0 else _UNKNOWN_FRESH
    return ((many * (FRESH + 1) + level) * 2 + last) * ANSWER + answer


def answer_level(tokens: int | None) -> int:
    return 0 if tokens is None else min(1 + max(tokens, 1).bit_length() // 2, ANSWER - 1)


def _known_or_not(rates: Floats, risk: Floats) -> Floats:
    """Rates in which the level "unknown" of a trait stands for the mean of all its levels."""
    rate, weight = rates.reshape(*_SHAPE, BINS).copy(), risk.reshape(*_SHAPE, BINS) + 1e-6
    for axis, unknown in ((1, _UNKNOWN_FRESH), (3, 0)):
        total = weight.sum(axis)
        mean = (rate * weight).sum(axis) / total
        np.moveaxis(rate, axis, 0)[unknown] = mean
        np.moveaxis(weight, axis, 0)[unknown] = total
    return rate.reshape(rates.shape)


class Foresight:
    """Rates of use by two views, with and without the length of answers: the one that foresaw better so far is believed.

    A trait that says nothing of this traffic does harm: each of its levels is learnt from fewer prompts. Whether it says
    something is seen by judging each view on what came after it was formed (prequential: A. P. Dawid, 1984).
    """

    def __init__(self) -> None:
        self.ahead = 0.0
        """Log-likelihood by which the view with answers leads; what was long ago counts less."""
        self._views: tuple[Floats, Floats] | None = None
        self._uses = self._risk = np.zeros(0)

    def learn(self, uses: Floats, risk: Floats, shrink: float) -> Floats:
        """Judge the last views by what came since, form new ones; the rates to believe.

        A lead within ``shrink``, some prompts' blocks, says nothing: blocks of one prompt come and go together.
        """
        if self._views is not None:
            came = uses - self._uses, risk - self._risk
            with_answers, without = (log_likelihood(view, *came) for view in self._views)
            self.ahead = FADE * self.ahead + with_answers - without
        self._uses, self._risk = uses.copy(), risk
        fewer_uses, fewer_risk = (column.reshape(-1, ANSWER, BINS).sum(1) for column in (uses, risk))
        without_answer = fit(fewer_uses, fewer_risk, _WITHOUT_ANSWER, shrink)
        self._views = fit(uses, risk, _TRAITS, shrink), without_answer.repeat(ANSWER, axis=0)
        return _known_or_not(self._views[0] if self.ahead >= -shrink else self._views[1], risk)

    def forget(self) -> None:
        """The counts were changed: the next ones do not go on from the last."""
        self._views = None


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a block's kind and age say of its future; both of shape (kinds, BINS)."""

    worth: Floats
    hopeful: Floats


class Traffic:
    """What this node's requests teach about reuse. One per node, shared by its tiers; not thread-safe.

    Who asks it for values pays for an estimate that is ``due``, unless its owner takes ``estimation`` to another thread.

    Bounded: ``entries`` of 21 bytes, and the tables of the estimate (some MB). ``entries`` should be some times the
    number of blocks that the tiers hold, so that a use is recognised after the block was evicted.
    """

    def __init__(self, entries: int = 1 << 18) -> None:
        self._table = Sightings(entries)
        watched = min(self._table.buckets, max(1, WATCHED // WAYS))
        self._watched = watched * WAYS
        self._hazards = Hazards(int(np.prod(_SHAPE)), weight=self._table.buckets / watched)
        self._foresight = Foresight()
        nothing = np.zeros((self._hazards.kinds, BINS))
        rates = fit(nothing, nothing, _TRAITS, 1.0)
        self._estimate = Estimate(worth(rates), rates)
        self._estimating = False
        self.returned = 0
        """Blocks of requests that had been asked for before, with every block before them; since the start."""
        self._requests = self._blocks = self._fitted = 0
        self._now = -np.inf

    def observe(self, keys: Sequence[BlockKey], now: float) -> None:
        """A request asks for this chain, from its head. Call once per request, before anything is evicted for it.

        ``now``: seconds, of a clock that does not go back; the one by which the tiers' indices count.
        """
        if not keys:
            return
        self._now = now = max(now, self._now)
        self._blocks += len(keys)
        self._requests += 1
        words = words_of(b"".join(keys))
        slots = self._table.find(words)
        known = slots >= 0
        prefix = int(np.argmin(known)) if not known.all() else len(keys)
        self.returned += prefix
        old = slots[known]
        watched = old[old < self._watched]
        self._hazards.end(self._table.kind[watched], now - self._table.seen[watched], used=True)
        self._table.seen[old] = now  # before anything is displaced
        if not known.all():
            slots[~known], displaced = self._table.insert(words[~known], now)
            gone = displaced.slots < self._watched
            self._hazards.end(displaced.kind[gone], now - displaced.seen[gone], used=False)
        last = np.zeros(len(keys), dtype=bool)
        last[-1] = True
        uses = self._table.count[slots]
        self._table.kind[slots] = kind_of(uses, len(keys) - prefix, last, 0)
        self._table.seen[slots] = now
        self._table.count[slots] = np.minimum(uses, 254) + 1

    def answered(self, keys: Sequence[BlockKey], output_tokens: int) -> None:
        """The request of this chain is finished. Optional; without it the length of answers is not used."""
        slots = self._table.find(words_of(b"".join(keys)))
        slots = slots[slots >= 0]
        kind = self._table.kind[slots]
        self._table.kind[slots] = kind - kind % ANSWER + answer_level(output_tokens)

    def values(self, keys: bytes, uses: npt.NDArray[np.integer], age: Values) -> Values:
        """Expected uses per second of storage of blocks (their joined keys) last used ``age`` seconds ago.

        ``uses`` stands in for what is not known of blocks that were last seen before a restart, or too long ago.
        """
        self._learn()
        slots = self._table.find(words_of(keys))
        unseen = kind_of(uses, -1, np.zeros(len(slots), dtype=bool), 0)
        kind = np.where(slots >= 0, self._table.kind[slots], unseen)
        return interpolate(self._estimate.worth, kind, age)

    def chance(self, keys: Sequence[BlockKey], now: float, horizon: float) -> Values:
        """How likely each block of a chain is used again within ``horizon`` seconds.

        Never less than that of a block further down the chain. A block that was never observed counts as certain.
        """
        self._learn()
        slots = self._table.find(words_of(b"".join(keys)))
        age = np.where(slots >= 0, now - self._table.seen[slots], 0.0)
        own = np.where(
            slots >= 0, chance(self._estimate.hopeful, self._table.kind[slots], np.maximum(age, 0.0), horizon), 1.0
        )
        return np.maximum.accumulate(own[::-1])[::-1]

    def sightings(self, keys: Sequence[BlockKey]) -> npt.NDArray[np.intp]:
        """How often each block was asked for, up to 255, as far as this remembers."""
        slots = self._table.find(words_of(b"".join(keys)))
        return np.where(slots >= 0, self._table.count[slots], 0).astype(np.intp)

    def pack(self) -> bytes:
        """All of it, for a file: 21 bytes an entry and under 1 MB. May be called in another thread than ``observe``: what a
        request is about to change is then kept in part, which no estimate notices."""
        counters: list[Any] = [self._requests, self._blocks, self._now if self._requests else None]
        packed: bytes = msgpack.packb([_VERSION, *counters, self._table.pack(), self._hazards.pack()])
        return packed

    @classmethod
    def unpack(cls, data: bytes, now: float) -> Traffic:
        """What ``pack`` made. Raises ValueError for bytes that it cannot have made.

        ``now``: seconds, of the same clock; uses that would lie ahead of it count as of now.
        """
        if len(data) > _MAX_PACKED:
            raise ValueError("too much for traffic")
        try:
            version, requests, blocks, last, seen, learnt = msgpack.unpackb(data)
            if version != _VERSION or not 0 <= requests <= blocks < 1 << 62:
                raise ValueError("not traffic of this version")
            table = Sightings.unpack(seen, now)
            traffic = cls(table.buckets * WAYS)
            if table.kind.max(initial=0) >= traffic._hazards.kinds:
                raise ValueError("traffic of unknown kinds")
            traffic._hazards.load(learnt)
            traffic._now = -np.inf if last is None else min(float(last), now)
        except (TypeError, msgpack.UnpackException) as error:
            raise ValueError("not traffic") from error
        traffic._table = table
        traffic._requests, traffic._blocks = requests, blocks
        return traffic

    @property
    def due(self) -> bool:
        """Whether enough was asked since the last estimate for another one, and none is being made."""
        often = self._requests >= min(self._fitted + REFIT_EVERY, 16 + self._fitted * 5 // 4)
        return often and not self._estimating

    def estimation(self) -> Callable[[], Estimate]:
        """When one is ``due``: the work of making it, for any thread. Give what it returns to ``adopt``.

        If it fails, it logs why and returns the last estimate.
        """
        self._estimating, self._fitted = True, self._requests
        watched = np.flatnonzero(np.isfinite(self._table.seen[: self._watched]))
        kind, age = self._table.kind[watched], self._now - self._table.seen[watched]
        hazards, shrink = self._hazards.copy(), SHRINK_PROMPTS * self._blocks / self._requests

        def work() -> Estimate:
            try:
                uses, risk = hazards.data(kind, age)
                rates = self._foresight.learn(uses, risk, shrink)
                return Estimate(worth(rates), hopeful(rates, risk, shrink))
            except Exception as error:  # a defect, or no memory: ranking goes on by what was learnt before
                log.error("reuse not estimated", exc_info=error)
                return self._estimate

        return work

    def adopt(self, estimate: Estimate) -> None:
        """Go by what ``estimation`` found."""
        self._estimating, self._estimate = False, estimate
        if self._hazards.used.sum() > MEMORY:
            self._hazards.fade(0.5)
            self._foresight.forget()

    def _learn(self) -> None:
        if self.due:
            self.adopt(self.estimation()())


class Reuse(EvictionPolicy):
    """Blocks that are expected back soonest, for the time they are held, are worth most."""

    name = "reuse"

    def __init__(self, traffic: Traffic) -> None:
        self._traffic = traffic

    def values(self, index: BlockIndex, rows: Rows, now: float) -> Values:
        return self._traffic.values(index.key_bytes(rows), index.hits[rows], now - index.accessed[rows])
