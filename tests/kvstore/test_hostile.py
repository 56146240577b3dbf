"""Hostile input from every side that a node has: nothing crashes, hangs, or is believed."""

from __future__ import annotations

import random
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.config import load
from kvstore.errors import ConfigError, KVStoreError, NodeUnavailable
from kvstore.identity import NO_PARENT, BlockKey, Namespace
from kvstore.node.api import NewBlock
from kvstore.node.protocol import MAX_FRAME_BYTES, encode
from kvstore.testing.node import PatientClient, RunningNode
from kvstore.tiers.base import Medium

BLOCK_BYTES = 10_000
NAMESPACE = Namespace(
    model="m", weights="1", dtype="float32", layers=1, kv_heads=1, head_dim=1, attention="gqa", rope="",
    block_tokens=16, layout="opaque:test",
)  # fmt: skip
KEYS = [BlockKey(bytes([number]) * 16) for number in range(1, 6)]

ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 63), (1 << 64) - 1) | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
PLAUSIBLE = (
    ANYTHING
    | st.sampled_from([b"".join(KEYS), KEYS[0], KEYS[0][:5], NAMESPACE.digest, bytes(16), "host", "disk", "object"])
    | st.integers(-2, 5)
    | st.lists(st.integers(-1, 1 << 33), max_size=6)
    | st.just(NAMESPACE.to_dict())
)
ARGUMENTS = [
    *(
        "keys",
        "key",
        "namespace",
        "fields",
        "block_bytes",
        "start",
        "timeout",
        "part",
        "parts",
        "parents",
        "indices",
        "durable",
    ),
    *(
        "medium",
        "prefix",
        "limit",
        "cursor",
        "request",
        "tokens",
        "text",
        "seed",
        "lora",
        "until",
        "seconds",
        "mode",
        "count",
    ),
    *("waiting", "about", "steps", "loads", "answers", "prompts", "chain"),
]


def save(client: PatientClient) -> None:
    client.open_namespace(NAMESPACE, BLOCK_BYTES)
    blocks = [
        NewBlock(key, parent, index) for index, (key, parent) in enumerate(zip(KEYS, [NO_PARENT, *KEYS], strict=False))
    ]
    reserved = client.reserve(NAMESPACE, blocks)
    for index, offset in enumerate(reserved.offsets):
        if offset is not None:
            reserved.arena.slot(offset, BLOCK_BYTES)[:] = bytes([index + 1]) * BLOCK_BYTES
    client.commit(
        [key for key, offset in zip(KEYS, reserved.offsets, strict=True) if offset is not None], durable=Medium.DISK
    )


def payloads(client: PatientClient) -> list[int]:
    """The first byte of each block that is delivered; each must be wholly its own."""
    acquired = client.acquire(KEYS, 50)
    found = [bytes(acquired.arena.slot(offset, BLOCK_BYTES)) for offset in acquired.offsets]
    client.release(KEYS[: len(found)])
    assert all(payload == payload[:1] * BLOCK_BYTES for payload in found)
    return [payload[0] for payload in found]


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningNode]:
    with RunningNode(tmp_path_factory.mktemp("node")) as running:
        yield running


@pytest.fixture(scope="module")
def verbs(node: RunningNode) -> list[str]:
    return sorted(node.node._verbs.table.keys() - {"drain"})  # drain ends saving for everybody, by right


@settings(max_examples=400)
@given(data=st.data())
def test_every_verb_answers_any_arguments_and_stays_true_to_others(
    node: RunningNode, verbs: list[str], data: Any
) -> None:
    verb = data.draw(st.sampled_from(verbs))
    arguments = data.draw(st.dictionaries(st.sampled_from(ARGUMENTS), PLAUSIBLE, max_size=6))
    with PatientClient(node.socket, name="hostile") as hostile:
        try:
            hostile.call(verb, 10.0, **arguments)
        except NodeUnavailable as error:
            pytest.fail(f"{verb}({arguments}) ended the connection: {error}")
        except (KVStoreError, OverflowError):
            pass
    with PatientClient(node.socket, name="bystander") as bystander:
        save(bystander)
        found = payloads(bystander)
        assert found == list(range(1, 1 + len(found)))


