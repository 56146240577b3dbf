"""Pins over a restart."""

from __future__ import annotations

import random

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.identity import BlockKey
from kvstore.policy.admission import AdmissionPolicy, Mode, Reason, Target
from kvstore.policy.pins import LONGEST, Pins, Wish
from kvstore.policy.reuse import Traffic

NOW = 1e9


def keys(count: int) -> list[BlockKey]:
    source = random.Random(count)
    return [BlockKey(source.randbytes(16)) for _ in range(count)]


@given(st.lists(st.floats(1, 2 * LONGEST), max_size=20), st.floats(0, LONGEST))
def test_pins_that_have_not_ended_survive(lengths: list[float], later: float) -> None:
    pins, names = Pins(), keys(len(lengths))
    for key, seconds in zip(names, lengths, strict=True):
        pins.pin([key], NOW + seconds, NOW)
    again = Pins.unpack(pins.pack(), NOW + later)
    assert again.ends(names, NOW + later) == pins.ends(names, NOW + later)


def test_a_file_from_the_future_pins_no_longer_than_anybody_may() -> None:
    (key,) = keys(1)
    pins = Pins()
    pins.pin([key], NOW + LONGEST, NOW)
    assert Pins.unpack(pins.pack(), NOW - 1e6).ends([key], NOW - 1e6) == [NOW - 1e6 + LONGEST]


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xc1",
        msgpack.packb(7),
        msgpack.packb([1, []]),
        msgpack.packb([2, 7]),
        msgpack.packb([2, [[NOW, NOW + 1, b"short"]]]),
        msgpack.packb([2, [[NOW, NOW + 1, b""]]]),
        msgpack.packb([2, [[float("nan"), NOW + 1, bytes(16)]]]),
        msgpack.packb([2, [[NOW, float("inf"), bytes(16)]]]),
        msgpack.packb([2, [[NOW, -1.0, bytes(16)]]]),
        msgpack.packb([2, "text"]),
        msgpack.packb([2, [[NOW, NOW + 1, bytes(16 * 20)]]]),
    ],
)
def test_what_are_no_pins_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        Pins.unpack(data, NOW, most=2)


def test_pins_are_told_apart_by_their_end() -> None:
    pins, (one, two, three) = Pins(), keys(3)
    pins.pin([one, two], NOW + 10, NOW)
    pins.pin([three], NOW + 20, NOW)
    assert pins.by_end(NOW) == {NOW + 10: [one, two], NOW + 20: [three]}
    assert pins.by_end(NOW + 15) == {NOW + 20: [three]}


def test_admission_sees_pins_that_come_later() -> None:
    pins, (key,) = Pins(), keys(1)
    admission = AdmissionPolicy(Traffic(64), pins, Mode.ENFORCE)
    assert [d.reason for d in admission.admit(Target.OBJECT, [key], NOW)] == [Reason.SEEN_ONCE]
    pins.pin([key], NOW + 10, NOW)
    assert [d.reason for d in admission.admit(Target.OBJECT, [key], NOW)] == [Reason.PINNED]


CHAIN = keys(6)
made = st.lists(
    st.tuples(
        st.integers(0, 2), st.sampled_from(["a", "b", "ab"]), st.integers(1, 3), st.booleans(), st.integers(1, 99)
    ),
    max_size=12,
)


@settings(max_examples=60)
@given(made, st.randoms(use_true_random=False))
def test_nodes_that_heard_of_the_same_wishes_pin_the_same(
    events: list[tuple[int, str, int, bool, int]], source: random.Random
) -> None:
    """Wishes about overlapping chains, made on nodes that hear of each other at random, in any order."""
    nodes = [Pins() for _ in range(3)]
    for second, (node, name, length, keep, lasts) in enumerate(events):
        now = NOW + second
        chain = CHAIN[:length] if name == "a" else CHAIN[:1] + CHAIN[3 : 2 + length]
        if keep:
            nodes[node].pin(chain, now + lasts, now)
        else:
            nodes[node].unpin(chain, now)
        if name == "ab":
            tell(nodes[node], nodes[(node + 1) % 3], now, source)
    now = NOW + len(events)
    for _ in range(3):
        for one in nodes:
            for other in nodes:
                tell(one, other, now, source)
    assert nodes[0].wishes(now) == nodes[1].wishes(now) == nodes[2].wishes(now)
    assert nodes[0].ends(CHAIN, now) == nodes[1].ends(CHAIN, now) == nodes[2].ends(CHAIN, now)
    again = Pins.unpack(nodes[0].pack(), now)
    assert again.ends(CHAIN, now) == nodes[0].ends(CHAIN, now)


def tell(one: Pins, other: Pins, now: float, source: random.Random) -> None:
    wishes = one.wishes(now)
    source.shuffle(wishes)
    for wish in wishes:
        other.heed(Wish.unpack(wish.pack()), now)


def test_the_latest_wish_about_a_chain_counts() -> None:
    one, other, chain = Pins(), Pins(), keys(3)
    one.pin(chain, NOW + 60, NOW)
    tell(one, other, NOW, random.Random(1))
    assert other.hold(chain, NOW) == [True] * 3
    assert other.unpin(chain, NOW - 5) == 3, "on a machine whose clock is behind"
    tell(one, other, NOW, random.Random(1))
    tell(other, one, NOW, random.Random(1))
    assert one.hold(chain, NOW) == other.hold(chain, NOW) == [False] * 3
    one.pin(chain, NOW + 30, NOW)
    tell(one, other, NOW, random.Random(1))
    assert other.ends(chain, NOW) == [NOW + 30] * 3


def test_wishes_from_elsewhere_are_bounded() -> None:
    pins, chain = Pins(most=4), keys(5)
    assert not pins.heed(Wish(NOW, NOW + 60, b"".join(chain)), NOW), "more than may be pinned"
    assert not pins.heed(Wish(NOW, NOW - 1, chain[0]), NOW), "over"
    assert not pins.heed(Wish(NOW + 2 * LONGEST, NOW + 60, chain[0]), NOW), "nobody's clock is so wrong"
    assert pins.heed(Wish(NOW, NOW + 9 * LONGEST, chain[0]), NOW)
    assert pins.ends(chain[:1], NOW) == [NOW + LONGEST]
