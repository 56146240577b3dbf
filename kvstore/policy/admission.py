"""Which blocks a tier takes: host everything, disk what may come back, object storage what came back, another region what is hot.

``judge`` is the whole rule, a pure function. ``AdmissionPolicy`` asks it with what a node knows: ``Traffic`` remembers blocks
whether or not any tier holds them, so a block that was refused and is asked for again is recognised. Where the policy runs
in ``observe`` it counts what it would refuse and refuses nothing.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import numpy as np
import numpy.typing as npt

from kvstore.identity import BlockKey
from kvstore.policy.pins import Pins
from kvstore.policy.reuse import Traffic


class Target(Enum):
    """Where a block may go. The first three have the values of ``kvstore.tiers.base.Medium``."""

    HOST = "host"
    DISK = "disk"
    OBJECT = "object"
    WAN = "wan"
    """Another region."""


class Mode(Enum):
    OFF = "off"
    OBSERVE = "observe"
    ENFORCE = "enforce"


class Reason(Enum):
    """The rule that decided."""

    POLICY_OFF = "policy_off"
    ALWAYS = "always"
    """The host tier takes every block."""
    PINNED = "pinned"
    SEEN_AGAIN = "seen_again"
    LIKELY = "likely"
    """Seen once, and blocks like it come back."""
    HOT = "hot"
    UNLIKELY = "unlikely"
    """Seen once, and blocks like it seldom come back."""
    UNDER_PRESSURE = "under_pressure"
    """Seen once, while the tier's write queue is filling."""
    SEEN_ONCE = "seen_once"
    COLD = "cold"


_BINS_PER_OCTAVE = 8
_BINS = 16 * _BINS_PER_OCTAVE
"""Of chances, down to one in 65,536."""
_MORE_LIKELY_THAN_NOT = 0.5
"""A block that is this likely to return is never given up, however few hits that would cost: a disk must not look dead."""
_REMEMBERED_HITS = 1 << 20
"""After which what was counted is halved, so that it follows a change of traffic."""

ADMITTED = frozenset({Reason.POLICY_OFF, Reason.ALWAYS, Reason.PINNED, Reason.SEEN_AGAIN, Reason.LIKELY, Reason.HOT})


@dataclass(frozen=True, slots=True)
class Thresholds:
    """All the numbers of admission. High ones make a tier look dead; raise them only on evidence from ``observe``."""

    disk_loss: float = 0.05
    """Of blocks seen once, the least likely to be used again do not go to disk, as many as would bring this share of all hits.
    Best asked when the host tier gives a block up: most blocks that return have returned by then, and are written for that."""
    horizon: float = 3600.0
    """Seconds within which a use counts; less where the tier keeps blocks for less."""
    disk_pressure: float = 0.5
    """Fill of the disk's write queue (0 to 1) from which only blocks seen again go to disk."""
    object_sightings: int = 2
    wan_hits: float = 3.0
    """Decayed hits from which a chain goes to other regions; budgets there cut further, by score."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """What is known of a block that a tier is offered."""

    sightings: int = 1
    """Requests that asked for it, this one included."""
    chance: float = 1.0
    """Of being used again within the horizon."""
    least_chance: float = 0.0
    """From which a block seen once is worth a write."""
    hits: float = 0.0
    """Decayed, see ``kvstore.policy.hotness``."""
    pinned: bool = False


@dataclass(frozen=True, slots=True)
class Decision:
    """``admit`` is what to do; ``reason`` is what the rule said, also where the mode overrules it."""

    admit: bool
    reason: Reason


def judge(target: Target, candidate: Candidate, pressure: float, thresholds: Thresholds) -> Reason:
    """The rule. ``pressure``: fill of the tier's write queue, 0 to 1."""
    if target is Target.HOST:
        return Reason.ALWAYS
    if candidate.pinned:
        return Reason.PINNED
    if target is Target.WAN:
        return Reason.HOT if candidate.hits >= thresholds.wan_hits else Reason.COLD
    if target is Target.OBJECT:
        return Reason.SEEN_AGAIN if candidate.sightings >= thresholds.object_sightings else Reason.SEEN_ONCE
    if candidate.sightings >= 2:
        return Reason.SEEN_AGAIN
    if pressure >= thresholds.disk_pressure:
        return Reason.UNDER_PRESSURE
    return Reason.LIKELY if candidate.chance >= candidate.least_chance else Reason.UNLIKELY