@pytest.mark.parametrize(
    "frames",
    [
        b"\xff\xff\xff\xff",
        (MAX_FRAME_BYTES + 1).to_bytes(4, "little"),
        b"\x05\x00\x00\x00\xdd\xff\xff\xff\xff",  # an array of four billion
        b"\x05\x00\x00\x00\xc6\xff\xff\xff\xff",  # four gigabytes of bytes
        b"\x00\x20\x00\x00" + b"\x91" * 0x2000,  # nested 8,192 deep
        encode({"protocol": 999, "pid": 1}),
        encode({"protocol": 1, "pid": "x"}),
        encode([1, "status", {}]),
        b"GET / HTTP/1.1\r\n\r\n",
    ],
)
def test_a_peer_that_speaks_something_else_is_hung_up_on(node: RunningNode, frames: bytes) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as peer:
        peer.settimeout(60)
        peer.connect(str(node.socket))
        peer.sendall(frames)
        peer.shutdown(socket.SHUT_WR)
        while peer.recv(1 << 16):
            pass
    with PatientClient(node.socket, name="bystander") as bystander:
        assert bystander.call("status")["pid"]


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a node leaves on disk."""
    directory = tmp_path_factory.mktemp("filled")
    with RunningNode(directory) as running, PatientClient(running.socket) as client:
        save(client)
        client.lookup(KEYS)
    return directory


@pytest.mark.parametrize("seed", range(12))
def test_whatever_happened_to_its_files_a_node_starts_and_delivers_nothing_wrong(filled: Path, seed: int) -> None:
    source = random.Random(seed)
    with tempfile.TemporaryDirectory(prefix="kvh-") as name:
        directory = Path(name) / "n"
        shutil.copytree(filled, directory)
        files = sorted(path for path in directory.rglob("*") if path.is_file() and path.name != "format.json")
        for path in source.sample(files, k=min(len(files), source.randint(1, 4))):
            damage(path, source)
        with RunningNode(directory) as running, PatientClient(running.socket) as client:
            client.open_namespace(NAMESPACE, BLOCK_BYTES)
            found = payloads(client)
            assert found == list(range(1, 1 + len(found)))
            save(client)
            assert payloads(client) == [1, 2, 3, 4, 5], "what was damaged heals by saving it again"


def test_a_disk_whose_format_cannot_be_told_is_left_alone(filled: Path, tmp_path: Path) -> None:
    shutil.copytree(filled, tmp_path / "n")
    (tmp_path / "n" / "disk" / "format.json").write_text("?")
    with pytest.raises(ConfigError, match=r"disk\.directory"):
        RunningNode(tmp_path / "n")


def damage(path: Path, source: random.Random) -> None:
    size = path.stat().st_size
    match source.choice(["truncate", "flip", "zero", "random", "grow"]):
        case "truncate":
            with open(path, "r+b") as file:
                file.truncate(source.randint(0, size))
        case "flip":
            if size:
                with open(path, "r+b") as file:
                    for _ in range(source.randint(1, 20)):
                        place = source.randrange(min(size, 1 << 16))
                        file.seek(place)
                        byte = file.read(1)
                        file.seek(place)
                        file.write(bytes([byte[0] ^ (1 << source.randrange(8))]))
        case "zero":
            with open(path, "r+b") as file:
                file.write(bytes(min(size, 8192)))
        case "random":
            path.write_bytes(source.randbytes(min(size, 1 << 16)))
        case "grow":
            with open(path, "ab") as file:
                file.write(source.randbytes(5000))


@settings(max_examples=200)
@given(
    text=st.text(max_size=200)
    | st.from_regex(r"(\[[a-z]{1,9}\]\n([a-z_]{1,12} = .{0,20}\n){0,3}){0,3}", fullmatch=True)
)
def test_any_file_is_a_configuration_or_is_refused_by_name(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    file = tmp_path_factory.getbasetemp() / "any.toml"
    file.write_text(text, encoding="utf-8", errors="surrogatepass")
    try:
        load(file, [], environ={})
    except ConfigError as error:
        if not error.remedy:
            pytest.fail(f"no remedy: {error}")
