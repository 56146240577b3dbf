"""The frame protocol against hostile bytes."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import msgpack
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvstore.errors import ProtocolError
from kvstore.identity import BlockKey
from kvstore.node.protocol import MAX_FRAME_BYTES, FrameDecoder, encode, join_keys, split_keys
from kvstore.testing.node import PatientClient, RunningNode

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False) | st.text(max_size=20)
    | st.binary(max_size=40),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=10,
)  # fmt: skip
VERBS = [
    "lookup",
    "acquire",
    "release",
    "reserve",
    "commit",
    "abort",
    "open_namespace",
    "status",
    "list",
    "inspect",
    "verify",
]
ARGUMENTS = ["keys", "start", "timeout", "namespace", "parents", "indices", "part", "parts", "durable", "fields",
             "block_bytes", "medium", "limit", "cursor", "prefix", "key"]  # fmt: skip
REQUESTS = st.tuples(
    st.integers(0, 2**32),
    st.sampled_from(VERBS) | st.text(max_size=8),
    st.dictionaries(st.sampled_from(ARGUMENTS), PLAIN),
)


@given(st.lists(PLAIN, max_size=5), st.integers(1, 50))
def test_messages_survive_any_cutting(messages: list[object], step: int) -> None:
    stream = b"".join(encode(message) for message in messages)
    decoder = FrameDecoder()
    received = [m for i in range(0, len(stream), step) for m in decoder.feed(stream[i : i + step])]
    assert received == messages


@given(st.binary(max_size=200))
def test_any_bytes_are_messages_or_refused(data: bytes) -> None:
    try:
        list(FrameDecoder().feed(data))
    except ProtocolError:
        pass


def test_a_frame_beyond_the_bound_is_refused_on_both_sides() -> None:
    with pytest.raises(ProtocolError, match="beyond the bound"):
        encode(b"x" * MAX_FRAME_BYTES)
    with pytest.raises(ProtocolError, match="beyond the bound"):
        list(FrameDecoder().feed((MAX_FRAME_BYTES + 1).to_bytes(4, "little")))


@pytest.mark.parametrize("bomb", [b"\x91" * 100_000, b"\xdd\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff"])
def test_msgpack_bombs_are_refused(bomb: bytes) -> None:
    with pytest.raises(ProtocolError):
        list(FrameDecoder().feed(len(bomb).to_bytes(4, "little") + bomb))


@given(st.lists(st.binary(min_size=16, max_size=16).map(BlockKey), max_size=20))
def test_keys_survive_joining(keys: list[BlockKey]) -> None:
    assert split_keys(join_keys(keys)) == keys


@pytest.mark.parametrize("joined", [b"x", None, "k" * 16, 16, [b"k" * 16]])
def test_what_is_no_keys_is_refused(joined: object) -> None:
    with pytest.raises(ProtocolError):
        split_keys(joined)


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningNode]:
    with RunningNode(tmp_path_factory.mktemp("node"), "disk.enabled=false") as running:
        yield running


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(REQUESTS, min_size=1, max_size=5), st.binary(max_size=30))
def test_a_hostile_client_harms_only_itself(node: RunningNode, requests: list[tuple[object, ...]], tail: bytes) -> None:
    with socket.socket(socket.AF_UNIX) as hostile:
        hostile.settimeout(60)
        hostile.connect(str(node.socket))
        hostile.sendall(encode({"protocol": 1, "name": "hostile", "pid": 1}))
        assert hostile.recv(4096)
        for request in requests:
            hostile.sendall(encode(list(request)))
        hostile.sendall(tail)
        hostile.shutdown(socket.SHUT_WR)
        while hostile.recv(65536):
            pass
    with PatientClient(node.socket) as client:
        assert client.call("status")["tiers"][0]["medium"] == "host"


def test_answers_are_plain_msgpack(node: RunningNode) -> None:
    with PatientClient(node.socket) as client:
        msgpack.packb(client.call("status"))
