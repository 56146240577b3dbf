"""Speeds are learnt from few timings, in spite of outliers, and anew when they change."""

from __future__ import annotations

import math
import random

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.policy.fit import OnlineFit
from kvstore.policy.prefill import PrefillSpeed, attention
from kvstore.policy.speed import SpeedMeter
from kvstore.tiers.base import Medium


def truth(start: int, tokens: int) -> float:
    """A GPU a good deal slower than the prior, with dearer attention."""
    return 0.02 + 1e-4 * tokens + 2e-9 * attention(start, tokens)


CASES = [(0, 512), (0, 8192), (30_000, 8192), (100_000, 1000)]


def teach(speed: PrefillSpeed, steps: int, seed: int = 1, outliers: float = 0.05) -> None:
    rng = random.Random(seed)
    for _ in range(steps):
        tokens, start = rng.choice([100, 512, 2048, 8192]), rng.choice([0, 1000, 30_000])
        seconds = truth(start, tokens) * rng.lognormvariate(0, 0.05)
        if rng.random() < outliers:
            seconds *= rng.choice([0.3, 5, 20])
        speed.observe(tokens, attention(start, tokens), seconds)


@pytest.mark.parametrize("steps", [100, 300])
@pytest.mark.parametrize("seed", range(5))
def test_prefill_speed_is_learnt_in_spite_of_outliers(seed: int, steps: int) -> None:
    speed = PrefillSpeed()
    teach(speed, steps, seed)
    for start, tokens in CASES:
        assert speed.seconds(start, tokens) == pytest.approx(truth(start, tokens), rel=0.3 if steps < 300 else 0.2)


def test_short_prompts_alone_say_what_long_ones_take_by_the_shape_of_the_prior() -> None:
    speed, prior = PrefillSpeed(), PrefillSpeed()
    for _ in range(20):
        speed.observe(512, attention(0, 512), 10 * prior.seconds(0, 512))
    assert speed.seconds(0, 512) == pytest.approx(10 * prior.seconds(0, 512), rel=0.05)


def test_a_batch_of_requests_teaches_what_they_would_one_by_one() -> None:
    speed, rng = PrefillSpeed(), random.Random(2)
    for _ in range(200):
        chunks = [(rng.randrange(20_000), rng.randrange(1, 2000)) for _ in range(rng.randrange(1, 6))]
        tokens = sum(count for _, count in chunks)
        pairs = sum(attention(*chunk) for chunk in chunks)
        speed.observe(tokens, pairs, 0.02 + 1e-4 * tokens + 2e-9 * pairs)
    assert speed.seconds(10_000, 1500) == pytest.approx(truth(10_000, 1500), rel=0.05)


def test_decoding_teaches_nothing_of_prefill() -> None:
    speed = PrefillSpeed()
    for _ in range(100):
        speed.observe(8, 8 * 4000.0, 0.02)
    assert not speed.known


def test_a_prompt_longer_than_any_step_takes_several() -> None:
    speed = PrefillSpeed()
    for tokens in (64, 512, 2048) * 20:
        speed.observe(tokens, attention(0, tokens), truth(0, tokens))
    fourfold = sum(truth(start, 2048) for start in range(0, 8192, 2048))
    assert speed.seconds(0, 8192) == pytest.approx(fourfold, rel=0.1)


def latest(meter: SpeedMeter, nbytes: int) -> float:
    speed = meter.speed()
    return speed.latency + nbytes / speed.bandwidth


def test_a_tier_is_known_after_a_few_transfers_and_anew_after_a_change() -> None:
    meter, rng = SpeedMeter(Medium.DISK, 16), random.Random(3)
    assert not meter.known

    def transfer(slower: float) -> None:
        nbytes = rng.choice([1, 4, 16, 16]) * 8 << 20
        meter.observe(nbytes, slower * (0.01 + nbytes / 1.5e9) * rng.lognormvariate(0, 0.1))

    window = 128 << 20
    for slower in (1.0, 10.0, 1.0):
        for _ in range(30):
            transfer(slower)
        assert latest(meter, window) == pytest.approx(slower * (0.01 + window / 1.5e9), rel=0.3)


