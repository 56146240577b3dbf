"""Eviction by learnt reuse, through the real index."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import kvstore.policy.reuse
from kvstore.envelope import Header
from kvstore.identity import NO_PARENT, BlockKey
from kvstore.index import BlockIndex
from kvstore.policy.eviction import eviction_order
from kvstore.policy.hazard import Floats
from kvstore.policy.reuse import ANSWER, REFIT_EVERY, Reuse, Traffic, answer_level, kind_of


def chain(name: str, blocks: int) -> list[BlockKey]:
    return [BlockKey(hashlib.blake2b(f"{name}/{i}".encode(), digest_size=16).digest()) for i in range(blocks)]


def stored(index: BlockIndex, keys: list[BlockKey], now: float) -> None:
    index.touch(keys, now)
    for position, key in enumerate(keys):
        if key not in index:
            parent = keys[position - 1] if position else NO_PARENT
            header = Header(key=key, namespace=bytes(16), parent=parent, index=position, tokens=64, length=9, crc=0)
            index.add(header, position, now)


def trained(minutes: int = 60) -> tuple[Traffic, float]:
    """Conversations of growing prompts, a turn a minute; between the turns, prompts that never return."""
    traffic, now = Traffic(1 << 16), 0.0
    for minute in range(minutes):
        for talk in range(5):
            now = minute * 60.0 + talk
            traffic.observe(chain(f"talk {talk + 5 * (minute // 10)}", 10 + 2 * (minute % 10)), now)
            traffic.observe(chain(f"once {minute} {talk}", 12), now + 0.5)
    return traffic, now + 60


def test_keeps_a_conversation_rather_than_newer_prompts_that_never_return() -> None:
    traffic, now = trained()
    index = BlockIndex()
    talk, once = chain("talk new", 12), chain("once new", 12)
    for keys, at in ((talk[:10], now), (talk, now + 60), (once, now + 70)):
        traffic.observe(keys, at)
        stored(index, keys, at)
    order = eviction_order(index, Reuse(traffic), index.used(), now + 75)
    first = {index.key(int(row)) for row in order[: len(once)]}
    assert len(first & set(once)) >= len(once) - 1


def test_an_estimate_may_be_made_in_another_thread() -> None:
    here, there, now = Traffic(1 << 12), Traffic(1 << 12), 0.0
    with ThreadPoolExecutor(1) as pool:
        for minute in range(100):
            now = minute * 60.0
            for keys in (chain(f"talk {minute // 10}", 10 + 2 * (minute % 10)), chain(f"once {minute}", 12)):
                here.observe(keys, now)
                there.observe(keys, now)
                here.chance(keys, now, 600.0)
                if there.due:
                    work = there.estimation()
                    assert not there.due, "one at a time"
                    there.adopt(pool.submit(work).result())
    for keys in (chain("talk 9", 40), chain("once 3", 12)):
        assert here.chance(keys, now, 600.0).tolist() == there.chance(keys, now, 600.0).tolist()
    assert here.chance(chain("talk 9", 10), now, 600.0)[0] != Traffic(64).chance(chain("talk 9", 10), now, 600.0)[0]


def test_an_estimate_that_fails_is_made_again_when_enough_was_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(rates: Floats) -> Floats:
        raise ArithmeticError

    traffic, now = trained()
    prompt = chain("talk 3", 28)
    with monkeypatch.context() as patch:
        patch.setattr(kvstore.policy.reuse, "worth", fails)
        without = traffic.chance(prompt, now, 600.0).tolist()
    assert traffic.chance(prompt, now, 600.0).tolist() == without, "not before enough was asked"
    for _ in range(REFIT_EVERY):
        traffic.observe(chain("once more", 12), now)
    assert traffic.chance(prompt, now, 600.0).tolist() != without


def test_ranks_an_index_that_it_never_saw() -> None:
    """As after a restart: uses and recency that the index kept still rank blocks."""
    traffic, now = trained()
    index = BlockIndex()
    stored(index, chain("old", 3), now - 4000)
    stored(index, chain("new", 3), now)
    order = [index.key(int(row)) for row in eviction_order(index, Reuse(traffic), index.used(), now)]
    assert order == chain("old", 3)[::-1] + chain("new", 3)[::-1]


def test_same_requests_same_ranking() -> None:
    index = BlockIndex()
    stored(index, chain("talk 3", 30), 1.0)
    stored(index, chain("once 3 3", 12), 2.0)
    orders = [eviction_order(index, Reuse(trained()[0]), index.used(), 4000.0).tolist() for _ in range(2)]
    assert orders[0] == orders[1]


def test_before_any_traffic_it_ranks_by_recency() -> None:
    index = BlockIndex()
    for number in range(5):
        stored(index, chain(f"p{number}", 1), float(number * 100))
    order = eviction_order(index, Reuse(Traffic(64)), index.used(), 1000.0)
    assert index.accessed[order].tolist() == [0.0, 100.0, 200.0, 300.0, 400.0]


def test_knowledge_of_answers_is_optional_and_bounded() -> None:
    traffic, now = trained(5)
    traffic.answered(chain("never seen", 3), 10)
    traffic.observe([], now)
    assert [answer_level(tokens) for tokens in (None, 0, 3, 4, 15, 16, 255, 256, 1023, 1024, 10**9)] == [
        0, 1, 2, 2, 3, 3, 5, 5, 6, 6, 6,
    ]  # fmt: skip


def test_kinds_are_distinct() -> None:
    seen = set()
    for uses in range(4):
        for fresh in (-1, 0, 1, 2, 4, 4096):
            for last in (False, True):
                for answer in range(ANSWER):
                    kind = kind_of(np.array([uses]), fresh, np.array([last]), answer)
                    seen.add(int(kind[0]))
    assert len(seen) == 4 * 6 * 2 * ANSWER
