"""The ring of what happened to blocks."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.history import EVENTS_SHOWN, History, What
from kvstore.identity import BlockKey
from kvstore.policy.admission import Reason
from kvstore.tiers.base import Medium

UNLIKE_PLANS = [what for what in What if what is not What.RECOMPUTED]


def keys(count: int, seed: int = 0) -> list[BlockKey]:
    source = random.Random(seed)
    return [BlockKey(source.randbytes(16)) for _ in range(count)]


def test_events_come_back_with_all_that_was_said() -> None:
    history = History()
    one, other, newcomer = keys(3)
    history.record(What.SAVED, [one, other], Medium.HOST)
    history.record(What.NOT_ADMITTED, [one], Medium.DISK, Reason.UNLIKELY)
    history.evicted(Medium.HOST, [one], newcomer)
    history.record(What.RECOMPUTED, [one], estimates=(0.25, 0.125))
    history.record(What.DEADLINE, [])
    of_one, of_other, of_none = history.of([one, other, newcomer])
    assert [event.what for event in of_one] == [What.SAVED, What.NOT_ADMITTED, What.EVICTED, What.RECOMPUTED]
    assert of_one[1].reason is Reason.UNLIKELY
    assert of_one[1].medium is Medium.DISK
    assert newcomer.startswith(of_one[2].newcomer)
    assert len(of_one[2].newcomer) == 8
    assert of_one[3].estimates == (0.25, 0.125)
    assert of_one[3].medium is None
    assert [event.what for event in of_other] == [What.SAVED]
    assert of_none == []
    assert all(history.since <= event.at for event in of_one)


@given(st.integers(1, 40), st.lists(st.lists(st.integers(0, 9), max_size=60), max_size=12))
def test_the_latest_events_are_kept_in_order_whatever_the_batches(size: int, batches: list[list[int]]) -> None:
    history, names = History(size), keys(10)
    everything: list[tuple[int, What]] = []
    for number, batch in enumerate(batches):
        what = UNLIKE_PLANS[number % len(UNLIKE_PLANS)]
        history.record(what, [names[index] for index in batch], Medium.HOST)
        everything += [(index, what) for index in batch]
    kept = everything[-size:]
    assert len(history) == len(kept)
    for index, events in enumerate(history.of(names)):
        assert [event.what for event in events] == [what for at, what in kept if at == index][-EVENTS_SHOWN:]


def test_a_plan_that_is_made_again_is_one_event() -> None:
    history = History(64)
    first, second = keys(5), keys(5, seed=1)
    for milliseconds in range(100):
        history.record(What.RECOMPUTED, first, estimates=(milliseconds / 1e3, 0.5))
        history.record(What.RECOMPUTED, second, estimates=(0.25, 0.5))
    assert len(history) == 10
    assert [[event.estimates for event in events] for events in history.of(first[:1])] == [
        [(pytest.approx(0.099), 0.5)]
    ]
    history.record(What.RECOMPUTED, first[:4], estimates=(0.1, 0.5))
    assert len(history) == 14


@given(st.integers(1, 20), st.lists(st.tuples(st.booleans(), st.integers(1, 6)), max_size=40))
def test_plans_that_repeat_never_hide_what_came_later(size: int, batches: list[tuple[bool, int]]) -> None:
    history, names = History(size), keys(6)
    for planned, count in batches:
        what = What.RECOMPUTED if planned else What.SAVED
        history.record(what, names[:count], Medium.HOST, estimates=(0.1, 0.2) if planned else None)
        expected = min(count, size)
        assert all(
            any(event.what is what for event in events) for events in history.of(names[count - expected : count])
        )


def test_the_past_begins_where_events_were_overwritten() -> None:
    history = History(4)
    began = history.since
    history.record(What.SAVED, keys(4))
    assert history.since == began
    history.record(What.SAVED, keys(1, seed=1))
    assert history.since > began
    assert history.of([]) == []


@pytest.mark.parametrize("medium", list(Medium))
def test_every_medium_and_rule_can_be_told(medium: Medium) -> None:
    history = History(64)
    (key,) = keys(1)
    for reason in Reason:
        history.record(What.NOT_ADMITTED, [key], medium, reason)
    (events,) = history.of([key])
    assert [event.reason for event in events] == list(Reason)[-EVENTS_SHOWN:]
    assert {event.medium for event in events} == {medium}