def test_a_change_counts_after_some_transfers_that_show_it() -> None:
    meter = SpeedMeter(Medium.OBJECT, 16)
    for _ in range(50):
        meter.observe(1 << 27, 0.1)
    meter.observe(1 << 27, 2.0)
    assert latest(meter, 1 << 27) < 0.2, "one may be an outlier"
    for _ in range(5):
        meter.observe(1 << 27, 2.0)
    assert latest(meter, 1 << 27) == pytest.approx(2.0, rel=0.2)


@pytest.mark.parametrize("seed", range(3))
def test_what_is_expected_of_a_tier_is_the_mean_with_its_outliers(seed: int) -> None:
    meter, rng = SpeedMeter(Medium.DISK, 16), random.Random(seed)
    expected = []
    for _ in range(2000):
        meter.observe(1 << 27, rng.lognormvariate(0, 0.2) * (5 if rng.random() < 0.04 else 1))
        expected.append(latest(meter, 1 << 27))
    mean = math.exp(0.02) * (0.96 + 0.04 * 5)
    assert sum(expected[200:]) / 1800 == pytest.approx(mean, rel=0.06)
    assert mean > 1.1 * math.exp(0.02), "what is usual is a good deal less"


def test_a_tier_that_becomes_slower_is_not_taken_for_one_with_outliers() -> None:
    meter = SpeedMeter(Medium.DISK, 16)
    for _ in range(100):
        meter.observe(1 << 27, 0.1)
    for _ in range(10):
        meter.observe(1 << 27, 1.0)
    assert latest(meter, 1 << 27) == pytest.approx(1.0, rel=0.1)


def test_usual_timings_that_scatter_hardly_move_what_is_expected() -> None:
    meter, rng = SpeedMeter(Medium.DISK, 16), random.Random(5)
    expected = []
    for _ in range(400):
        meter.observe(1 << 27, 0.1 * rng.lognormvariate(0, 0.2))
        expected.append(latest(meter, 1 << 27))
    late = expected[200:]
    assert max(late) / min(late) < 1.35, "each alone is off by a fifth"


def test_many_transfers_of_one_size_do_not_wear_out_what_others_told() -> None:
    meter, block = SpeedMeter(Medium.DISK, 16), 20 << 20
    for nbytes in (block, 16 * block, block, 16 * block):
        meter.observe(nbytes, 0.1 + nbytes / 8e9)
    for _ in range(200):
        meter.observe(4 * block, 0.1 + 4 * block / 8e9)
    assert latest(meter, 16 * block) < 0.3, "0.14 is true, 0.4 is what the last ones say without latency"


def test_a_tier_that_is_slower_in_all_is_known_by_one_size() -> None:
    meter, block = SpeedMeter(Medium.DISK, 16), 20 << 20
    for nbytes in (block, 16 * block) * 10:
        meter.observe(nbytes, 0.1 + nbytes / 8e9)
    for _ in range(30):
        meter.observe(block, 3 * (0.1 + block / 8e9))
    assert latest(meter, 16 * block) == pytest.approx(3 * (0.1 + 16 * block / 8e9), rel=0.3)


def usual_disk() -> SpeedMeter:
    """100 MB take some 0.1 s."""
    meter = SpeedMeter(Medium.DISK, 16)
    for nbytes in (10**7, 10**8) * 20:
        meter.observe(nbytes, 0.001 + nbytes / 1e9)
    return meter


def test_what_is_overdue_holds_up_whatever_comes_behind_it() -> None:
    meter = usual_disk()
    transfer = meter.begin(10**8, 50.0)
    assert meter.speed(0, 50.05) == meter.speed()
    late = meter.speed(0, 50.6)
    assert late.queued_bytes / late.bandwidth == pytest.approx(0.5, rel=0.1)
    assert meter.speed(0).queued_bytes == 0, "a description is of what was learnt"
    meter.end(transfer)
    assert meter.speed(0, 50.6).queued_bytes == 0


