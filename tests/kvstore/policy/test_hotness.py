from __future__ import annotations

import hashlib

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.identity import BlockKey
from kvstore.policy.hotness import Hotness


def chain(name: str, blocks: int) -> list[BlockKey]:
    return [BlockKey(hashlib.blake2b(f"{name}/{i}".encode(), digest_size=16).digest()) for i in range(blocks)]


SYSTEM = chain("system", 4)


def seconds(tokens: int) -> float:
    return tokens / 10_000


def ask(hotness: Hotness, keys: list[BlockKey], now: float) -> None:
    hotness.observe(keys, now, block_tokens=64, block_bytes=1000)


def busy(half_life: float = 600.0) -> Hotness:
    """A system prompt under 50 prompts of their own, and a conversation of 6 turns under it."""
    hotness = Hotness(half_life, prefixes=16, width=1 << 12)
    for number in range(50):
        ask(hotness, SYSTEM + chain(f"own {number}", 5), float(number))
    for turn in range(6):
        ask(hotness, SYSTEM + chain("talk", 10 + 2 * turn), 50.0 + turn)
    return hotness


def test_names_what_is_shared_and_not_what_came_once() -> None:
    top = {chain_.key: chain_ for chain_ in busy().top(10, 56.0, seconds)}
    system = top[SYSTEM[-1]]
    assert system.extent.blocks == 4
    assert system.extent.tokens == 256
    assert system.extent.bytes == 4000
    assert 50 <= system.hits <= 56
    assert chain("talk", 20)[17] in top, "a conversation counts, not only system prompts"
    assert not any(chain(f"own {n}", 5)[-1] in top for n in range(50))


def test_score_is_hits_times_seconds_saved_per_byte() -> None:
    best = busy().top(1, 56.0, seconds)[0]
    assert best.score == pytest.approx(best.hits * seconds(best.extent.tokens) / best.extent.bytes)
    assert [c.score for c in busy().top(5, 56.0, seconds)] == sorted(
        (c.score for c in busy().top(5, 56.0, seconds)), reverse=True
    )


def test_hits_halve_in_a_half_life_and_new_ones_count_in_full() -> None:
    hotness = busy(half_life=100.0)
    now = hotness.hits(SYSTEM, 60.0)[0]
    assert hotness.hits(SYSTEM, 160.0)[0] == pytest.approx(now / 2)
    ask(hotness, SYSTEM, 160.0)
    assert hotness.hits(SYSTEM, 160.0)[0] == pytest.approx(now / 2 + 1)


def test_decay_goes_on_over_years() -> None:
    hotness = busy(half_life=100.0)
    later = 1e8
    for number in range(5):
        ask(hotness, chain("later", 6), later + number)
    top = hotness.top(1, later + 5, seconds)[0]
    assert top.key == chain("later", 6)[-1]
    assert 4 < top.hits <= 5
    assert hotness.hits(SYSTEM, later)[0] == pytest.approx(0, abs=1e-6)


def test_survives_packing() -> None:
    hotness = busy()
    again = Hotness.unpack(hotness.pack())
    assert again.top(9, 80.0, seconds) == hotness.top(9, 80.0, seconds)
    ask(again, SYSTEM, 90.0)
    ask(hotness, SYSTEM, 90.0)
    assert again.top(9, 90.0, seconds) == hotness.top(9, 90.0, seconds)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xc1",
        msgpack.packb(7),
        msgpack.packb([2, 1.0, None, b"", 1, [], []]),
        msgpack.packb([1, -1, None, b"", 1, [], []]),
    ],
)
def test_refuses_other_bytes(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"hotness|sketch|npack"):
        Hotness.unpack(data)


@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 5), st.integers(1, 6)), max_size=60), st.floats(0, 900))
def test_merged_nodes_know_what_one_node_would(requests: list[tuple[int, int, int]], apart: float) -> None:
    nodes, one = [Hotness(300.0, 64, 1 << 12) for _ in range(2)], Hotness(300.0, 64, 1 << 12)
    now = 0.0
    for node, name, blocks in requests:
        now += 7 + apart * node
        for hotness in (nodes[node], one):
            ask(hotness, chain(f"p{name}", blocks), now)
    nodes[0].merge(nodes[1])
    for name in range(6):
        keys = chain(f"p{name}", 6)
        assert nodes[0].hits(keys, now) == pytest.approx(one.hits(keys, now), rel=1e-3, abs=1e-3)
    for merged in nodes[0].top(64, now, seconds):
        true = one.hits([merged.key], now)[0]
        assert merged.hits - merged.error <= true + 1e-3


def test_memory_is_bounded() -> None:
    hotness = Hotness(600.0, prefixes=8, width=64)
    for number in range(200):
        ask(hotness, chain(f"p{number % 40}", 3), float(number))
    assert len(hotness.top(1000, 200.0, seconds)) <= 8


def test_nodes_of_different_half_life_do_not_merge() -> None:
    with pytest.raises(ValueError, match="half lives"):
        Hotness(1.0).merge(Hotness(2.0))
