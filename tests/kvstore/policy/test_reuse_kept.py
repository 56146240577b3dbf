"""What was learnt of reuse, over a restart."""

from __future__ import annotations

import random

import msgpack
import numpy as np
import pytest

from kvstore.identity import BlockKey
from kvstore.policy.reuse import Traffic


def chain(source: random.Random, blocks: int) -> list[BlockKey]:
    return [BlockKey(source.randbytes(16)) for _ in range(blocks)]


def taught(requests: int = 200) -> tuple[Traffic, list[BlockKey], float]:
    """A system prompt that comes back with every request, behind it what never does."""
    source, traffic = random.Random(1), Traffic(1 << 12)
    system, now = chain(source, 4), 1e9
    for _ in range(requests):
        now += 10
        traffic.observe([*system, *chain(source, 5)], now)
    return traffic, system, now


def test_the_same_is_expected_after_a_restart() -> None:
    traffic, system, now = taught()
    again = Traffic.unpack(traffic.pack(), now)
    some = [*system, *chain(random.Random(2), 3)]
    uses, age = np.ones(len(some), dtype=np.uint32), np.full(len(some), 30.0)
    assert again.sightings(some).tolist() == traffic.sightings(some).tolist()
    restarted = [Traffic.unpack(traffic.pack(), now) for _ in range(2)]
    for one, other in ((again, restarted[0]), (restarted[0], restarted[1])):
        assert np.array_equal(one.values(b"".join(some), uses, age), other.values(b"".join(some), uses, age))
    expected = again.values(b"".join(some), uses, age)
    assert expected[:4].min() > expected[4:].max(), "the system prompt is worth more than what was never seen"
    for kept in (traffic, again):
        kept.observe([*system, *chain(random.Random(3), 2)], now + 10)
    assert again.chance(system, now + 20, 60.0) == pytest.approx(traffic.chance(system, now + 20, 60.0), rel=0.2)


def test_a_clock_that_was_ahead_does_no_harm() -> None:
    traffic, system, now = taught(20)
    again = Traffic.unpack(traffic.pack(), now - 1e6)
    again.observe(system, now - 1e6 + 1)
    assert (again.chance(system, now - 1e6 + 2, 60.0) >= 0).all()
    assert again.sightings(system).tolist() == [21] * 4


def test_nothing_learnt_is_kept_as_nothing() -> None:
    again = Traffic.unpack(Traffic(64).pack(), 5.0)
    again.observe(chain(random.Random(1), 2), 6.0)
    assert Traffic.unpack(again.pack(), 6.0).sightings(chain(random.Random(1), 2)).tolist() == [1, 1]


def broken() -> list[bytes]:
    version, requests, blocks, last, seen, learnt = msgpack.unpackb(taught(20)[0].pack())
    tags, times, kinds, counts = seen
    whole = [version, requests, blocks, last, seen, learnt]

    def changed(at: int, value: object) -> bytes:
        return msgpack.packb([*whole[:at], value, *whole[at + 1 :]])

    nans = np.full(len(counts), np.nan).astype("<f8").tobytes()
    return [
        b"",
        b"\xc1",
        msgpack.packb("text"),
        changed(0, 2),
        changed(1, blocks + 1),
        changed(1, "many"),
        changed(4, [tags, times, kinds]),
        changed(4, [tags, times, kinds, counts[:-1]]),
        changed(4, [tags, nans, kinds, counts]),
        changed(4, [tags, times, b"\xff" * len(kinds), counts]),
        changed(5, learnt[:2]),
        changed(5, [learnt[0], learnt[1], learnt[2][:-8]]),
        changed(5, [np.full(len(learnt[0]) // 8, -1.0).tobytes(), *learnt[1:]]),
    ]


@pytest.mark.parametrize("data", broken())
def test_what_is_no_traffic_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        Traffic.unpack(data, 1e9)
