"""Explaining and pinning over the socket, with blocks that really were refused, evicted or deleted."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvstore.errors import BlockNotFound, ProtocolError
from kvstore.identity import NO_PARENT, BlockKey, Keyring, Namespace, chain_digests, chain_seed
from kvstore.node.api import About, NewBlock, Report
from kvstore.node.protocol import join_keys
from kvstore.testing.node import PatientClient, RunningNode
from kvstore.tiers.base import Medium

BLOCK_BYTES = 250_000
NAMESPACE = Namespace(
    model="toy", weights="1", dtype="float32", layers=2, kv_heads=2, head_dim=8, attention="gqa", rope="",
    block_tokens=16, layout="opaque:test",
)  # fmt: skip


@pytest.fixture
def node(tmp_path: Path) -> Iterator[RunningNode]:
    with RunningNode(tmp_path, "disk.enabled=false") as running:
        yield running


@pytest.fixture
def client(node: RunningNode) -> Iterator[PatientClient]:
    with PatientClient(node.socket, name="an engine") as client:
        yield client


def prompt(seed: int, blocks: int, size: int = 16) -> list[int]:
    return list(range(seed * 1000, seed * 1000 + blocks * size))


def keys_of(
    keyring: Keyring, tokens: Sequence[int], namespace: Namespace = NAMESPACE, seed: bytes = b""
) -> list[BlockKey]:
    return keyring.block_keys(chain_digests(tokens, namespace.block_tokens, seed))


def save(
    client: PatientClient, keys: Sequence[BlockKey], namespace: Namespace = NAMESPACE, durable: Medium = Medium.HOST
) -> None:
    blocks = [NewBlock(key, keys[at - 1] if at else NO_PARENT, at) for at, key in enumerate(keys)]
    reserved = client.reserve(namespace, blocks)
    client.commit(
        [key for key, offset in zip(keys, reserved.offsets, strict=True) if offset is not None], durable=durable
    )


def crowd_out(client: PatientClient, keyring: Keyring, victim: BlockKey) -> BlockKey:
    """Save one block after the other until host memory gives the victim up; the last one saved."""
    for number in range(100, 200):
        (newcomer,) = keys_of(keyring, prompt(number, 1))
        client.lookup([newcomer], about=About(f"request-{number}"))
        save(client, [newcomer])
        if "host" not in client.call("inspect", key=victim)["media"]:
            return newcomer
    raise AssertionError("the arena holds everything")


def packed(tokens: Sequence[int]) -> bytes:
    return np.array(tokens, dtype="<u4").tobytes()


def explain(client: PatientClient, **arguments: Any) -> Any:
    return client.call("explain", **arguments)


def reasons(document: Any) -> list[str]:
    return [block["why"] for block in document["blocks"]]


def test_a_prompt_by_its_tokens(client: PatientClient) -> None:
    keyring = client.open_namespace(NAMESPACE, BLOCK_BYTES)
    tokens = prompt(1, 4)
    keys = keys_of(keyring, tokens)
    save(client, keys[:2])
    document = explain(client, tokens=packed(tokens), namespace=NAMESPACE.digest)
    assert [block["key"] for block in document["blocks"]] == keys
    assert reasons(document) == ["held", "held", "never_stored", "never_stored"]
    assert [block["where"] for block in document["blocks"]] == [["host"], ["host"], [], []]
    assert document["usable_blocks"] == 2
    assert document["fields"]["model"] == "toy"
    client.call("delete", keys=join_keys(keys[1:2]))
    client.call("evict", keys=join_keys(keys[:1]), medium="host")
    assert reasons(explain(client, tokens=packed(tokens), namespace=NAMESPACE.digest))[:2] == ["deleted", "deleted"]


def test_an_evicted_block_names_the_block_that_took_its_place(client: PatientClient) -> None:
    keyring = client.open_namespace(NAMESPACE, BLOCK_BYTES)
    first = keys_of(keyring, prompt(1, 1))
    save(client, first)
    client.lookup(first)
    newcomer = crowd_out(client, keyring, first[0])
    (block,) = explain(client, tokens=packed(prompt(1, 1)), namespace=NAMESPACE.digest)["blocks"]
    assert block["why"] == "evicted"
    assert block["causes"][0]["tier"] == "host"
    assert newcomer.startswith(block["causes"][0]["newcomer"])
    assert newcomer.hex()[:16] in block["detail"]
    assert "of request request-1" in block["detail"], "whose block it is, for the node remembers the request"
    assert block["hits"] > 0, "it was asked for"


def test_a_request_by_its_id_is_judged_as_of_then(client: PatientClient) -> None:
    keyring = client.open_namespace(NAMESPACE, BLOCK_BYTES)
    keys = keys_of(keyring, prompt(1, 3))
    save(client, keys[:1])
    client.lookup(keys, about=About("cmpl-17-0-8c41"))
    save(client, keys[1:])
    document = explain(client, request="cmpl-17")
    assert document["request"] == "cmpl-17-0-8c41"
    assert document["client"] == "an engine"
    assert document["found"] == [0, 1]
    assert reasons(document) == ["held", "never_stored", "never_stored"]
    assert [block["where"] for block in document["blocks"]] == [["host"]] * 3, "the request itself saved them"
    with pytest.raises(BlockNotFound, match="'cmpl-18'"):
        explain(client, request="cmpl-18")


def test_a_load_that_failed_is_told_apart_from_a_miss(tmp_path: Path) -> None:
    with RunningNode(tmp_path) as node, PatientClient(node.socket) as client:
        keyring = client.open_namespace(NAMESPACE, BLOCK_BYTES)
        keys = keys_of(keyring, prompt(1, 2))
        save(client, keys, durable=Medium.DISK)
        client.call("evict", keys=join_keys(keys), medium="host")
        client.lookup(keys, about=About("late"))
        assert client.acquire(keys, 0.0).offsets == ()
        assert reasons(explain(client, request="late")) == ["deadline", "deadline"]


def test_what_admission_refused_names_the_rule(tmp_path: Path) -> None:
    overrides = [f"object.url=file://{tmp_path}/bucket", "disk.enabled=false", "policy.admission=enforce"]
    with RunningNode(tmp_path, *overrides) as node, PatientClient(node.socket) as client:
        keyring = client.open_namespace(NAMESPACE, BLOCK_BYTES)
        keys = keys_of(keyring, prompt(1, 1))
        client.lookup(keys, about=About("first"))
        save(client, keys)
        crowd_out(client, keyring, keys[0])
        (block,) = explain(client, tokens=packed(prompt(1, 1)), namespace=NAMESPACE.digest)["blocks"]
        assert block["why"] == "not_admitted"
        assert (block["causes"][0]["tier"], block["causes"][0]["rule"]) == ("object", "seen_once")


@pytest.mark.parametrize("mode", ["enforce", "observe"])
def test_what_the_planner_preferred_to_compute_has_both_estimates(tmp_path: Path, mode: str) -> None:
    with (
        RunningNode(tmp_path, "disk.enabled=false", f"policy.planner={mode}") as node,
        PatientClient(node.socket) as client,
    ):
        keyring = client.open_namespace(NAMESPACE, BLOCK_BYTES)
        keys = keys_of(keyring, prompt(1, 8))
        save(client, keys)
        steps = [(tokens, tokens * tokens / 2, tokens * 1e-6) for tokens in range(64, 2048, 64)]
        client.report(Report(steps=steps, loads=[(count * BLOCK_BYTES, count * 1.0) for count in range(1, 40)]))
        client.lookup(keys, about=About("slow"), waiting=0)
        document = explain(client, request="slow")
        if mode == "observe":
            assert set(reasons(document)) == {"held"}, "it was told to load"
            return
        assert set(reasons(document)) == {"recompute_preferred"}
        load, compute = document["blocks"][0]["causes"][0]["estimates"]
        assert load > compute > 0


OTHERS = [
    ("dtype", replace(NAMESPACE, dtype="bfloat16")),
    ("weights", replace(NAMESPACE, weights="2")),
    ("block_tokens", replace(NAMESPACE, block_tokens=32)),
    ("rope", replace(NAMESPACE, rope="rope_theta=500000.0")),
    ("layout", replace(NAMESPACE, layout="canonical:kv_head_token_layer")),
]


@pytest.mark.parametrize(("field", "other"), OTHERS)
def test_a_prompt_that_is_stored_in_another_namespace_names_the_field(
    client: PatientClient, field: str, other: Namespace
) -> None:
    tokens = prompt(1, 4)
    save(client, keys_of(client.open_namespace(other, BLOCK_BYTES), tokens, other), other)
    client.open_namespace(NAMESPACE, BLOCK_BYTES)
    document = explain(client, tokens=packed([*tokens, *prompt(2, 1)]), namespace=NAMESPACE.digest)
    (elsewhere,) = document["elsewhere"]
    assert elsewhere["namespace"] == other.digest
    assert elsewhere["tokens"] == len(tokens)
    assert elsewhere["differs"] == {field: [getattr(NAMESPACE, field), getattr(other, field)]}
    assert reasons(document) == ["other_namespace"] * 4 + ["never_stored"]


def test_a_prompt_that_is_stored_for_an_adapter_says_so(client: PatientClient) -> None:
    keyring = client.open_namespace(NAMESPACE, BLOCK_BYTES)
    tokens, seed = prompt(1, 2), chain_seed(lora="d1gest")
    keys = keys_of(keyring, tokens, seed=seed)
    client.lookup(keys, about=About("r", seed, "d1gest"))
    save(client, keys)
    plain = explain(client, tokens=packed(tokens), namespace=NAMESPACE.digest)
    assert plain["elsewhere"][0]["differs"] == {"lora": ["", "d1gest"]}
    assert reasons(plain) == ["other_namespace"] * 2
    with_adapter = explain(client, tokens=packed(tokens), namespace=NAMESPACE.digest, lora="d1gest")
    assert reasons(with_adapter) == ["held", "held"]


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"tokens": b"123", "namespace": NAMESPACE.digest},
        {"tokens": b"1234", "namespace": bytes(16)},
        {"tokens": b"1234"},
        {"request": 7},
        {"request": "x" * 129},
        {"key": b"short"},
        {"tokens": b"1234", "namespace": NAMESPACE.digest, "lora": "x" * 1000},
    ],
)
def test_what_names_no_chain_is_refused(client: PatientClient, arguments: dict[str, Any]) -> None:
    client.open_namespace(NAMESPACE, BLOCK_BYTES)
    with pytest.raises(ProtocolError):
        explain(client, **arguments)


def test_a_pinned_chain_outlives_traffic_and_a_restart(tmp_path: Path) -> None:
    with RunningNode(tmp_path, "disk.enabled=false") as node, PatientClient(node.socket) as client:
        keyring = client.open_namespace(NAMESPACE, BLOCK_BYTES)
        kept = keys_of(keyring, prompt(1, 3))
        save(client, kept)
        pinned = client.call("pin", key=kept[-1], seconds=600)
        assert (pinned["pinned"], pinned["held"]) == (3, {"host": 3})
        for number in range(2, 40):
            save(client, keys_of(keyring, prompt(number, 1)))
        assert client.lookup(kept).blocks == 3, "a pinned chain is given up last"
        document = explain(client, key=kept[-1])
        assert [block["pinned_until"] for block in document["blocks"]] == [pytest.approx(time.time() + 600, abs=60)] * 3
    with RunningNode(tmp_path, "disk.enabled=false") as node, PatientClient(node.socket) as client:
        client.open_namespace(NAMESPACE, BLOCK_BYTES)
        (pin,) = client.call("pins")["pins"]
        assert (pin["blocks"], pin["key"]) == (3, kept[-1])
        assert pin["until"] == pytest.approx(pinned["until"])
        tokens = packed(prompt(1, 3))
        assert client.call("unpin", tokens=tokens, namespace=NAMESPACE.digest) == {"unpinned": 3}
        assert client.call("pins")["pins"] == []


def test_pins_are_soft_and_have_an_end(client: PatientClient) -> None:
    keyring = client.open_namespace(NAMESPACE, BLOCK_BYTES)
    for number in range(1, 40):  # more than fit: the tier gives up pinned blocks for want of others
        save(client, keys_of(keyring, prompt(number, 1)))
        client.call("pin", tokens=packed(prompt(number, 1)), namespace=NAMESPACE.digest, seconds=60)
    newest = keys_of(keyring, prompt(50, 1))
    save(client, newest)
    assert client.lookup(newest).blocks == 1
    for seconds in (0, -1, 25 * 3600, "long", None):
        with pytest.raises(ProtocolError, match="seconds"):
            client.call("pin", key=newest[0], seconds=seconds)


def test_a_chain_is_found_from_its_last_block(client: PatientClient) -> None:
    keyring = client.open_namespace(NAMESPACE, BLOCK_BYTES)
    keys = keys_of(keyring, prompt(1, 4))
    save(client, keys)
    assert [block["key"] for block in explain(client, key=keys[2])["blocks"]] == keys[:3]
    with pytest.raises(BlockNotFound):
        explain(client, key=BlockKey(b"?" * 16))


def test_the_node_answers_engines_while_it_explains(node: RunningNode) -> None:
    """A long prompt is hashed in a thread."""

    async def both() -> None:
        with PatientClient(node.socket) as client:
            keyring = client.open_namespace(NAMESPACE, BLOCK_BYTES)
            tokens = packed(range(1 << 18))
            work = asyncio.create_task(asyncio.to_thread(explain, client, tokens=tokens, namespace=NAMESPACE.digest))
            keys = keys_of(keyring, prompt(1, 1))
            assert (await asyncio.to_thread(client.lookup, keys, 0, 5.0)).blocks == 0
            document = await work
            assert len(document["blocks"]) == 4096
            assert document["chain_blocks"] == (1 << 18) // 16

    asyncio.run(both())
