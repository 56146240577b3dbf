"""Lookups for routers over several nodes: real APIs, and peers that do not answer."""

from __future__ import annotations

import dataclasses
import socket
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from api_site import BLOCKS, NAMESPACE, TOKENS, save_chain

from kvstore.admin.auth import Role
from kvstore.admin.client import AdminClient
from kvstore.admin.models.prompts import Prompt
from kvstore.admin.tokens import TokenBook
from kvstore.catalog.documents import Document
from kvstore.catalog.presence import Presence, apis, present, this_host
from kvstore.config import load
from kvstore.errors import ConfigError
from kvstore.testing.admin import RunningApi
from kvstore.testing.node import RunningNode, wait_for
from kvstore.testing.servers import free_port

SHORT = 3
PROMPT = Prompt(namespace=NAMESPACE.model, tokens=TOKENS)


@contextmanager
def node_and_api(*overrides: str, blocks: int) -> Iterator[RunningApi]:
    """A node that holds the first ``blocks`` blocks of the prompt."""
    with tempfile.TemporaryDirectory(prefix="kvp-") as name, ExitStack() as stack:
        node = stack.enter_context(RunningNode(Path(name)))
        save_chain(node.socket, TOKENS[: blocks * NAMESPACE.block_tokens])
        yield stack.enter_context(RunningApi(Path(name), *overrides))


