"""Telling the node what prompts consist of."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("vllm")

from connectors.link import Link
from connectors.vllm.describe import WAITING, Describer
from connectors.vllm.options import Options
from kvstore.errors import ConfigError, NodeUnavailable
from kvstore.identity import Namespace
from kvstore.policy.content import pieces
from kvstore.testing.inprocess import InProcessNode

NAMESPACE = Namespace(
    model="toy", weights="1", dtype="float32", layers=2, kv_heads=2, head_dim=8, attention="gqa", rope="",
    block_tokens=16, layout="opaque:test",
)  # fmt: skip
PROMPT = [(7 * k * k) % 997 for k in range(500)]


def request(name: str, **other: Any) -> SimpleNamespace:
    values = {
        "request_id": name, "prompt_token_ids": PROMPT, "prompt_embeds": None, "lora_request": None,
        "cache_salt": None, "mm_features": None,
    }  # fmt: skip
    return SimpleNamespace(**{**values, **other})


@pytest.fixture
def node() -> InProcessNode:
    return InProcessNode()


@pytest.fixture
def link(node: InProcessNode) -> Iterator[Link]:
    link = Link(node, NAMESPACE, 1000)
    while link.keyring is None:
        link._thread.join(0.01)
    yield link
    link.close()


def described(link: Link, node: InProcessNode, *requests: SimpleNamespace, **options: Any) -> set[str]:
    describer = Describer.make(link, Options(**options))
    assert describer is not None
    for one in requests:
        describer.tell(one)
    while not describer._waiting.empty():
        describer._thread.join(0.01)
    describer.close()
    return set(node.described)


def test_nothing_is_told_unless_asked_for(link: Link) -> None:
    assert Describer.make(link, Options()) is None


def test_content_and_preview_of_a_prompt(link: Link, node: InProcessNode) -> None:
    described(link, node, request("a"), content_fingerprints=True, preview_tokens=3)
    told = node.described["a"]
    assert (told.tokens, told.head, told.tail) == (500, tuple(PROMPT[:3]), tuple(PROMPT[-3:]))
    assert link.keyring is not None
    expected = pieces(PROMPT, link.keyring.secret)
    assert np.array_equal(np.frombuffer(told.starts, dtype="<u4"), expected.starts)
    assert np.array_equal(np.frombuffer(told.hashes, dtype="<u8"), expected.hashes)


def test_each_is_told_only_if_asked_for(link: Link, node: InProcessNode) -> None:
    described(link, node, request("hashes"), content_fingerprints=True)
    assert (node.described["hashes"].head, node.described["hashes"].tail) == ((), ())
    described(link, node, request("text"), preview_tokens=2)
    assert (node.described["text"].starts, node.described["text"].hashes) == (b"", b"")


def test_prompts_that_tokens_do_not_name_are_left_out(link: Link, node: InProcessNode) -> None:
    image = request("image", mm_features=[object()])
    embedded = request("embedded", prompt_embeds=object())
    assert described(link, node, image, embedded, request("text"), content_fingerprints=True) == {"text"}


def test_a_node_that_is_gone_costs_the_engine_nothing(
    link: Link, node: InProcessNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = threading.Event()

    def gone(*_: object, **__: object) -> None:
        asked.set()
        raise NodeUnavailable("gone")

    monkeypatch.setattr(node, "describe", gone)
    assert described(link, node, *(request(str(n)) for n in range(WAITING * 3)), content_fingerprints=True) == set()
    assert asked.is_set()


@pytest.mark.parametrize("tokens", [-1, 257])
def test_a_preview_has_a_bound(tokens: int) -> None:
    with pytest.raises(ConfigError, match="preview_tokens"):
        Options.parse({"preview_tokens": tokens})
