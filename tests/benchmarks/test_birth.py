"""A new cluster's first minutes: the study's own arithmetic."""

from __future__ import annotations

import pytest

from benchmarks.fleet import most_nodes, region
from benchmarks.traces.birth import Birth
from benchmarks.traces.replay import keyed
from benchmarks.traces.trace import build
from benchmarks.traces.variants import agents
from benchmarks.wan import Contest


def birth() -> Birth:
    """Two chats before; after it, one goes on and a new one comes."""
    rows = [(0.0, ["s", "a"], 1, 1), (1.0, ["s", "b"], 1, 1), (10.0, ["s", "a", "c"], 1, 1), (70.0, ["s", "x"], 1, 1)]
    return Birth(keyed(build("made", rows)))


def test_hits_and_seconds_by_window() -> None:
    born = birth()
    assert (born.time, born.seen) == (10.0, [0, 1, 2])
    cold, later = born.serve((), (5.0, 100.0))
    assert (cold.hits, cold.references, cold.seconds) == (0, 3, 0.0)
    assert (later.hits, later.references) == (1, 5), "the second request finds what the first one left"
    sent = born.serve([0, 1], (100.0, 5.0))
    assert [one.hits for one in sent] == [3, 2]
    assert sent[0].seconds > sent[1].seconds > 0


def test_a_block_without_its_ancestors_is_no_hit() -> None:
    assert birth().serve([1], (5.0,))[0].hits == 0


def test_steady_when_little_is_missing_from_then_on() -> None:
    born = birth()
    assert born.seconds_to_steady(born.seen, 0.95) == 0.0
    assert born.seconds_to_steady((), 0.95) == 60.0


def test_hindsight_is_not_beaten() -> None:
    born = Birth(keyed(agents(400)))
    order = born.by_learning()
    assert set(order) <= set(born.seen)
    contest = Contest(born, 300.0)
    assert contest.gain(born.by_hindsight(300.0)) >= contest.gain(order) >= 1.0


def test_a_catalog_bears_as_many_nodes_as_keep_its_core_free() -> None:
    costs = dict.fromkeys(("record_us", "follow_us", "idle_follow_us", "claim_us", "report_bytes", "merge_us"), 1.0)
    nodes = most_nodes(100.0, costs)
    assert region(nodes, 100.0, costs)["busy"] <= 0.7 < region(nodes + 1, 100.0, costs)["busy"]
    assert region(2 * nodes, 100.0, costs)["told"] == pytest.approx(4 * region(nodes, 100.0, costs)["told"])


def test_a_rehearsal_leaves_no_block_known() -> None:
    """Nodes that served such traffic before know how it goes on, not which conversations will."""
    born = Birth(keyed(agents(200)))
    order = born.by_learning(rehearsed=True)
    assert set(order) == set(born.by_learning())
    contest = Contest(born, 300.0)
    assert contest.gain(order) <= contest.gain(born.by_hindsight(300.0))
