"""Pins over a restart."""

from __future__ import annotations

import random

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.identity import BlockKey
from kvstore.policy.admission import AdmissionPolicy, Mode, Reason, Target
from kvstore.policy.pins import LONGEST, Pins
from kvstore.policy.reuse import Traffic

NOW = 1e9


def keys(count: int) -> list[BlockKey]:
    source = random.Random(count)
    return [BlockKey(source.randbytes(16)) for _ in range(count)]


@settings(deadline=None)
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
        msgpack.packb([2, b"", b""]),
        msgpack.packb([1, b"short", b""]),
        msgpack.packb([1, bytes(16), b""]),
        msgpack.packb([1, bytes(16), b"\xff" * 8]),
        msgpack.packb([1, "text", 3]),
        msgpack.packb([1, bytes(16 * 9), bytes(8 * 9)]),
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