class LossBudget:
    """The chance of return below which blocks may be given up, so that a share of all hits is lost and no more.

    Counts expected returns of what was offered, by chance, beside the hits there were. Not thread-safe.
    """

    def __init__(self, share: float) -> None:
        self._share = share
        self._expected = np.zeros(_BINS)
        self._hits = 0.0
        self._returned = 0

    def offered(self, chances: npt.NDArray[np.float64], returned: int) -> None:
        """Blocks seen once were offered and are this likely to return. ``returned``: hits since the start."""
        np.add.at(self._expected, self._bin(chances), chances)
        self._hits += returned - self._returned
        self._returned = returned
        if self._hits > _REMEMBERED_HITS:
            self._hits *= 0.5
            self._expected *= 0.5

    @property
    def least_chance(self) -> float:
        given_up = int(np.searchsorted(np.cumsum(self._expected), self._share * self._hits, side="right"))
        least = 2.0 ** ((given_up - _BINS) / _BINS_PER_OCTAVE) if given_up else 0.0
        return float(min(least, _MORE_LIKELY_THAN_NOT))

    @staticmethod
    def _bin(chances: npt.NDArray[np.float64]) -> npt.NDArray[np.intp]:
        octaves = np.log2(np.maximum(chances, 2.0**-32))
        bins: npt.NDArray[np.intp] = np.clip(_BINS + octaves * _BINS_PER_OCTAVE, 0, _BINS - 1).astype(np.intp)
        return bins


class AdmissionPolicy:
    """Admission on one node. Not thread-safe: owned by the store's event loop."""

    def __init__(
        self,
        traffic: Traffic,
        pins: Pins | None = None,
        mode: Mode = Mode.OBSERVE,
        thresholds: Thresholds | None = None,
    ) -> None:
        self.mode = mode
        self.thresholds = thresholds or Thresholds()
        self.pins = pins if pins is not None else Pins()
        self.decisions: Counter[tuple[Target, Reason]] = Counter()
        """What the rule said, per target; counted in ``observe`` too."""
        self._traffic = traffic
        self._loss = LossBudget(self.thresholds.disk_loss)

    def admit(
        self,
        target: Target,
        keys: Sequence[BlockKey],
        now: float,
        pressure: float = 0.0,
        hits: Sequence[float] | None = None,
        residence: float = math.inf,
    ) -> list[Decision]:
        """Decide for the blocks of a chain that ``Traffic.observe`` has seen, from its head; one decision per block.

        A block is never admitted without the ones before it: from the first refusal on all are refused, and likelihood
        counts for a block's ancestors too. ``hits``: decayed, by block, where ``target`` is another region.
        ``residence``: seconds that the tier keeps a block at the rate at which it is offered them.
        """
        if self.mode is Mode.OFF:
            return [Decision(True, Reason.POLICY_OFF)] * len(keys)
        candidates = self._candidates(keys, now, hits, residence)
        if target is Target.DISK:
            self._loss.offered(np.array([c.chance for c in candidates if c.sightings < 2]), self._traffic.returned)
        reasons = self._judge(target, candidates, pressure)
        self.decisions.update((target, reason) for reason in reasons)
        enforce = self.mode is Mode.ENFORCE
        return [Decision(not enforce or reason in ADMITTED, reason) for reason in reasons]

    def certain(self, keys: Sequence[BlockKey], now: float) -> int:
        """How many blocks of a chain, from its head, a disk takes whatever their chances: those before one that was seen again
        or is pinned, and that one. About the others it is best asked late; see ``Thresholds.disk_loss``."""
        if self.mode is Mode.OFF:
            return len(keys)
        wanted = (self._traffic.sightings(keys) >= 2) | np.array(self.pins.hold(keys, now), dtype=bool)
        return int(np.flatnonzero(wanted)[-1]) + 1 if wanted.any() else 0

    def consider(
        self,
        target: Target,
        keys: Sequence[BlockKey],
        now: float,
        pressure: float = 0.0,
        hits: Sequence[float] | None = None,
    ) -> list[Reason]:
        """What the rule says of a chain, whatever the mode. Counts nothing; arguments as for ``admit``."""
        return self._judge(target, self._candidates(keys, now, hits, math.inf), pressure)

    def _judge(self, target: Target, candidates: Sequence[Candidate], pressure: float) -> list[Reason]:
        reasons = [judge(target, candidate, pressure, self.thresholds) for candidate in candidates]
        refused = next((at for at, reason in enumerate(reasons) if reason not in ADMITTED), len(reasons))
        reasons[refused:] = [reasons[refused]] * (len(reasons) - refused) if refused < len(reasons) else []
        return reasons

    def _candidates(
        self, keys: Sequence[BlockKey], now: float, hits: Sequence[float] | None, residence: float
    ) -> list[Candidate]:
        if not keys:
            return []
        sightings = self._traffic.sightings(keys).tolist()
        chance = self._traffic.chance(keys, now, min(self.thresholds.horizon, residence)).tolist()
        pinned = self.pins.hold(keys, now)
        decayed = hits if hits is not None else [0.0] * len(keys)
        least = [self._loss.least_chance] * len(keys)
        return [Candidate(*known) for known in zip(sightings, chance, least, decayed, pinned, strict=True)]
