"""The requests that a node remembers."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from kvstore.identity import BlockKey
from kvstore.requests import MOST_SEEDS, Asked, RecentRequests


def keys(seed: object, count: int) -> list[BlockKey]:
    source = random.Random(str(seed))
    return [BlockKey(source.randbytes(16)) for _ in range(count)]


def asked(name: str, blocks: int = 1, at: float = 0.0) -> Asked:
    return Asked(name, "engine", b"n" * 16, b"".join(keys(name, blocks)), 0, 0, at)


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 12)), max_size=60))
def test_the_latest_requests_within_both_bounds_are_remembered(said: list[tuple[int, int]]) -> None:
    requests = RecentRequests(most_requests=4, most_blocks=10)
    latest: dict[str, int] = {}
    for number, blocks in said:
        requests.add(asked(f"r{number}", blocks))
        latest.pop(f"r{number}", None)
        if blocks <= 10:
            latest[f"r{number}"] = blocks
        while len(latest) > 4 or sum(latest.values()) > 10:
            del latest[next(iter(latest))]
    assert [one.request for one in requests] == list(reversed(latest))
    assert sum(one.blocks for one in requests) <= 10


def test_an_id_is_found_whole_or_by_its_beginning() -> None:
    requests = RecentRequests()
    for name in ("cmpl-1", "cmpl-1-0-aa", "cmpl-2-0-bb", "cmpl-2-1-cc"):
        requests.add(asked(name))
    found = {wanted: requests.find(wanted) for wanted in ("cmpl-1", "cmpl-2", "cmpl-2-0", "cmpl-3")}
    assert {wanted: one and one.request for wanted, one in found.items()} == {
        "cmpl-1": "cmpl-1",
        "cmpl-2": "cmpl-2-1-cc",
        "cmpl-2-0": "cmpl-2-0-bb",
        "cmpl-3": None,
    }


def test_seeds_of_recent_chains_are_remembered_latest_last() -> None:
    requests = RecentRequests()
    for number in range(MOST_SEEDS + 10):
        requests.add(asked(str(number)), seed=number.to_bytes(32), lora="adapter")
    requests.add(asked("again"), seed=(50).to_bytes(32), lora="adapter")
    requests.add(asked("plain"))
    assert len(requests.seeds) == MOST_SEEDS
    assert next(reversed(requests.seeds)).seed == (50).to_bytes(32)


def test_whose_block_it_is() -> None:
    requests = RecentRequests()
    requests.add(asked("first", 3))
    requests.add(asked("second", 2))
    owners = requests.owners()
    requests.add(asked("later", 2))
    (mine, _, theirs), (unknown,) = (keys("first", 1)[0], None, keys("second", 2)[1]), keys("later", 1)
    assert owners([mine[:8], theirs[:8], unknown[:8]]) == {mine[:8]: "first", theirs[:8]: "second"}
    assert owners([]) == {}
