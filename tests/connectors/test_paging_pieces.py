"""Copies of a window of blocks: every byte once, in its place, within its group and its slice."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from connectors.paging.pieces import Cutter
from kvstore.layout import Run

RUNS = st.lists(st.tuples(st.integers(0, 40), st.integers(1, 60)), min_size=1, max_size=4)


BUFFERS = 3


@given(
    gaps_and_lengths=RUNS, blocks=st.integers(1, 12), group=st.integers(1, 200), buffer=st.integers(0, BUFFERS - 1),
    slice_bytes=st.integers(1, 300),
)  # fmt: skip
def test_every_byte_is_copied_once(
    gaps_and_lengths: list[tuple[int, int]], blocks: int, group: int, buffer: int, slice_bytes: int
) -> None:
    runs, at = [], 0
    for gap, length in gaps_and_lengths:
        runs.append(Run(at + gap, length))
        at += gap + length
    offsets = np.random.default_rng(blocks).permutation(blocks) * (at + 5)
    pieces = Cutter(runs, group, BUFFERS, slice_bytes)(offsets, buffer)

    share = sum(run.length for run in runs)
    expected = [int(offset) + run.offset + byte for offset in offsets for run in runs for byte in range(run.length)]
    found = [-1] * (blocks * share)
    assert len(pieces.bounds) == -(-blocks * share // group) + 1
    for number, (first, stop) in enumerate(zip(pieces.bounds, pieces.bounds[1:], strict=False)):
        for piece in range(first, stop):
            arena, staged, size = (int(column[piece]) for column in (pieces.arena, pieces.staged, pieces.sizes))
            turn, inside = divmod(staged, group)
            assert turn == (buffer + number) % BUFFERS
            assert size > 0
            assert inside + size <= group
            assert arena // slice_bytes == (arena + size - 1) // slice_bytes
            for byte in range(size):
                assert found[number * group + inside + byte] == -1
                found[number * group + inside + byte] = arena + byte
    assert found == expected
