"""Online regression for timings: seconds = scale x sum of non-negative coefficients x features, learnt from a few observations.

The scale is an average of the observations since it last changed, the later ones first of all; the coefficients, which are the
shape, change slowly. They are least squares of the *relative* error, because a plan needs 10 % of 50 ms as much as 10 % of 5 s.
Old ones fade as new ones of their kind come ("directional forgetting", Kulhavy 1987): a thousand transfers of one size do not
wear out what two of another size told. One that is far off (a pause, a busy neighbour) hardly counts; several in a row that are
off to one side are no outliers but a change of the scale. Outliers take their time all the same, so the mean with them is learnt
beside what is usual. A coefficient that the observations do not tell from the others keeps its share of the prior.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import exp, isfinite, log, sqrt
from typing import Any

FAR = 3.0
"""Residuals beyond so many times the usual one are far off."""
PRIOR_WEIGHT = 0.3
"""What the prior's shape weighs, as a share of one observation of each feature."""
MOST_GAIN, LEAST_GAIN = 0.15, 0.05
"""How much of a residual is put down to the scale at once: an average of all since a change, within these bounds."""
MEAN_MEMORY = 200.0
"""Observations over which the mean is taken: outliers are rare."""
MEAN_WEIGHT = 10.0
"""Observations without outliers that are presumed at the beginning."""
_LARGEST_OUTLIER = 10.0
_LEAST_SPREAD, _FIRST_SPREAD, _MOST_SPREAD = 0.02, 0.3, 1.0
_SPREAD_GAIN = 0.1
_ROUNDS = 30
_LARGEST = 1e18
_LARGEST_LOG = 100.0


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
        self._far: list[float] = []
        """Residuals of the far observations in a row."""
        size = range(len(self._prior))
        self._moments = [[0.0 for _ in size] for _ in size]
        self._target = [0.0 for _ in size]
        self._weight = 0.0
        self._log_scale = 0.0
        self._coefficients = list(prior)
        self._spread = _FIRST_SPREAD
        self._mean = 1.0
        self._since = 0
        """Observations since the scale changed."""
        self.observations = 0

    @property
    def spread(self) -> float:
        """Usual relative error of a prediction."""
        return self._spread

    @property
    def mean(self) -> float:
        """What observations take on average, outliers included, in terms of the predictions, which are about usual ones."""
        return max(self._mean, 1.0)

    @property
    def coefficients(self) -> tuple[float, ...]:
        """By which a feature counts at present: the scale included."""
        scale = exp(self._log_scale)
        return tuple(scale * value for value in self._coefficients)

    def pack(self) -> list[Any]:
        """What was learnt, as plain values."""
        return [
            self._coefficients, self._log_scale, self._moments, self._target, self._weight, self._spread, self.observations,
            self._mean, self._since,
        ]  # fmt: skip

    def load(self, packed: Any) -> None:
        """What ``pack`` gave, of the same features. Raises ValueError for what it cannot have given; nothing is changed then."""
        size = len(self._prior)
        try:
            coefficients, log_scale, moments, target, weight, spread, observations, mean, since = packed
            rows = [coefficients, target, *moments, [log_scale, weight, spread, mean]]
            values = [[float(value) for value in row] for row in rows]
            count, since = int(observations), int(since)
        except (TypeError, ValueError, OverflowError) as error:
            raise ValueError("not a fit") from error
        widths = [len(row) for row in values]
        if widths != [size] * (size + 2) + [4] or not all(isfinite(value) for row in values for value in row):
            raise ValueError("not a fit of these features")
        log_scale, weight, spread, mean = values[-1]
        diagonal = [values[2 + i][i] for i in range(size)]
        counted = 0 <= since <= count >= 1 and 0 <= mean <= _LARGEST_OUTLIER
        if min(values[0]) < 0 or min(diagonal) < 0 or weight < 0 or abs(log_scale) > _LARGEST_LOG or not counted:
            raise ValueError("not a fit that can have been learnt")
        self._coefficients, self._target, self._moments = values[0], values[1], values[2:-1]
        self._log_scale, self._weight = log_scale, weight
        self._spread = min(max(spread, _LEAST_SPREAD), _MOST_SPREAD)
        self.observations, self._mean, self._since = count, mean, since

    def seconds(self, features: Sequence[float]) -> float:
        """Prediction."""
        return exp(self._log_scale) * _dot(self._coefficients, features)

    def observe(self, features: Sequence[float], seconds: float) -> None:
        """Learn from one timing. One that cannot be is left out."""
        if not (min(features) >= 0 and 0 < max(features) <= _LARGEST and 1 / _LARGEST <= seconds <= _LARGEST):
            return
        x = list(features)
        off = log(seconds / max(self.seconds(x), 1 / _LARGEST))
        weight = 1.0
        if not self.observations:
            self._log_scale += off
        else:
            far = FAR * self._spread
            self._spread += _SPREAD_GAIN * (min(abs(off), 2 * far) - self._spread)
            self._spread = min(max(self._spread, _LEAST_SPREAD), _MOST_SPREAD)
            if abs(off) <= far:
                self._no_change()
                self._average(off)
            else:
                if self._far and (self._far[-1] > 0) != (off > 0):
                    self._no_change()
                self._far.append(off)
                weight = (far / off) ** 2
            if len(self._far) == self._change:
                self._log_scale += sorted(self._far)[self._change // 2]
                self._far.clear()
                weight = 1.0
                self._since = self._change
            else:
                self._since += 1
                self._log_scale += min(max(1 / self._since, LEAST_GAIN), MOST_GAIN) * weight * off
        self.observations += 1
        self._add(x, seconds / exp(self._log_scale), weight)
        self._solve()

    def _no_change(self) -> None:
        """The far ones in a row were outliers."""
        for off in self._far:
            self._average(off)
        self._far.clear()

    def _average(self, off: float) -> None:
        ratio = exp(min(off, log(_LARGEST_OUTLIER)))
        self._mean += (ratio - self._mean) / min(self.observations + MEAN_WEIGHT, MEAN_MEMORY)

    def _add(self, x: Sequence[float], seconds: float, weight: float) -> None:
        # In units of the geometric mean of both: in those of either alone, fast or slow ones would rule.
        expected = max(_dot(self._coefficients, x), 1 / _LARGEST)
        unit, value = sqrt(expected * seconds), sqrt(seconds / expected)
        relative = [feature / unit for feature in x]
        known = [_dot(row, relative) for row in self._moments]
        in_all = _dot(known, relative)
        fading = (1 - self._keep) / in_all if in_all > 0 else 0.0
        told = fading * _dot(relative, self._target)
        for i, mine in enumerate(relative):
            self._target[i] += weight * mine * value - told * known[i]
            row = self._moments[i]
            for j, other in enumerate(relative):
                row[j] += weight * mine * other - fading * known[i] * known[j]
        self._weight = self._keep * self._weight + weight

    def _solve(self) -> None:
        """Non-negative least squares in units of the prior, by coordinate descent."""
        unit = self._prior
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
