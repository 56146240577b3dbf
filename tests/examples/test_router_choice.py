"""Where the example router sends a request, as a table: the real thing is in ``tests/e2e/test_router_engines.py``."""

from __future__ import annotations

import argparse
from collections.abc import Mapping

import httpx
import numpy as np
import pytest

from examples.router import Asking, Engine, Router, Tiers, Tokens, choose, pair

SPEED = 10_000.0
ONE, TWO = "http://one", "http://two"


def tier(usable_tokens: int, seconds: float = 0.0) -> dict[str, float]:
    return {"usable_tokens": usable_tokens, "seconds": seconds}


@pytest.mark.parametrize(
    ("held", "waiting", "first", "compute"),
    [
        ({}, (0, 0), ONE, 8000),
        ({}, (1, 0), TWO, 8000),
        ({ONE: [tier(640)], TWO: [tier(6400)]}, (0, 0), TWO, 1600),
        ({TWO: [tier(8000)]}, (0, 0), TWO, 1),
        # prefill of what waits there takes longer than prefill of it all elsewhere
        ({TWO: [tier(6400)]}, (0, 9000), ONE, 8000),
        ({TWO: [tier(6400)]}, (0, 6000), TWO, 1600),
        # what is slow to load is computed
        ({TWO: [tier(6400, seconds=0.7)]}, (0, 0), ONE, 8000),
        ({ONE: [tier(640), tier(6400, seconds=0.3)], TWO: [tier(6400, seconds=0.2)]}, (0, 0), TWO, 1600),
        ({ONE: [tier(3200), tier(6400, seconds=0.4)]}, (0, 0), ONE, 4800),
    ],
)
def test_the_engine_that_is_ready_first(
    held: dict[str, list[dict[str, float]]], waiting: tuple[int, int], first: str, compute: int
) -> None:
    engines = [Engine(ONE, ONE, tokens=waiting[0]), Engine(TWO, TWO, tokens=waiting[1])]
    choices = choose(engines, 8000, held, SPEED)
    assert (choices[0].engine.url, choices[0].compute) == (first, compute)
    assert {choice.engine.url for choice in choices} == {ONE, TWO}, "the other one is the way out"


def test_of_a_prompt_of_which_nothing_is_known_the_engine_with_fewest_requests() -> None:
    engines = [Engine(ONE, ONE, requests=2), Engine(TWO, TWO, requests=1)]
    assert choose(engines, 0, {}, SPEED)[0].engine.url == TWO


@pytest.mark.parametrize(
    "body", ["", "[]", "{}", '{"prompt": [-1]}', '{"prompt": [4294967296]}', '{"prompt": [1, "2"]}']
)
async def test_what_is_no_prompt_is_for_an_engine_to_refuse(body: str) -> None:
    async def held(model: str, tokens: Tokens, salt: str) -> Mapping[str, Tiers]:
        raise AssertionError("nothing to ask for")

    nobody = httpx.AsyncClient(transport=httpx.MockTransport(lambda _: httpx.Response(404)))
    async with nobody as http:
        router = Router(http, [Engine(ONE, ONE, requests=1), Engine(TWO, TWO)], SPEED, 1.0, held)
        assert [choice.engine.url for choice in await router.order(body.encode(), {})] == [TWO, ONE]


async def test_a_node_under_another_name_than_an_engines_api_is_told_of_once(caplog: pytest.LogCaptureFixture) -> None:
    found = {"prompts": [{"nodes": [{"url": "http://vm-7:7070", "tiers": []}, {"url": ONE, "tiers": []}]}]}
    api = httpx.AsyncClient(transport=httpx.MockTransport(lambda _: httpx.Response(200, json=found)))
    async with api as http:
        asking = Asking(http, [ONE], 10.0)
        for _ in range(2):
            assert set(await asking("m", np.arange(3, dtype=np.uint32), "")) == {"http://vm-7:7070", ONE}
    assert [record.getMessage() for record in caplog.records if record.name == "router"] == [
        "a node calls itself http://vm-7:7070, which is the API of no --engine (http://one)"
    ]


def test_two_addresses_are_told_from_what_is_not() -> None:
    assert pair("http://a:1/=http://b:2/") == ("http://a:1", "http://b:2")
    assert pair("http://b:2=ipc:///run/events") == ("http://b:2", "ipc:///run/events")
    for text in ("http://a:1", "http://a:1=", "a:1=b:2", "=http://b:2"):
        with pytest.raises(argparse.ArgumentTypeError, match="two addresses"):
            pair(text)
