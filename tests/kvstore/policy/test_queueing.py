"""What work costs others: by hand for small cases, and by playing a queue."""

from __future__ import annotations

import random

import pytest

from kvstore.policy.queueing import EMPTY, REMEMBERED, Flow, Line, Work


@pytest.mark.parametrize(
    ("line", "work", "seconds"),
    [
        (EMPTY, Work(0, 2), 2),
        (EMPTY, Work(3, 2), 5),  # it comes in 3 s
        (Line(waiting=3), Work(0, 2), 2 + 3 * 2),
        (Line(coming=(Work(1, 1),)), Work(0, 2), 2 + 1),  # the other begins a second later
        (Line(coming=(Work(5, 1),)), Work(0, 2), 2),  # we are done by then
        (Line(coming=(Work(0, 4),)), Work(1, 2), 6),  # we wait for the other
        (Line(coming=(Work(1, 4), Work(2, 1))), Work(0, 3), 3 + 2 + 2),
        (Line(rate=1, busy=0.5), Work(0, 2), 2 + 2 * 1 / 0.5),
        (Line(rate=1, busy=0.5, variation=0.25), Work(0, 2), 2 + 2 * 1 / 0.5 / 4),
    ],
)
def test_by_hand(line: Line, work: Work, seconds: float) -> None:
    assert line.cost(work) == pytest.approx(seconds)


def test_who_comes_later_waits_as_the_formula_says() -> None:
    """A queue with random arrivals, played with and without a piece of work at its start."""
    rate, service, extra = 0.6, 1.0, 2.0
    rng = random.Random(1)
    added = []
    for _ in range(2000):
        gaps = [rng.expovariate(rate) for _ in range(60)]
        waits = []
        for backlog in (0.0, extra):
            total = 0.0
            for gap in gaps:
                backlog = max(backlog - gap, 0.0)
                total += backlog
                backlog += service
            waits.append(total)
        added.append(waits[1] - waits[0])
    line = Line(rate=rate, busy=rate * service)
    assert sum(added) / len(added) == pytest.approx(line.cost(Work(0, extra)) - extra, rel=0.1)


def test_a_flow_counts_requests_and_their_work() -> None:
    flow = Flow()
    for number in range(10 * REMEMBERED):
        flow.add(number * 2.0, 0.5)
    line = flow.line(10 * REMEMBERED * 2.0, waiting=3, ahead=1, coming=[Work(7, 2), Work(4, 1)])
    assert line.rate == pytest.approx(0.5, rel=0.1)
    assert line.busy == pytest.approx(0.25, rel=0.1)
    assert line.backlog == pytest.approx(1 + 3 * 0.5 + 3)
    assert [work.comes for work in line.coming] == [4, 7]


def test_who_comes_evenly_waits_for_nobody_and_who_comes_at_random_does() -> None:
    rng = random.Random(4)
    even, chance, bursts = Flow(), Flow(), Flow()
    at = dict.fromkeys((even, chance, bursts), 0.0)
    costs: dict[Flow, list[float]] = {flow: [] for flow in at}
    for number in range(100 * REMEMBERED):
        for flow, gap in ((even, 2.0), (chance, rng.expovariate(0.5)), (bursts, 0.0 if number % 8 else 16.0)):
            at[flow] += gap
            flow.add(at[flow], 1.0)
            costs[flow].append(flow.line(at[flow]).variation)
    mean = {flow: sum(of) / len(of) for flow, of in costs.items()}
    assert mean[even] < 0.01
    assert 0.5 < mean[chance] <= 1
    assert mean[bursts] > 0.9, "and no more than at random"
    line = even.line(at[even])
    assert line.busy == pytest.approx(0.5, rel=0.1)
    assert line.cost(Work(0, 0.5)) == pytest.approx(0.5, rel=0.01)


def test_a_flow_that_ended_is_forgotten() -> None:
    flow = Flow()
    assert flow.line(0.0).rate == 0
    for number in range(REMEMBERED):
        flow.add(float(number), 0.9)
    assert flow.line(REMEMBERED * 1.0).busy > 0.8
    assert flow.line(REMEMBERED * 100.0).busy < 0.1
