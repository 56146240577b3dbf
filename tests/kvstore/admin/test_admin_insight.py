"""Trees of prompts, and where prompts part."""

from __future__ import annotations

import random
from itertools import pairwise

from api_site import BLOCKS, NAMESPACE, TOKENS, Site, save_chain
from hypothesis import given
from hypothesis import strategies as st

from kvstore.admin.tree import Segment, grow
from kvstore.node.api import About, Description
from kvstore.policy.content import pieces
from kvstore.testing.node import PatientClient

chains = st.dictionaries(
    st.text("abcdef", min_size=1, max_size=3),
    st.lists(st.sampled_from([bytes([n]) for n in range(3)]), max_size=6),
    max_size=8,
)


def paths(segment: Segment, before: tuple[bytes, ...] = ()) -> dict[str, tuple[bytes, ...]]:
    """Every chain that ends in or below a segment."""
    here = (*before, *segment.keys)
    found = dict.fromkeys(segment.ends, here)
    for child in segment.children:
        found |= paths(child, here)
    return found


@given(chains)
def test_a_tree_has_every_chain_once_and_parts_only_where_they_do(chains: dict[str, list[bytes]]) -> None:
    roots = grow(chains)
    found: dict[str, tuple[bytes, ...]] = {}
    for root in roots:
        assert not found.keys() & paths(root).keys()
        found |= paths(root)
    assert found == {name: tuple(keys) for name, keys in chains.items() if keys}
    level = roots
    while level:
        for segment in level:
            assert segment.end - segment.start == len(segment.keys) > 0
            assert sorted(segment.through) == sorted(paths(segment))
            assert segment.ends or len(segment.children) > 1, "a segment that need not end here"
            assert all(len(one.through) >= len(other.through) for one, other in pairwise(segment.children))
        level = [child for segment in level for child in segment.children]


def test_the_tree_of_a_prompt_shows_hot_prompts_that_begin_alike(own_api: Site) -> None:
    other = [*TOKENS[: 16 * 3], *range(900, 900 + 16 * 2)]
    keys, others = own_api.keys, save_chain(own_api.node.socket, other)
    for name in ("one", "two"):
        with PatientClient(own_api.node.socket, name=name) as client:
            client.open_namespace(NAMESPACE, 10_000)
            client.lookup(keys, timeout=30.0, about=About(f"{name}-a"))
            client.lookup(others, timeout=30.0, about=About(f"{name}-b"))
    found = own_api.post("/v1/tree", {"key": keys[-1].hex()})
    root = found["root"]
    assert (found["blocks"], found["compared"]) == (BLOCKS, 2), "the other one, and what both have"
    assert (root["start"], root["end"], root["prompts"], root["asked"]) == (0, 3, 3, True)
    assert root["ends"] == [keys[2].hex()]
    assert root["held"] == {"host": 3, "disk": 3}
    by_asked = {child["asked"]: child for child in root["children"]}
    assert by_asked[True]["ends"] == [keys[-1].hex()]
    assert by_asked[False]["ends"] == [others[-1].hex()]
    assert own_api.http.post("/v1/tree", json={"request": "nobody"}).status_code == 404


def test_where_prompts_part_is_reported(own_api: Site) -> None:
    assert own_api.get("/v1/breakers")["breakers"] == []
    source = random.Random(1)
    same = [source.randrange(1000) for _ in range(4000)]
    with PatientClient(own_api.node.socket, name="engine") as client:
        client.open_namespace(NAMESPACE, 10_000)
        for day in range(3):
            prompt = [*same[:64], *[source.randrange(1000) for _ in range(32)], *same[64:]]
            cut = pieces(prompt, b"")
            described = Description(len(prompt), cut.starts.tobytes(), cut.hashes.tobytes(), (), ())
            client.describe(About(f"request-{day}"), described, 30.0)
    own_api.api.site.node.breakers.forget()  # type: ignore[union-attr]
    report = own_api.get("/v1/breakers")
    assert report["prompts"] == 3
    assert report["breakers"][0]["shareable"] > 2000