def test_a_straggler_that_others_pass_holds_up_nobody() -> None:
    meter = usual_disk()
    straggler = meter.begin(10**8, 50.0)
    meter.end(meter.begin(10**8, 50.1))
    assert meter.speed(0, 51.0).queued_bytes == 0
    meter.begin(10**8, 50.3)
    assert meter.speed(0, 51.0).queued_bytes > 0, "it was passed, this one was not"
    meter.end(straggler)
    assert meter.speed(0, 51.0).queued_bytes > 0


def test_after_one_that_came_late_half_of_that_is_expected_again_until_one_comes_in_time() -> None:
    meter = usual_disk()
    meter.observe(10**8, 1.1)
    doubtful = meter.speed(0, 50.0)
    assert doubtful.queued_bytes / doubtful.bandwidth == pytest.approx(0.5, rel=0.1)
    meter.observe(10**8, 0.12)
    assert meter.speed(0, 50.0).queued_bytes == 0
    meter.at_least(10**8, 0.15)
    assert meter.speed(0, 50.0).queued_bytes > 0, "it had not come by then"


def test_of_a_tier_that_nobody_timed_nothing_is_overdue() -> None:
    meter = SpeedMeter(Medium.OBJECT, 16)
    transfer = meter.begin(10**8, 50.0)
    meter.observe(10**7, 0.1)
    assert meter.speed(0, 60.0).queued_bytes == 0
    meter.end(transfer)


def test_what_never_came_teaches_that_the_tier_is_slow() -> None:
    meter = SpeedMeter(Medium.OBJECT, 16)
    for _ in range(10):
        meter.observe(1 << 27, 0.1)
    meter.at_least(1 << 27, 0.05)
    assert latest(meter, 1 << 27) == pytest.approx(0.1, rel=0.1)
    for _ in range(5):
        meter.at_least(1 << 27, 5.0)
    assert latest(meter, 1 << 27) > 2


timings = st.lists(
    st.tuples(st.floats(-1, 1e6), st.floats(-1, 1e12), st.floats(allow_nan=True, allow_infinity=True)), max_size=30
)


@given(timings)
def test_whatever_is_reported_predictions_are_finite_and_not_negative(rows: list[tuple[float, float, float]]) -> None:
    fit = OnlineFit((0.005, 33e-6, 1e-9), 100)
    for tokens, pairs, seconds in rows:
        fit.observe((1.0, tokens, pairs), seconds)
    assert all(value >= 0 and math.isfinite(value) for value in fit.coefficients)
    assert math.isfinite(fit.seconds((1, 1000, 1e6)))


def test_what_was_learnt_is_the_same_over_a_restart() -> None:
    meter, speed = SpeedMeter(Medium.DISK, 16), PrefillSpeed()
    teach(speed, 50)
    for nbytes in (1 << 20, 16 << 20, 4 << 20):
        meter.observe(nbytes, 0.01 + nbytes / 3e9)
    again, prefill = SpeedMeter(Medium.DISK, 16), PrefillSpeed()
    again.load(msgpack.unpackb(msgpack.packb(meter.pack())))
    prefill.load(msgpack.unpackb(msgpack.packb(speed.pack())))
    assert again.describe() == meter.describe()
    assert prefill.describe() == speed.describe()
    for before, after in ((meter, again), (speed, prefill)):
        before.observe(100, 1e6, 0.2) if isinstance(before, PrefillSpeed) else before.observe(1 << 20, 0.02)
        after.observe(100, 1e6, 0.2) if isinstance(after, PrefillSpeed) else after.observe(1 << 20, 0.02)
        assert after.describe() == before.describe()


plain = st.recursive(
    st.none() | st.floats() | st.integers() | st.binary() | st.text(),
    lambda inner: st.lists(inner, max_size=8),
    max_leaves=20,
)


@given(plain)
def test_what_cannot_have_been_learnt_is_refused_and_changes_nothing(packed: object) -> None:
    meter, speed = SpeedMeter(Medium.DISK, 16), PrefillSpeed()
    with pytest.raises(ValueError, match="not a"):
        meter.load(packed)
    with pytest.raises(ValueError, match="not a"):
        speed.load(packed)
    assert not meter.known
    assert not speed.known
