from __future__ import annotations

import hashlib

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from kvstore.policy.sightings import WAYS, Sightings, words_of


def words(*numbers: int) -> np.ndarray:
    return words_of(b"".join(hashlib.blake2b(bytes([n]), digest_size=16).digest() for n in numbers))


def test_finds_what_was_inserted() -> None:
    table = Sightings(1024)
    slots, displaced = table.insert(words(1, 2, 3), now=5.0)
    assert not len(displaced.slots)
    table.kind[slots] = [7, 8, 9]
    found = table.find(words(3, 4, 1))
    assert found[1] == -1
    assert table.kind[found[[0, 2]]].tolist() == [9, 7]
    assert (table.seen[slots] == 5.0).all()


def test_gives_up_the_block_that_was_seen_longest_ago_and_says_so() -> None:
    table = Sightings(WAYS)
    for now in range(WAYS):
        slots, _ = table.insert(words(now), float(now))
        table.kind[slots] = now
    table.seen[table.find(words(0))] = 99.0
    _, displaced = table.insert(words(50), 100.0)
    assert displaced.seen.tolist() == [1.0]
    assert displaced.kind.tolist() == [1]
    assert table.find(words(1)).tolist() == [-1]
    assert (table.find(words(0, 50)) >= 0).all()


@given(st.lists(st.sets(st.integers(0, 255), min_size=1, max_size=30), max_size=20))
def test_size_is_fixed_and_the_latest_block_is_known(batches: list[set[int]]) -> None:
    table = Sightings(64)
    for now, batch in enumerate(batches):
        asked = words(*sorted(batch))
        new = asked[table.find(asked) < 0]
        if len(new):
            slots, _ = table.insert(new, float(now))
            assert len(table.seen) == 64
            assert table.find(new[-1:])[0] == slots[-1]
            assert len(np.unique(slots)) >= len(np.unique(table.find(new)[table.find(new) >= 0]))
