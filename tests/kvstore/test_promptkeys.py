"""Remembered prompts change how long keys take, never which they are."""

from __future__ import annotations

import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.identity import Keyring, TokenIds, chain_digests, chain_seed
from kvstore.promptkeys import RUN_BYTES, PromptKeys

RINGS = [Keyring(bytes([number]) * 32) for number in range(2)]
SEEDS = [b"", chain_seed(cache_salt="alice")]


def expected(tokens: list[int], block_tokens: int, ring: Keyring, seed: bytes = b"") -> bytes:
    return b"".join(ring.block_keys(chain_digests(tokens, block_tokens, seed)))


prompts = st.lists(st.integers(0, 1), max_size=24)
"""Of two tokens, so that they fork and share in every way."""


@settings(max_examples=300)
@given(
    asked=st.lists(
        st.tuples(prompts, st.integers(1, 4), st.sampled_from(RINGS), st.sampled_from(SEEDS)), min_size=1, max_size=30
    ),
    runs=st.integers(0, 12),
)
def test_keys_are_those_of_hashing_it_all(asked: list[tuple[list[int], int, Keyring, bytes]], runs: int) -> None:
    """Whatever came before, and however little may be remembered."""
    known = PromptKeys(max_bytes=runs * (RUN_BYTES + 40))
    for tokens, block_tokens, ring, seed in asked:
        assert known.keys(tokens, block_tokens, ring, seed) == expected(tokens, block_tokens, ring, seed)
        assert 0 <= known.nbytes <= runs * (RUN_BYTES + 40)


def test_a_longer_turn_hashes_only_what_is_new(monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[int] = []

    def counted(tokens: TokenIds, block_tokens: int, parent: bytes) -> list[bytes]:
        hashed.append(len(tokens))
        return chain_digests(tokens, block_tokens, parent)

    monkeypatch.setattr("kvstore.promptkeys.chain_digests", counted)
    known = PromptKeys()
    history = list(range(6400))
    first, second = [*history, *range(640)], [*history, *range(900, 1540)]
    for tokens in (history, first, second, first, history, second[:-1]):
        assert known.keys(tokens, 64, RINGS[0]) == expected(tokens, 64, RINGS[0])
    assert hashed == [6400, 640, 640]


def test_what_was_used_longest_ago_is_forgotten_first() -> None:
    known = PromptKeys(max_bytes=100_000)
    kept = list(range(6400))
    for number in range(100):
        known.keys([number, *range(6399)], 64, RINGS[0])
        known.keys(kept, 64, RINGS[0])
        assert known.nbytes <= 100_000
    before = known.nbytes
    known.keys(kept, 64, RINGS[0])
    assert known.nbytes == before, "it was still there"


def test_a_prompt_that_does_not_fit_is_answered_all_the_same() -> None:
    known = PromptKeys(max_bytes=1000)
    assert known.keys(range(10_000), 64, RINGS[0]) == expected(list(range(10_000)), 64, RINGS[0])
    assert known.nbytes == 0


def test_threads_share_it() -> None:
    known = PromptKeys(max_bytes=50_000)
    wrong: list[int] = []

    def work(number: int) -> None:
        for turn in range(40):
            tokens = [*range(640), *([number] * 64 * turn)]
            if known.keys(tokens, 64, RINGS[0]) != expected(tokens, 64, RINGS[0]):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
