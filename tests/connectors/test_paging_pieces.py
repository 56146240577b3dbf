"""Copies of a window of blocks: every byte once, in its place, within its group and its slice."""

from __future__ import annotations

import random
from itertools import cycle, islice

from hypothesis import given
from hypothesis import strategies as st

from connectors.paging.pieces import cut
from kvstore.layout import Run

RUNS = st.lists(st.tuples(st.integers(0, 40), st.integers(1, 60)), min_size=1, max_size=4)


ARENA, BUFFERS = 1 << 40, (1 << 20, 1 << 30)


@given(gaps_and_lengths=RUNS, blocks=st.integers(1, 12), group=st.integers(1, 200), slice_bytes=st.integers(1, 300))
def test_every_byte_is_copied_once(
    gaps_and_lengths: list[tuple[int, int]], blocks: int, group: int, slice_bytes: int
) -> None:
    runs, at = [], 0
    for gap, length in gaps_and_lengths:
        runs.append(Run(at + gap, length))
        at += gap + length
    offsets = random.Random(blocks).sample(range(0, blocks * (at + 5), at + 5), blocks)

    share = sum(run.length for run in runs)
    buffers = list(islice(cycle(BUFFERS), -(-blocks * share // group)))
    found: list[int] = []
    for pieces, buffer in zip(cut(offsets, runs, ARENA, slice_bytes, buffers, group), buffers, strict=True):
        staged = buffer
        for arena, place, size in zip(pieces.arena, pieces.staged, pieces.sizes, strict=True):
            offset = arena - ARENA
            assert place == staged
            assert size > 0
            assert offset // slice_bytes == (offset + size - 1) // slice_bytes
            found += range(offset, offset + size)
            staged += size
        assert staged - buffer == (group if len(found) < blocks * share else (blocks * share - 1) % group + 1)
    assert found == [offset + run.offset + byte for offset in offsets for run in runs for byte in range(run.length)]
