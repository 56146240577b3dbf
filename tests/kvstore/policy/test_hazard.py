from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.policy.hazard import (
    BINS,
    Floats,
    Hazards,
    age_bin,
    chance,
    fit,
    hopeful,
    interpolate,
    log_likelihood,
    worth,
)

ONE_KIND = [np.zeros(1, dtype=np.intp)]
NOBODY = (np.zeros(0, dtype=np.intp), np.zeros(0))
SHRINK = 30.0


def kinds(n: int, kind: int) -> np.ndarray:
    return np.full(n, kind)


def rates_of(
    hazards: Hazards, traits: list[np.ndarray] = ONE_KIND, watched: tuple[np.ndarray, Floats] = NOBODY
) -> Floats:
    return fit(*hazards.data(*watched), traits, SHRINK)


def test_learns_a_constant_rate() -> None:
    hazards = Hazards(1)
    hazards.end(kinds(200_000, 0), np.random.default_rng(1).exponential(50.0, 200_000), used=True)
    rates = rates_of(hazards)
    found = interpolate(rates, kinds(3, 0), np.array([5.0, 50.0, 150.0]))
    assert found == pytest.approx([1 / 50] * 3, rel=0.1)
    assert interpolate(worth(rates), kinds(1, 0), np.array([5.0])) == pytest.approx([1 / 50], rel=0.1)


def test_blocks_that_do_not_come_back_lower_the_rate() -> None:
    age = np.full(1000, 30.0)
    few, many = Hazards(1), Hazards(1)
    for hazards in (few, many):
        hazards.end(kinds(1000, 0), age, used=True)
    many.end(kinds(9000, 0), np.full(9000, 60.0), used=False)
    still_waiting = rates_of(few, watched=(kinds(9000, 0), np.full(9000, 60.0)))
    assert interpolate(rates_of(many), kinds(1, 0), age[:1]) < interpolate(rates_of(few), kinds(1, 0), age[:1])
    assert still_waiting == pytest.approx(rates_of(many))


def test_tells_kinds_apart_by_their_traits() -> None:
    traits = [np.array([0, 0, 1, 1]), np.array([0, 1, 0, 1])]
    hazards = Hazards(4)
    for kind, uses in ((0, 900), (1, 300), (2, 300)):
        hazards.end(kinds(uses, kind), np.full(uses, 20.0), used=True)
        hazards.end(kinds(1000 - uses, kind), np.full(1000 - uses, 40.0), used=False)
    rates = rates_of(hazards, traits)
    at = rates[:, age_bin(np.array([20.0]))[0]]
    assert at[0] > at[1] > at[3], "the kind without data is ranked by its traits"
    assert at[0] > at[2] > at[3]


def test_a_rest_before_the_return_does_not_lower_the_worth() -> None:
    """Nothing comes back in the first seconds, most after a minute: young blocks are kept for that."""
    rates = np.full((1, BINS), 1e-6)
    rates[0, age_bin(np.array([60.0]))[0]] = 1.0
    value = worth(rates)[0]
    young, due, late = (value[age_bin(np.array([age]))[0]] for age in (1.0, 45.0, 200.0))
    assert late < young < due


def test_nothing_is_held_against_blocks_at_ages_that_nobody_has_seen() -> None:
    """Watched for 20 s, nothing came back within 10: that says nothing of the minute after."""
    hazards = Hazards(1)
    waiting = kinds(5000, 0), np.full(5000, 20.0)
    rates = rates_of(hazards, watched=waiting)
    kind, age = kinds(1, 0), np.array([20.0])
    assert chance(rates, kind, age, 300.0)[0] < 0.05
    seen = hazards.data(*waiting)[1]
    assert chance(hopeful(rates, seen, SHRINK), kind, age, 300.0)[0] > 0.4
    assert chance(hopeful(rates, seen, SHRINK), kind, np.array([1.0]), 5.0)[0] < 0.05


def test_rates_that_fit_are_likelier() -> None:
    hazards = Hazards(1)
    hazards.end(kinds(2000, 0), np.random.default_rng(1).exponential(50.0, 2000), used=True)
    uses, risk = hazards.data(*NOBODY)
    true = np.full((1, BINS), 1 / 50)
    assert all(log_likelihood(true, uses, risk) > log_likelihood(true * wrong, uses, risk) for wrong in (0.8, 1.2))


def test_what_faded_weighs_less() -> None:
    hazards = Hazards(1)
    hazards.end(kinds(1000, 0), np.full(1000, 1.0), used=True)
    hazards.fade(0.5)
    assert hazards.used.sum() == pytest.approx(500)


@given(st.lists(st.floats(1e-6, 10.0), min_size=BINS, max_size=BINS))
def test_worth_is_between_the_rates_that_are_still_to_come(rates: list[float]) -> None:
    value = worth(np.array([rates]))[0]
    for start in range(BINS):
        assert value[start] <= max(rates[start:]) * (1 + 1e-6)
    assert (value > 0).all()


@given(st.lists(st.floats(0, 1e7), max_size=50), st.integers(0, 2))
def test_estimates_are_always_positive_and_finite(ages: list[float], kind: int) -> None:
    hazards = Hazards(3)
    hazards.end(kinds(len(ages), kind), np.array(ages), used=True)
    uses, risk = hazards.data(kinds(len(ages), kind), np.array(ages))
    rates = fit(uses, risk, [np.arange(3)], SHRINK)
    assert np.isfinite(rates).all()
    assert (rates > 0).all()
    assert (risk >= -1e-6).all()
    assert np.isfinite(worth(rates)).all()