@contextmanager
def silent() -> Iterator[str]:
    """The address of a server that accepts and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


def test_every_node_answers_and_one_that_does_not_is_named() -> None:
    dead = f"http://127.0.0.1:{free_port()}"
    with ExitStack() as stack:
        mute = stack.enter_context(silent())
        peer = stack.enter_context(node_and_api(blocks=SHORT))
        peers = ",".join([dead, peer.url, mute])
        here = stack.enter_context(node_and_api(f"api.peers={peers}", blocks=BLOCKS))
        client = stack.enter_context(AdminClient(here.url))
        other = PROMPT.model_copy(update={"tokens": [*TOKENS[: NAMESPACE.block_tokens], *TOKENS]})
        answer = client.router_lookup([PROMPT, other], timeout=2)
        for prompt, usable in zip(answer.prompts, [(BLOCKS, SHORT), (1, 1)], strict=True):
            found = {node.url: node.tiers[0].usable_tokens for node in prompt.nodes}
            assert found == {here.url: usable[0] * 16, peer.url: usable[1] * 16}
            assert len({node.node for node in prompt.nodes}) == 2
        problems = {one.url: one.problem for one in answer.unanswered}
        assert problems.keys() == {dead, mute}
        assert problems[mute] == "no answer in 2 s"


def test_a_peer_that_did_not_answer_is_left_alone_for_a_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvstore.admin.peers.REST_SECONDS", 3600.0)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        mute = f"http://127.0.0.1:{listener.getsockname()[1]}"
        with node_and_api(f"api.peers={mute}", blocks=BLOCKS) as here, AdminClient(here.url) as client:
            for _ in range(2):
                answer = client.router_lookup([PROMPT], timeout=2)
                assert [one.url for one in answer.unanswered] == [mute]
                assert answer.prompts[0].nodes[0].tiers[0].usable_blocks == BLOCKS
        listener.setblocking(False)
        listener.accept()[0].close()
        with pytest.raises(BlockingIOError):  # it was not asked again
            listener.accept()


def test_a_node_does_not_ask_itself() -> None:
    """So all nodes may have the same list."""
    address = f"127.0.0.1:{free_port()}"
    with node_and_api(f"api.listen={address}", f"api.peers=http://{address}", blocks=BLOCKS) as here:
        with AdminClient(here.url) as client:
            assert [node.url for node in client.router_lookup([PROMPT], timeout=10).prompts[0].nodes] == [
                f"http://{address}"
            ]


def test_peers_with_tokens_are_asked_with_one(tmp_path: Path) -> None:
    tokens, right, wrong = tmp_path / "tokens", tmp_path / "right", tmp_path / "wrong"
    right.write_text(TokenBook(tokens).create("peer", Role.VIEWER)[1] + "\n")
    wrong.write_text("kvs_wrong")
    with node_and_api(f"api.tokens={tokens}", blocks=SHORT) as peer:
        for file, answered in ((right, True), (wrong, False)):
            overrides = (f"api.peers={peer.url}", f"api.peer_token={file}")
            with node_and_api(*overrides, blocks=BLOCKS) as here, AdminClient(here.url) as client:
                answer = client.router_lookup([PROMPT], timeout=10)
                assert (peer.url in {node.url for node in answer.prompts[0].nodes}) == answered
                assert [one.problem for one in answer.unanswered] == ([] if answered else ["it answered 401"])


def test_a_node_that_is_gone_is_named_and_peers_still_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvstore.admin.node.STATUS_SECONDS", 3600.0)  # its namespaces stay known
    with node_and_api(blocks=SHORT) as peer, tempfile.TemporaryDirectory(prefix="kvp-") as name:
        with RunningNode(Path(name)) as node, RunningApi(Path(name), f"api.peers={peer.url}") as here:
            save_chain(node.socket, TOKENS)
            with AdminClient(here.url) as client:
                assert client.router_lookup([PROMPT], timeout=10).unanswered == []
                node.__exit__()
                answer = client.router_lookup([PROMPT], timeout=10)
    assert [one.url for one in answer.unanswered] == [here.url]
    assert [each.url for each in answer.prompts[0].nodes] == [peer.url]


@pytest.mark.parametrize("peers", ["10.0.0.2:7070", "http://10.0.0.2:7070/", "http://user@host:1", "ftp://host"])
def test_addresses_that_are_none_are_refused(peers: str) -> None:
    with pytest.raises(ConfigError, match=r"api\.peers"):
        load(None, [f"api.peers={peers}"], environ={})


def test_peers_may_be_a_list(tmp_path: Path) -> None:
    file = tmp_path / "kvstore.toml"
    file.write_text('[api]\npeers = ["http://10.0.0.2:7070", "http://10.0.0.3:7070"]\n')
    listed = load(file, environ={}).config.api.peers
    assert listed == load(None, ["api.peers=http://10.0.0.2:7070, http://10.0.0.3:7070"], environ={}).config.api.peers


def test_nodes_of_a_region_find_each_other_in_the_catalog() -> None:
    with tempfile.TemporaryDirectory(prefix="kvp-") as name, ExitStack() as stack:
        region = (f"object.url=file://{name}/bucket", f"catalog.url=sqlite://{name}/catalog.db")
        apis = []
        for number in range(2):
            folder = Path(name) / str(number)
            folder.mkdir()
            address = f"api.listen=127.0.0.1:{free_port()}"
            node = stack.enter_context(RunningNode(folder, *region, address, "policy.admission=off"))
            if not number:
                save_chain(node.socket, TOKENS)
            apis.append(stack.enter_context(RunningApi(folder, *region, address)))
        here, peer = apis
        client = stack.enter_context(AdminClient(here.url))
        wait_for(lambda: {node.url for node in client.nodes()} == {here.url, peer.url})
        assert all(node.started is not None for node in client.nodes())

        def found() -> set[str]:
            return {node.url for node in client.router_lookup([PROMPT], timeout=10).prompts[0].nodes}

        wait_for(lambda: found() == {here.url, peer.url})


def test_only_addresses_that_can_be_reached_are_asked() -> None:
    def node(host: str, api: str) -> Presence:
        return Presence(name=host, process=f"{host}:1:a", host=host, api=api)

    nodes = [
        node("a", "http://127.0.0.1:1"),
        node("b", "http://127.0.0.1:2"),
        node("c", "http://10.0.0.3:7070"),
        node("d", "https://[::1]:3"),
        node("e", ""),
        node("f", "http://gpu-6:7070"),
    ]
    assert apis(nodes, "a") == ["http://127.0.0.1:1", "http://10.0.0.3:7070", "http://gpu-6:7070"]
    assert Presence.here("n", "", "http://0.0.0.0:7070").api == f"http://{this_host()}:7070"
    assert Presence.here("n", "", "https://[::]:7070").api == f"https://{this_host()}:7070"
    assert Presence.here("n", "", "http://10.0.0.3:7070").api == "http://10.0.0.3:7070"


@pytest.mark.parametrize("body", [b"", b"\xff", b"7", b"[]", b"{}", b'{"name": "a"}'])
def test_what_is_no_presence_is_passed_over(body: bytes) -> None:
    here = Presence.here("n", "eu", "")
    documents = [Document("nodes/x", body, 1, 9.0), Document(here.document, here.pack(), 2, 9.0)]
    assert present(documents) == [dataclasses.replace(here, expires=9.0)]


def test_what_is_no_address_is_not_asked() -> None:
    for api in ("file:///etc/passwd", "http://user@host:1", "http://host:1/path", "host:1"):
        node = dataclasses.replace(Presence.here("n", "", ""), api=api)
        (read,) = present([Document(node.document, node.pack(), 1, 9.0)])
        assert apis([read], read.host) == []


def test_of_a_node_that_came_back_its_latest_life_counts() -> None:
    lives = [
        Presence(name="n", process=f"h:{pid}:a", host="h", started=at) for pid, at in ((1, 5.0), (2, 7.0), (3, 6.0))
    ]
    documents = [Document(one.document, one.pack(), 1, 9.0) for one in lives]
    assert [one.process for one in present(documents)] == ["h:2:a"]
