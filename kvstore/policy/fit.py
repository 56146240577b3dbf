"""Online regression for timings: seconds = sum of non-negative coefficients x features, learnt from a few observations.

Least squares of the *relative* error, because a plan needs 10 % of 50 ms as much as 10 % of 5 s. Old observations fade. One
that is far off (a pause, a busy neighbour) hardly counts; several in a row that are off to one side are no outliers but a
change, and what was known before is dropped. The prior is a shape: its scale is learnt first, and a
coefficient that the observations do not tell from the others keeps its share of that shape.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

FAR = 2.0
"""Residuals beyond so many times the usual one are far off."""
CHANGE = 3
"""So many far ones in a row, all above or all below, are a change."""
PRIOR_WEIGHT = 0.3
"""What the prior's shape weighs, as a share of one observation of each feature."""
_LEAST_SPREAD, _FIRST_SPREAD, _MOST_SPREAD = 0.02, 0.3, 1.0
_SPREAD_GAIN = 0.1
_ROUNDS = 30
_LARGEST = 1e18

_Floats = npt.NDArray[np.float64]


class OnlineFit:
    """Coefficients of a linear model of seconds. Not thread-safe; about 1 KB, and 0.2 ms for an observation."""

    def __init__(self, prior: Sequence[float], memory: float) -> None:
        """``prior``: coefficients, all positive, whose ratios matter. ``memory``: observations until one counts 1/e."""
        self._prior = np.asarray(prior, dtype=np.float64)
        self._keep = np.exp(-1.0 / memory)
        self._far: list[tuple[_Floats, float]] = []
        self._forget()
        self._coefficients = self._prior.copy()
        self._spread = _FIRST_SPREAD
        self.observations = 0

    @property
    def spread(self) -> float:
        """Usual relative error of a prediction."""
        return self._spread

    @property
    def coefficients(self) -> tuple[float, ...]:
        return tuple(self._coefficients.tolist())

    def seconds(self, features: Sequence[float]) -> float:
        """Prediction."""
        return float(self._coefficients @ np.asarray(features, dtype=np.float64))

    def observe(self, features: Sequence[float], seconds: float) -> None:
        """Learn from one timing. One that cannot be is left out."""
        x = np.asarray(features, dtype=np.float64)
        if not (x.min() >= 0 and 0 < x.max() <= _LARGEST and 1 / _LARGEST <= seconds <= _LARGEST):
            return
        expected = max(float(self._coefficients @ x), 1e-18) if self.observations else seconds
        self.observations += 1
        off = float(np.log(seconds / expected))
        far = FAR * self._spread
        self._spread += _SPREAD_GAIN * (min(abs(off), 2 * far) - self._spread)
        self._spread = min(max(self._spread, _LEAST_SPREAD), _MOST_SPREAD)
        if abs(off) <= far:
            self._far.clear()
            self._add(x, seconds, expected, 1.0)
        else:
            if self._far and (self._far[-1][1] > 0) != (off > 0):
                self._far.clear()
            self._far.append((np.append(x, seconds), off))
            if len(self._far) < CHANGE:
                self._add(x, seconds, expected, (far / off) ** 2)
            else:
                self._forget()
                for row, _ in self._far:
                    self._add(row[:-1], float(row[-1]), float(row[-1]), 1.0)
                self._far.clear()
        self._solve()

    def _forget(self) -> None:
        self._moments = np.zeros((len(self._prior), len(self._prior)))
        self._target = np.zeros(len(self._prior))
        self._log_scale = self._weight = 0.0

    def _add(self, x: _Floats, seconds: float, expected: float, weight: float) -> None:
        # In units of the geometric mean of the two: in those of either alone, fast or slow ones would rule.
        relative, value = x / np.sqrt(expected * seconds), np.sqrt(seconds / expected)
        self._moments = self._keep * self._moments + weight * np.outer(relative, relative)
        self._target = self._keep * self._target + weight * relative * value
        self._log_scale = self._keep * self._log_scale + weight * float(np.log(seconds / (self._prior @ x)))
        self._weight = self._keep * self._weight + weight

    def _solve(self) -> None:
        """Non-negative least squares in units of the scaled prior, by coordinate descent."""
        scaled = self._prior * np.exp(self._log_scale / self._weight)
        matrix = self._moments * np.outer(scaled, scaled)
        pull = PRIOR_WEIGHT * np.diag(matrix) / max(self._weight, 1.0) + 1e-9
        target = self._target * scaled + pull
        matrix[np.diag_indices_from(matrix)] += pull
        solution = self._coefficients / scaled
        for _ in range(_ROUNDS):
            before = solution.copy()
            for i in range(len(solution)):
                rest = target[i] - matrix[i] @ solution + matrix[i, i] * solution[i]
                solution[i] = max(rest / matrix[i, i], 0.0)
            if np.abs(solution - before).max() < 1e-4:
                break
        self._coefficients = solution * scaled
