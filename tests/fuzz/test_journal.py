"""Journals that are sound but for some bytes: what a fuzzer of bytes makes of them, and what a disk does to them."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from journal_cases import disk, journal, one_journal

CHANGES = st.lists(
    st.tuples(st.integers(0, 255), st.sampled_from([0, 1, 0x7F, 0x80, 0xFF]) | st.integers(0, 255)), max_size=12
)


@pytest.fixture(scope="module", autouse=True)
def removed() -> Iterator[None]:
    yield
    shutil.rmtree(disk())
    disk.cache_clear()


@settings(max_examples=25)
@given(changes=CHANGES, cut=st.integers(0, 256), more=st.binary(max_size=200), again=st.integers(0, 3))
def test_whatever_a_journal_says_blocks_lie_apart_in_their_segments(
    changes: list[tuple[int, int]], cut: int, more: bytes, again: int
) -> None:
    sound = one_journal()
    data = bytearray(sound)
    for place, value in changes:
        data[place % len(data)] = value
    journal(bytes(data[: len(data) - cut]) + sound * again + more)
