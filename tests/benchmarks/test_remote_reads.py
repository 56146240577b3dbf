"""Reads on demand in the studies of new regions: the study's own arithmetic, by hand.

A block of the made traces has 512 tokens, which are 8 blocks and 4 MB of the made model, and take 0.8 s to compute. The link
brings 10 MB/s, so a block takes 0.4 s, behind a round trip of 0.1 s for each 16 blocks of 64 tokens: two blocks of a trace.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from benchmarks.planner import Model
from benchmarks.traces.birth import Birth
from benchmarks.traces.budget import ADVISED, SENT_AHEAD, blocks_ahead, division, points_of
from benchmarks.traces.remote import Link, Reader, Remote, reads_pay
from benchmarks.traces.replay import keyed
from benchmarks.traces.trace import Request, build
from benchmarks.traces.variants import agents
from benchmarks.wan import Contest

MODEL = Model("made", 500_000, (0.0, 0.8 / 512, 0.0))
LINK = Link(bandwidth=10e6, latency=0.1, window=16)
SLOW = replace(LINK, bandwidth=1e6)


def request(time: float, *blocks: int) -> Request:
    return Request(time, blocks, 512 * len(blocks), 1)


def reader(link: Link = LINK, listed: range = range(100), most: float = math.inf) -> Reader:
    return Reader(Remote(link, listed, most), MODEL, 512)


def test_what_is_listed_is_read_and_awaited() -> None:
    read = reader().read(request(5.0, 0, 1, 2), here=1)
    assert (read.blocks, read.fetched) == (2, 2)
    assert read.seconds == pytest.approx(0.1 + 2 * 0.4)
    three = reader().read(request(5.0, 0, 1, 2), here=0)
    assert three.seconds == pytest.approx(2 * 0.1 + 3 * 0.4), "two windows, two round trips"


def test_nothing_is_read_over_a_link_slower_than_computing() -> None:
    assert reader(SLOW).read(request(0.0, 0, 1), here=0).blocks == 0
    assert not reads_pay(SLOW, MODEL, 512, 4)
    assert reads_pay(LINK, MODEL, 512, 4)


def test_only_the_listed_beginning_is_read() -> None:
    assert reader(listed=range(2)).read(request(0.0, 0, 1, 2), here=0).blocks == 2
    assert reader(listed=range(1, 3)).read(request(0.0, 0, 1, 2), here=0).blocks == 0


def test_a_budget_is_held() -> None:
    spending = reader(most=3)
    assert spending.read(request(0.0, 0, 1), here=0).fetched == 2
    assert spending.read(request(100.0, 10, 11, 12), here=0).fetched == 1
    assert spending.read(request(200.0, 20), here=0).blocks == 0


def test_who_asks_later_waits_for_what_was_asked_before() -> None:
    link = reader()
    first = link.read(request(0.0, 0), here=0)
    second = link.read(request(0.0, 10, 11, 12), here=0)
    assert first.seconds == pytest.approx(0.5)
    assert second.seconds == pytest.approx(0.4 + 2 * 0.1 + 3 * 0.4)


def test_a_queue_makes_computing_faster() -> None:
    link = reader()
    answers = [link.read(request(0.0, 10 * number, 10 * number + 1), here=0) for number in range(6)]
    assert answers[0].blocks == 2
    assert answers[-1].blocks == 0


def test_a_block_on_its_way_is_not_fetched_twice() -> None:
    link = reader()
    first = link.read(request(0.0, 0, 1), here=0)
    again = link.read(request(0.5, 0, 1), here=0)
    assert (again.blocks, again.fetched) == (2, 0)
    assert again.seconds == pytest.approx(first.seconds - 0.5)


def test_blocks_are_here_when_they_have_arrived() -> None:
    link = reader()
    read = link.read(request(0.0, 0, 1, 2), here=1)
    assert list(link.arrived(read.seconds - 0.01)) == []
    assert list(link.arrived(read.seconds)) == [(1, 2)]
    assert list(link.arrived(1000.0)) == []


def birth() -> Birth:
    """Two chats before; after it, one goes on and a new one comes."""
    rows = [(0.0, ["s", "a"], 1, 1), (1.0, ["s", "b"], 1, 1), (10.0, ["s", "a", "c"], 1, 1), (70.0, ["s", "b"], 1, 1)]
    return Birth(keyed(build("made", rows)))


def test_the_wait_is_taken_from_the_benefit() -> None:
    born = birth()
    sent, read = born.serve(born.seen, (5.0,), model=MODEL)[0], born.serve((), (5.0,), born.remote(LINK), MODEL)[0]
    assert (sent.hits, sent.fetched, sent.seconds) == (2, 0, pytest.approx(1.6))
    assert (read.hits, read.fetched) == (2, 2)
    assert read.seconds == pytest.approx(1.6 - 0.9)


def test_what_was_read_is_here_for_others() -> None:
    born = birth()
    served = born.serve((), (100.0,), born.remote(LINK), MODEL)[0]
    assert (served.hits, served.fetched) == (4, 3), "the second request finds the first block and reads one"
    assert served.seconds == pytest.approx(1.6 - 0.9 + 1.6 - 0.5)


def test_over_a_slow_link_all_is_as_without_it() -> None:
    born = birth()
    assert born.serve((), (100.0,), born.remote(SLOW), MODEL) == born.serve((), (100.0,), model=MODEL)


def test_bytes_read_count_as_bytes_on_the_wan() -> None:
    """Nothing is sent ahead; all three blocks are read, and everything would have been three."""
    fast = replace(LINK, bandwidth=1e9, latency=0.0)
    contest = Contest(birth(), 100.0, MODEL)
    assert contest.gain([], fast) == pytest.approx(0.8 * 3 / 3)
    assert contest.gain([], SLOW) == 0.0


def test_a_budget_keeps_half_a_minute_of_the_link() -> None:
    """The link brings 2.5 blocks a second."""
    born = birth()
    assert division(born, LINK, MODEL) == "kept_30s"
    assert blocks_ahead(born, 100, "kept_30s", LINK, MODEL) == 25
    assert blocks_ahead(born, 70, "kept_30s", LINK, MODEL) == 0


def test_a_budget_is_divided_only_where_reads_pay() -> None:
    born = Birth(keyed(agents(200)))
    assert division(born, SLOW, MODEL) == SENT_AHEAD
    for point in points_of(born, (60.0, 300.0), LINK, MODEL):
        ahead = blocks_ahead(born, point.blocks, "kept_30s", LINK, MODEL)
        assert 0 < point.served[ADVISED].fetched <= point.blocks - ahead
    for point in points_of(born, (60.0, 300.0), SLOW, MODEL):
        assert point.served[ADVISED] == point.served[SENT_AHEAD]
