"""Error bounds, merging and packing of the sketches, against exact counts."""

from __future__ import annotations

import hashlib
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.identity import BlockKey
from kvstore.policy.sketch import CountMin, HeavyHitters

streams = st.lists(st.integers(0, 40), max_size=200)


def key(number: int) -> BlockKey:
    return BlockKey(hashlib.blake2b(str(number).encode(), digest_size=16).digest())


def counted(stream: list[int], width: int = 256) -> CountMin:
    sketch = CountMin(width)
    for number in stream:
        sketch.add([key(number)], 1.0)
    return sketch


def hitters_of(stream: list[int], capacity: int) -> HeavyHitters:
    hitters = HeavyHitters(capacity)
    for number in stream:
        hitters.add(key(number), 1.0)
    return hitters


@given(streams)
def test_count_min_never_counts_too_little(stream: list[int]) -> None:
    sketch = counted(stream, width=8)
    for number, count in Counter(stream).items():
        assert sketch.estimate([key(number)])[0] >= count


def test_count_min_error_is_within_its_bound() -> None:
    numbers = np.random.default_rng(3).zipf(1.3, 20_000) % 5000
    sketch = CountMin(1 << 10)
    sketch.add([key(int(number)) for number in numbers], 1.0)
    true = Counter(numbers.tolist())
    bound = math.e * len(numbers) / sketch.width
    over = [sketch.estimate([key(number)])[0] - true[number] > bound for number in range(5000)]
    assert np.mean(over) <= math.exp(-4)


@given(streams, streams)
def test_count_min_merges_to_the_sketch_of_both(left: list[int], right: list[int]) -> None:
    merged = counted(left)
    merged.merge(counted(right))
    assert np.array_equal(merged.cells, counted(left + right).cells)


@given(streams)
def test_count_min_survives_packing(stream: list[int]) -> None:
    sketch = counted(stream)
    assert np.array_equal(CountMin.unpack(sketch.pack()).cells, sketch.cells)


@pytest.mark.parametrize(
    "data", [b"", b"x", bytes(16 * 3), np.full(16, np.nan, "<f4").tobytes(), np.full(16, -1, "<f4").tobytes()]
)
def test_count_min_refuses_other_bytes(data: bytes) -> None:
    with pytest.raises(ValueError, match="sketch"):
        CountMin.unpack(data)


@given(streams, st.integers(1, 12))
def test_heavy_hitters_bound_every_count(stream: list[int], capacity: int) -> None:
    hitters = hitters_of(stream, capacity).hitters
    true = Counter(stream)
    assert len(hitters) <= capacity
    for number, count in true.items():
        hitter = hitters.get(key(number))
        if hitter is None:
            assert count <= len(stream) / capacity
        else:
            assert count <= hitter.sum <= count + hitter.error
            assert hitter.error <= len(stream) / capacity


@given(streams, streams, st.integers(1, 12))
def test_merged_heavy_hitters_keep_the_bounds(left: list[int], right: list[int], capacity: int) -> None:
    merged, other = hitters_of(left, capacity), hitters_of(right, capacity)
    dropped = merged.merge(other.hitters, other.full)
    assert not set(dropped) & merged.hitters.keys()
    true = Counter(left + right)
    for number, count in true.items():
        hitter = merged.hitters.get(key(number))
        if hitter is not None:
            assert count <= hitter.sum <= count + hitter.error
    merged.add(key(99), 1.0)
    assert len(merged.hitters) <= capacity


@given(streams, st.integers(1, 12))
def test_heavy_hitters_survive_packing(stream: list[int], capacity: int) -> None:
    hitters = hitters_of(stream, capacity)
    again = HeavyHitters.unpack(hitters.pack(), capacity)
    for number in (50, 51, 52):
        assert again.add(key(number), 3.0) == hitters.add(key(number), 3.0) or capacity > 1
    assert sorted(h.sum for h in again.hitters.values()) == sorted(h.sum for h in hitters.hitters.values())


@pytest.mark.parametrize(
    "rows", [[[b"short", 1.0, 0.0]], [[bytes(16), math.inf, 0.0]], [[bytes(16), 1.0, 2.0]], [["text", 1, 0]]]
)
def test_heavy_hitters_refuse_other_rows(rows: list[list[object]]) -> None:
    with pytest.raises(ValueError, match="heavy hitter"):
        HeavyHitters.unpack(rows, 4)
