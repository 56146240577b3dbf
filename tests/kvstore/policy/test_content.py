"""Cutting prompts where their content says so."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.policy.content import REACH, pieces


def text(seed: int, tokens: int) -> list[int]:
    source = random.Random(seed)
    return [source.randrange(50_000) for _ in range(tokens)]


@given(st.lists(st.integers(0, 2**32 - 1), max_size=300))
def test_pieces_cover_a_prompt(tokens: list[int]) -> None:
    cut = pieces(tokens, b"secret")
    assert cut.tokens == len(tokens) == cut.lengths.sum()
    assert (cut.lengths > 0).all()
    assert len(cut.hashes) == len(cut.starts)
    assert cut.starts[:1].tolist() == ([0] if tokens else [])
    assert (cut.lengths[1:-1] > REACH).all()


@given(st.integers(0, 200), st.integers(0, 200), st.integers(0, 1 << 30))
def test_the_same_text_is_cut_alike_wherever_it_stands(before: int, other: int, seed: int) -> None:
    shared = text(seed, 1200)
    one = pieces(text(seed + 1, before) + shared + text(seed + 2, 50), b"secret")
    two = pieces(text(seed + 3, other) + shared + text(seed + 4, 90), b"secret")
    common = np.isin(one.hashes, two.hashes)
    assert one.lengths[common].sum() >= 800, "all but the pieces at its ends"


def test_hashes_need_the_secret() -> None:
    tokens = text(1, 1000)
    assert not np.isin(pieces(tokens, b"one").hashes, pieces(tokens, b"two").hashes).any()
    assert (pieces(tokens, b"one").hashes == pieces(np.array(tokens, dtype=np.uint32), b"one").hashes).all()


@pytest.mark.parametrize("tokens", [[7] * 5000, [1, 2] * 2000])
def test_text_that_repeats_makes_few_pieces(tokens: list[int]) -> None:
    assert len(pieces(tokens, b"secret").starts) <= len(tokens) // REACH + 1
