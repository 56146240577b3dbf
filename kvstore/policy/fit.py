"""Online regression for timings: seconds = sum of non-negative coefficients x features, learnt from a few observations.

Least squares of the *relative* error, because a plan needs 10 % of 50 ms as much as 10 % of 5 s. Old observations fade. One
that is far off (a pause, a busy neighbour) hardly counts; several in a row that are off to one side are no outliers but a
change, and what was known before is dropped. The prior is a shape: its scale is learnt first, and a
coefficient that the observations do not tell from the others keeps its share of that shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import exp, log, sqrt

FAR = 3.0
"""Residuals beyond so many times the usual one are far off."""
PRIOR_WEIGHT = 0.3
"""What the prior's shape weighs, as a share of one observation of each feature."""
_LEAST_SPREAD, _FIRST_SPREAD, _MOST_SPREAD = 0.02, 0.3, 1.0
_SPREAD_GAIN = 0.1
_ROUNDS = 30
_LARGEST = 1e18


class OnlineFit:
    """Coefficients of a linear model of seconds. Not thread-safe; under 1 KB. Plain floats: vectors of two or three are
    slower in numpy, and every load of a node teaches."""

    def __init__(self, prior: Sequence[float], memory: float, change: int = 3) -> None:
        """``prior``: coefficients, all positive, whose ratios matter. ``memory``: observations until one counts 1/e.

        ``change``: so many far ones in a row, all above or all below, are a change.
        """
        self._change = change
        self._prior = list(prior)
        self._keep = exp(-1.0 / memory)
        self._far: list[tuple[list[float], float, float]] = []
        """Features, seconds and residual of the far observations in a row."""
        self._forget()
        self._coefficients = list(prior)
        self._spread = _FIRST_SPREAD
        self.observations = 0

    @property
    def spread(self) -> float:
        """Usual relative error of a prediction."""
        return self._spread

    @property
    def coefficients(self) -> tuple[float, ...]:
        return tuple(self._coefficients)

    def seconds(self, features: Sequence[float]) -> float:
        """Prediction."""
        return _dot(self._coefficients, features)

    def observe(self, features: Sequence[float], seconds: float) -> None:
        """Learn from one timing. One that cannot be is left out."""
        if not (min(features) >= 0 and 0 < max(features) <= _LARGEST and 1 / _LARGEST <= seconds <= _LARGEST):
            return
        x = list(features)
        expected = max(self.seconds(x), 1 / _LARGEST) if self.observations else seconds
        self.observations += 1
        off = log(seconds / expected)
        far = FAR * self._spread
        self._spread += _SPREAD_GAIN * (min(abs(off), 2 * far) - self._spread)
        self._spread = min(max(self._spread, _LEAST_SPREAD), _MOST_SPREAD)
        if abs(off) <= far:
            self._far.clear()
            self._add(x, seconds, expected, 1.0)
        else:
            if self._far and (self._far[-1][2] > 0) != (off > 0):
                self._far.clear()
            self._far.append((x, seconds, off))
            if len(self._far) < self._change:
                self._add(x, seconds, expected, (far / off) ** 2)
            else:
                self._forget()
                for before, took, _ in self._far:
                    self._add(before, took, took, 1.0)
                self._far.clear()
        self._solve()

    def _forget(self) -> None:
        size = range(len(self._prior))
        self._moments = [[0.0 for _ in size] for _ in size]
        self._target = [0.0 for _ in size]
        self._log_scale = self._weight = 0.0

    def _add(self, x: Sequence[float], seconds: float, expected: float, weight: float) -> None:
        # In units of the geometric mean of the two: in those of either alone, fast or slow ones would rule.
        unit, value = sqrt(expected * seconds), sqrt(seconds / expected)
        relative = [feature / unit for feature in x]
        for i, mine in enumerate(relative):
            self._target[i] = self._keep * self._target[i] + weight * mine * value
            row = self._moments[i]
            for j, other in enumerate(relative):
                row[j] = self._keep * row[j] + weight * mine * other
        self._log_scale = self._keep * self._log_scale + weight * log(seconds / _dot(self._prior, x))
        self._weight = self._keep * self._weight + weight

    def _solve(self) -> None:
        """Non-negative least squares in units of the scaled prior, by coordinate descent."""
        scale = exp(self._log_scale / self._weight)
        unit = [prior * scale for prior in self._prior]
        matrix = [
            [value * a * b for value, b in zip(row, unit, strict=True)]
            for row, a in zip(self._moments, unit, strict=True)
        ]
        target = [value * a for value, a in zip(self._target, unit, strict=True)]
        for i, row in enumerate(matrix):
            pull = PRIOR_WEIGHT * row[i] / max(self._weight, 1.0) + 1e-9
            row[i] += pull
            target[i] += pull
        solution = [value / a for value, a in zip(self._coefficients, unit, strict=True)]
        for _ in range(_ROUNDS):
            moved = 0.0
            for i, row in enumerate(matrix):
                value = max(solution[i] + (target[i] - _dot(row, solution)) / row[i], 0.0)
                moved = max(moved, abs(value - solution[i]))
                solution[i] = value
            if moved < 1e-4:
                break
        self._coefficients = [value * a for value, a in zip(solution, unit, strict=True)]


def _dot(left: Sequence[float], right: Sequence[float]) -> float:
    return sum(a * b for a, b in zip(left, right, strict=True))
