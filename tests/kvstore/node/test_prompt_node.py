"""What a node makes of prompts that connectors describe."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvstore.errors import ProtocolError
from kvstore.identity import NO_PARENT, Namespace, chain_digests
from kvstore.node.api import About, Description
from kvstore.node.promptverbs import MOST_PROMPTS
from kvstore.policy.content import pieces
from kvstore.testing.node import PatientClient, RunningNode

NAMESPACE = Namespace(
    model="toy", weights="1", dtype="float32", layers=2, kv_heads=2, head_dim=8, attention="gqa", rope="",
    block_tokens=16, layout="opaque:test",
)  # fmt: skip


@pytest.fixture
def client(tmp_path: Path) -> Iterator[PatientClient]:
    with RunningNode(tmp_path, "disk.enabled=false") as node, PatientClient(node.socket) as client:
        client.open_namespace(NAMESPACE, 10_000)
        yield client


def text(seed: object, tokens: int) -> list[int]:
    source = random.Random(str(seed))
    return [source.randrange(1 << 20) for _ in range(tokens)]


def describe(client: PatientClient, name: str, tokens: list[int], preview: int = 0) -> None:
    cut = pieces(tokens, b"secret")
    tail = tuple(tokens[-preview:]) if preview else ()
    description = Description(len(tokens), cut.starts.tobytes(), cut.hashes.tobytes(), tuple(tokens[:preview]), tail)
    client.describe(About(name), description)


def test_a_date_at_the_beginning_is_found_in_traffic(client: PatientClient) -> None:
    system, manual = text("system", 200), text("manual", 2000)
    for day in range(4):
        describe(client, f"request-{day}", system + text(day, 12) + manual)
    report = client.call("breakers")
    (breaker,) = report["breakers"]
    assert report["prompts"] == 4
    assert breaker["prompts"] == 3
    assert breaker["shareable"] > 3 * 1700
    assert breaker["token"] <= 200
    assert breaker["examples"][0]["later"].startswith("request-")


def test_prompts_of_other_namespaces_and_adapters_are_not_compared(client: PatientClient) -> None:
    manual = text("manual", 2000)
    for name in ("a", "b"):
        cut = pieces(text(name, 50) + manual, b"secret")
        description = Description(cut.tokens, cut.starts.tobytes(), cut.hashes.tobytes())
        client.describe(About(name, seed=name.encode() * 32), description)
    assert client.call("breakers")["breakers"] == []


def test_only_so_many_prompts_are_remembered(client: PatientClient) -> None:
    for number in range(MOST_PROMPTS + 5):
        describe(client, str(number), text(number % 3, 20))
    assert client.call("breakers")["prompts"] == MOST_PROMPTS


def test_previews_of_prompts_that_a_block_is_in(client: PatientClient) -> None:
    keyring = client.open_namespace(NAMESPACE, 10_000)
    system = text("system", 32)
    keys = {}
    for name in ("one", "two"):
        tokens = system + text(name, 32)
        keys[name] = keyring.block_keys(chain_digests(tokens, NAMESPACE.block_tokens))
        client.lookup(keys[name], about=About(name))
        describe(client, name, tokens, preview=4)
    shared, last, unknown = keys["one"][1], keys["one"][-1], NO_PARENT
    previews = client.call("previews", keys=shared + last + unknown)
    assert previews == [[system[:4], []], [system[:4], text("one", 32)[-4:]], None]


GOOD: dict[str, Any] = {
    "request": "r",
    "tokens": 40,
    "starts": b"\0\0\0\0",
    "hashes": bytes(8),
    "head": [1],
    "tail": [],
}


@pytest.mark.parametrize(
    "wrong",
    [
        {"request": 7},
        {"tokens": -1},
        {"tokens": 0},
        {"starts": b"\1\0\0\0"},
        {"starts": bytes(8), "hashes": bytes(16)},
        {"starts": b"\0\0\0\0\x28\0\0\0", "hashes": bytes(16)},
        {"starts": b"\0\0\0"},
        {"hashes": bytes(16)},
        {"hashes": "text"},
        {"head": [1] * 257},
        {"head": [-1]},
        {"tail": ["a"]},
        {"tail": b"a"},
        {"seed": bytes(33)},
    ],
)
def test_what_is_no_description_is_refused(client: PatientClient, wrong: dict[str, Any]) -> None:
    client.call("describe", **GOOD)
    with pytest.raises(ProtocolError):
        client.call("describe", **{**GOOD, **wrong})
    assert client.call("breakers")["prompts"] == 1
