"""How soon blocks of a kind are used again, learnt as they are: hazard rates by age, and what keeping a block is worth.

The hazard of a kind at an age is the chance per second that a block of that kind which was not used for so long is used now.
It is estimated as uses ÷ time at risk: one curve over the age for all kinds (bins of half an octave), times a factor for
each level of each trait that makes up a kind, times a factor for the kind. Each factor is shrunk towards 1 by some prompts'
worth of data. Curves per kind would be learnt from too few prompts: they lose hits where capacity is large.

A block is worth the best rate of uses per second of storage that any holding time gives it: the highest, over all horizons,
of P(used before the horizon) ÷ E[time until use or horizon]. This is the Gittins index of the block; ranking by it needs no
horizon of its own and sees that a conversation which rests will come back later.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.intp]

BINS = 48
_FINEST = 2.0**-4  # seconds; 48 bins of half an octave end at 12 days
_EDGES = np.concatenate([[0.0], _FINEST * 2.0 ** (np.arange(1, BINS + 1) / 2)])
_WIDTHS = np.diff(_EDGES)
_MIDDLES = np.sqrt(np.maximum(_EDGES[:-1], _FINEST / 2) * _EDGES[1:])
_FIRST = 0.3  # hazard x age where nothing is known: the longer unused, the less likely a use


def age_bin(age: Floats) -> Ints:
    bins: Ints = np.clip(np.log2(np.maximum(age, 1e-9) / _FINEST) * 2, 0, BINS - 1).astype(np.intp)
    return bins


class Hazards:
    """Counts of uses and times at risk per kind and age bin."""

    def __init__(self, kinds: int, weight: float = 1.0) -> None:
        """``weight``: blocks that each watched one stands for."""
        self.weight = weight
        self.kinds = kinds
        shape = self.kinds * BINS
        self.used = np.zeros(shape)
        """Ended by a use, per cell of kind and bin."""
        self.lost = np.zeros(shape)
        """Ended without one: no longer watched."""
        self.inside = np.zeros(shape)
        """Seconds that those of ``used`` and ``lost`` spent in the bin in which they ended."""

    def end(self, kind: npt.NDArray[np.integer], age: Floats, used: bool) -> None:
        """Watched blocks were used, or are no longer watched, at this age since their last use."""
        bins = age_bin(age)
        cells = kind.astype(np.intp) * BINS + bins
        np.add.at(self.used if used else self.lost, cells, self.weight)
        np.add.at(self.inside, cells, (age - _EDGES[bins]) * self.weight)

    def copy(self) -> Hazards:
        same = Hazards(self.kinds, self.weight)
        same.used, same.lost, same.inside = self.used.copy(), self.lost.copy(), self.inside.copy()
        return same

    def fade(self, keep: float) -> None:
        """Let the past count less."""
        for column in (self.used, self.lost, self.inside):
            column *= keep

    def pack(self) -> list[Any]:
        """Plain values for msgpack."""
        return [column.astype("<f8", copy=False).tobytes() for column in (self.used, self.lost, self.inside)]

    def load(self, columns: Sequence[bytes]) -> None:
        """Take over what ``pack`` made, of the same kinds. Raises ValueError, TypeError for anything else."""
        loaded = [np.frombuffer(column, dtype="<f8").copy() for column in columns]
        if len(loaded) != 3 or any(len(column) != len(self.used) for column in loaded):
            raise ValueError("hazards of other kinds")
        if not all(np.isfinite(column).all() and (column >= 0).all() for column in loaded):
            raise ValueError("impossible hazards")
        self.used, self.lost, self.inside = loaded

    def data(self, kind: npt.NDArray[np.integer], age: Floats) -> tuple[Floats, Floats]:
        """Uses, and the seconds at risk behind them, shapes (kinds, BINS).

        ``kind`` and ``age`` are of the blocks that are watched now.
        """
        shape, size = (self.kinds, BINS), self.kinds * BINS
        bins = age_bin(age)
        cells = kind.astype(np.intp) * BINS + bins
        ended_here = self.used + self.lost + np.bincount(cells, minlength=size) * self.weight
        inside = self.inside + np.bincount(cells, age - _EDGES[bins], minlength=size) * self.weight
        ended_here = ended_here.reshape(shape)
        passed = np.cumsum(ended_here[:, ::-1], axis=1)[:, ::-1] - ended_here
        return self.used.reshape(shape), passed * _WIDTHS + inside.reshape(shape)


def fit(uses: Floats, risk: Floats, traits: Sequence[Ints], shrink: float) -> Floats:
    """Uses per second, from what ``Hazards.data`` counted; shape (kinds, BINS).

    ``traits[j][kind]`` is the level of trait ``j`` that the kind has; levels are numbered from 0. ``shrink``: uses that an
    estimate weighs against what it is shrunk to. Blocks of one prompt come and go together, so this should be those of some
    prompts.
    """
    by_kind, by_bin = uses.sum(1), uses.sum(0)
    factor = np.ones(len(uses))
    common = _curve(by_bin, risk.sum(0), shrink)
    for _ in range(6):  # iterative proportional fitting
        for levels in traits:
            expected = np.bincount(levels, (risk @ common) * factor)
            factor = factor * ((np.bincount(levels, by_kind) + shrink) / (expected + shrink))[levels]
        common = _curve(by_bin, factor @ risk, shrink)
    factor = factor * (by_kind + shrink) / ((risk @ common) * factor + shrink)
    rates: Floats = factor[:, None] * common
    return rates


def log_likelihood(rates: Floats, uses: Floats, risk: Floats) -> float:
    """Of uses in so many seconds at risk, by these rates: how well they foresaw them. Comparable for the same uses only."""
    return float((uses * np.log(rates) - risk * rates).sum())


def hopeful(rates: Floats, risk: Floats, shrink: float) -> Floats:
    """Rates that hold nothing against a block at ages of which little is known: there they are at least the usual ones.

    A node that has run for a minute has seen nothing return after two.
    """
    usual = _FIRST / _MIDDLES
    unknown = risk.sum(0) * usual < shrink
    return np.where(unknown, np.maximum(rates, usual), rates)


def _curve(uses: Floats, risk: Floats, shrink: float) -> Floats:
    """Hazard by age. Where data are few, hazard x age goes on as it was at younger ages."""
    curve = np.empty(BINS)
    level = _FIRST
    for bin_ in range(BINS):
        curve[bin_] = (uses[bin_] + shrink) / (risk[bin_] + shrink * _MIDDLES[bin_] / level)
        level = min(curve[bin_] * _MIDDLES[bin_], _FIRST)
    return curve


def worth(rates: Floats) -> Floats:
    """The index of each kind at the start of each age bin, in uses per second. Shape as ``rates``."""
    used = -np.expm1(-rates * _WIDTHS)
    seconds = np.where(rates * _WIDTHS > 1e-9, used / rates, _WIDTHS)
    best = np.zeros_like(rates)
    left, gained, spent = np.ones_like(rates), np.zeros_like(rates), np.zeros_like(rates)
    for further in range(BINS):
        n = BINS - further
        gained[:, :n] += left[:, :n] * used[:, further:]
        spent[:, :n] += left[:, :n] * seconds[:, further:]
        left[:, :n] *= 1 - used[:, further:]
        np.maximum(best[:, :n], gained[:, :n] / spent[:, :n], out=best[:, :n])
    return best


def chance(rates: Floats, kind: npt.NDArray[np.integer], age: Floats, horizon: float) -> Floats:
    """How likely each of some blocks is used within the next ``horizon`` seconds, ``age`` seconds after its last use."""
    start, end = age[:, None], age[:, None] + horizon
    inside = np.clip(np.minimum(end, _EDGES[1:]) - np.maximum(start, _EDGES[:-1]), 0.0, None)
    within: Floats = -np.expm1(-(rates[kind.astype(np.intp)] * inside).sum(1))
    return within


def interpolate(table: Floats, kind: npt.NDArray[np.integer], age: Floats) -> Floats:
    """Entries of a (kinds, BINS) table at any age."""
    position = np.clip(np.log2(np.maximum(age, 1e-9) / _FINEST) * 2, 0, BINS - 1.001)
    low = position.astype(np.intp)
    part = position - low
    rows = kind.astype(np.intp)
    values: Floats = table[rows, low] * (1 - part) + table[rows, low + 1] * part
    return values
