"""Counting what engines ask for."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from pathlib import Path

import pytest
from structlog.testing import capture_logs

import kvstore.demand
import kvstore.policy.reuse
from kvstore.demand import Demand, prefill_seconds
from kvstore.errors import TierUnavailable
from kvstore.identity import BlockKey
from kvstore.policy.hazard import Floats

TOKENS, BYTES = 64, 1 << 20


def chain(seed: int, blocks: int) -> list[BlockKey]:
    source = random.Random(seed)
    return [BlockKey(source.randbytes(16)) for _ in range(blocks)]


async def test_the_prompt_that_many_ask_for_is_hot_and_stays_so_over_a_restart(tmp_path: Path) -> None:
    system, file = chain(1, 4), tmp_path / "hotness.msgpack"
    demand = Demand(file)
    for number in range(20):
        demand.observe(number, [*system, *chain(100 + number, 3)], TOKENS, BYTES)
    for _ in range(2):
        (hottest, *_) = demand.top(10)
        assert hottest.key == system[-1]
        assert hottest.extent.tokens == 4 * TOKENS
        assert hottest.extent.bytes == 4 * BYTES
        assert hottest.hits == pytest.approx(20, rel=0.1)
        assert hottest.seconds_saved == prefill_seconds(4 * TOKENS)
        await demand.close()
        demand = Demand(file)
    await demand.close()


async def test_a_request_that_asks_again_counts_once(tmp_path: Path) -> None:
    prompt = chain(1, 3)
    demand = Demand(tmp_path / "hotness.msgpack")
    for _ in range(50):
        demand.observe("engine", prompt, TOKENS, BYTES)
    assert demand.top(10) == []
    demand.observe("another engine", prompt, TOKENS, BYTES)
    assert [hot.key for hot in demand.top(10)] == [prompt[-1]]
    demand.observe("engine", [], TOKENS, BYTES)
    await demand.close()


async def test_no_lookup_waits_for_what_is_learnt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    threads: set[int] = set()
    worth = kvstore.policy.reuse.worth

    def traced(rates: Floats) -> Floats:
        threads.add(threading.get_ident())
        return worth(rates)

    demand = Demand(tmp_path / "hotness.msgpack")
    monkeypatch.setattr(kvstore.policy.reuse, "worth", traced)
    for number in range(100):
        prompt = chain(number % 7, 5)
        demand.observe(number, prompt, TOKENS, BYTES)
        demand.traffic.chance(prompt, time.time(), 60.0)
        await asyncio.sleep(0)
    await demand.close()
    assert threads
    assert threading.get_ident() not in threads


async def test_an_estimate_that_fails_is_made_again_when_enough_was_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    estimates = 0
    worth = kvstore.policy.reuse.worth

    def fails_at_first(rates: Floats) -> Floats:
        nonlocal estimates
        estimates += 1
        if estimates == 1:
            raise MemoryError
        return worth(rates)

    prompt = chain(1, 5)
    demand = Demand(tmp_path / "hotness.msgpack")
    monkeypatch.setattr(kvstore.policy.reuse, "worth", fails_at_first)
    with capture_logs() as logs:
        for number in range(100):
            demand.observe(number, prompt, TOKENS, BYTES)
            await asyncio.sleep(0)
        await demand.close()
        demand.traffic.chance(prompt, time.time(), 60.0)  # makes the next one, if the first took that long to fail
    assert estimates > 1
    assert [(entry["log_level"], entry["event"]) for entry in logs] == [("error", "reuse not estimated")]


async def test_counts_are_kept_and_published_as_time_goes_by(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kvstore.demand, "KEEP_EVERY_SECONDS", 0.01)
    monkeypatch.setattr(kvstore.demand, "REPORT_SECONDS", 0.01)
    published: list[list[BlockKey]] = []
    failures = [TierUnavailable("away")]

    async def publish() -> None:
        if failures:
            raise failures.pop()
        published.append([hot.key for hot in demand.top(10)])

    prompt = chain(1, 2)
    demand = Demand(tmp_path / "hotness.msgpack")
    demand.publish = publish
    demand.observe(1, prompt, TOKENS, BYTES)
    demand.observe(2, prompt, TOKENS, BYTES)
    while not published:
        await asyncio.sleep(0.01)
    assert published[0] == [prompt[-1]]
    while not (tmp_path / "hotness.msgpack").exists():
        await asyncio.sleep(0.01)
    await demand.close()


async def test_what_was_learnt_and_pins_stay_over_a_restart(tmp_path: Path) -> None:
    prompt, now = chain(1, 3), time.time()
    demand = Demand(tmp_path / "hotness.msgpack")
    for client in range(3):
        demand.observe(client, prompt, TOKENS, BYTES)
    demand.pins.pin(prompt[:2], now + 600, now)
    await demand.close()
    again = Demand(tmp_path / "hotness.msgpack")
    assert again.traffic.sightings(prompt).tolist() == [3, 3, 3]
    assert again.pins.hold(prompt, now) == [True, True, False]
    await again.close()


@pytest.mark.parametrize("name", ["hotness", "traffic", "pins"])
@pytest.mark.parametrize("content", [b"", b"\xc1", b"\x80", b"x" * 1000])
async def test_an_unreadable_file_costs_what_it_kept_and_nothing_else(
    tmp_path: Path, name: str, content: bytes
) -> None:
    (tmp_path / f"{name}.msgpack").write_bytes(content)
    demand = Demand(tmp_path / "hotness.msgpack")
    assert demand.top(10) == []
    demand.observe(1, chain(1, 2), TOKENS, BYTES)
    demand.pins.pin(chain(1, 2), time.time() + 60, time.time())
    await demand.close()
    again = Demand(tmp_path / "hotness.msgpack")
    assert again.traffic.sightings(chain(1, 2)).tolist() == [1, 1]
    assert len(again.pins) == 2
    await again.close()
