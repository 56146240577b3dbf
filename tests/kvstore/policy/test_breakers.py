"""Finding what parts prompts that share their text."""

from __future__ import annotations

import random
from itertools import chain

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.policy.breakers import Prompt, find_breakers
from kvstore.policy.content import Pieces, pieces

SECRET = b"secret"


def text(seed: object, tokens: int) -> list[int]:
    source = random.Random(str(seed))
    return [source.randrange(1 << 31) for _ in range(tokens)]


def prompt(name: object, tokens: list[int], context: bytes = b"") -> Prompt:
    return Prompt(str(name), pieces(tokens, SECRET), context)


@settings(max_examples=40)
@given(st.integers(100, 800), st.integers(1, 60), st.integers(600, 2000), st.integers(2, 6))
def test_a_part_that_changes_is_found_with_what_it_costs(head: int, breaking: int, body: int, prompts: int) -> None:
    """As a date in a system prompt does."""
    front, rest = text("front", head), text("rest", body)
    report = find_breakers([prompt(n, front + text(n, breaking) + rest) for n in range(prompts)])
    (breaker, *others) = report.breakers
    assert not others
    assert breaker.prompts == prompts - 1
    assert head - 400 <= breaker.token <= head, "they part soon behind it"
    assert body - 300 <= breaker.shareable / (prompts - 1) <= body + 250
    assert breaking <= breaker.breaking <= breaking + 400
    assert report.tokens == prompts * (head + breaking + body)
    assert report.anywhere == report.by_prefix + breaker.shareable


@given(st.lists(st.integers(0, 2000), min_size=2, max_size=8))
def test_prompts_that_share_nothing_are_not_reported(lengths: list[int]) -> None:
    report = find_breakers([prompt(n, text(n, length)) for n, length in enumerate(lengths)])
    assert (report.by_prefix, report.anywhere, report.breakers) == (0, 0, ())


@given(st.integers(0, 1500), st.lists(st.integers(0, 1500), min_size=1, max_size=5))
def test_prompts_that_share_a_prefix_only_are_not_reported(head: int, tails: list[int]) -> None:
    front = text("front", head)
    report = find_breakers([prompt(n, front + text(n, tail)) for n, tail in enumerate(tails)])
    assert report.breakers == ()
    assert report.anywhere == report.by_prefix <= head * len(tails)


def test_a_conversation_that_goes_on_is_not_reported() -> None:
    turns = text("conversation", 3000)
    report = find_breakers([prompt(n, turns[: 600 * (n + 1)]) for n in range(5)])
    assert report.breakers == ()
    assert report.by_prefix > 0.6 * report.tokens


def test_documents_in_another_order_are_found() -> None:
    """Retrieval that ranks the same documents differently for each question, as RAGPulse shows."""
    source = random.Random(1)
    system, documents = text("system", 300), [text(("document", n), 500) for n in range(6)]
    prompts = []
    for number in range(40):
        chosen = source.sample(documents, 4)
        prompts.append(prompt(number, [*system, *chain.from_iterable(chosen), *text(number, 40)]))
    report = find_breakers(prompts)
    assert report.anywhere > 0.8 * report.tokens
    assert report.by_prefix < 0.5 * report.tokens
    worst = report.breakers[0]
    assert worst.token <= 300
    assert worst.shareable > 0.2 * report.tokens
    resumed = worst.examples[0]
    assert resumed.resumes[0] != resumed.resumes[1]


def test_contexts_share_nothing() -> None:
    same = text("same", 1000)
    prompts = [prompt(n, text(n, 40) + same, bytes([n])) for n in range(3)]
    report = find_breakers(prompts)
    assert (report.by_prefix, report.anywhere, report.breakers) == (0, 0, ())
    alike = find_breakers([Prompt(p.name, p.pieces) for p in prompts])
    assert alike.breakers[0].shareable > 1500


def test_the_latest_of_equals_is_the_example() -> None:
    same = text("same", 1000)
    report = find_breakers([prompt(n, text(n, 40) + same) for n in range(3)])
    assert {(example.later, example.earlier) for example in report.breakers[0].examples} == {("1", "0"), ("2", "1")}


@pytest.mark.parametrize("prompts", [[], [Prompt("empty", Pieces(np.zeros(0, "<u4"), np.zeros(0, "<u8"), 0))] * 2])
def test_nothing_to_compare(prompts: list[Prompt]) -> None:
    assert find_breakers(prompts).breakers == ()
