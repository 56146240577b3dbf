"""A client whose node goes away and comes back, or comes back only in part."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Sequence
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import pytest

from kvstore.errors import DeadlineExceeded, IdentityError, NodeUnavailable
from kvstore.identity import Namespace
from kvstore.node.api import PROTOCOL_VERSION
from kvstore.node.client import Client
from kvstore.node.protocol import FrameDecoder, encode
from kvstore.testing.node import wait_for

FIELDS: dict[str, Any] = {
    "weights": "w", "dtype": "float32", "layers": 1, "kv_heads": 1, "head_dim": 8, "attention": "gqa", "rope": "none",
    "block_tokens": 16, "layout": "canonical:kv_head_token_layer", "lora": "",
}  # fmt: skip
FIRST, SECOND = Namespace(model="first", **FIELDS), Namespace(model="second", **FIELDS)


class Scripted:
    """A node of one connection at a time: the nth answers the opening of so many namespaces, and then as ``ending`` says."""

    def __init__(self, path: Path, script: Sequence[tuple[int, str]]) -> None:
        """The last of ``script`` holds for all later ones.

        ``ending``: "hang" answers nothing more, "hang up" closes, "refuse" refuses what is opened next and goes on.
        """
        self.opened: list[list[str]] = []
        """Models whose namespaces were opened, by connection."""
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(path))
        self._listener.listen(8)
        self._thread = threading.Thread(target=self._serve, args=(script,), daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(10)

    def _serve(self, script: Sequence[tuple[int, str]]) -> None:
        arena = os.memfd_create("arena")
        os.ftruncate(arena, 4096)
        for count, ending in chain(script, repeat(script[-1])):
            try:
                client, _ = self._listener.accept()
            except OSError:
                break
            with client:
                self._speak(client, arena, count, ending)
        os.close(arena)

    def _speak(self, client: socket.socket, arena: int, count: int, ending: str) -> None:
        decoder = FrameDecoder()
        opened: list[str] = []
        self.opened.append(opened)
        while data := client.recv(1 << 16):
            for message in decoder.feed(data):
                if isinstance(message, dict):
                    welcome = {
                        "protocol": PROTOCOL_VERSION,
                        "version": "",
                        "epoch": len(self.opened),
                        "arena_bytes": 4096,
                    }
                    socket.send_fds(client, [encode(welcome)], [arena])
                elif len(opened) < count:
                    opened.append(message[2]["fields"]["model"])
                    client.sendall(encode([message[0], None, [b"d" * 32, b"s" * 32]]))
                    if len(opened) == count and ending == "hang up":
                        return
                elif ending == "refuse":
                    client.sendall(encode([message[0], "IdentityError", "another size"]))


def test_a_namespace_that_could_not_be_opened_again_is_not_forgotten(tmp_path: Path) -> None:
    """The connection that lacks it is given up, and the next one has all."""
    node = Scripted(tmp_path / "sock", [(2, "hang up"), (1, "hang"), (4, "hang up")])
    with Client(tmp_path / "sock", connect_timeout=0.5) as client:
        client.open_namespace(FIRST, 64)
        client.open_namespace(SECOND, 64)
        with pytest.raises(NodeUnavailable):
            client.call("status")
        with pytest.raises(DeadlineExceeded):
            client.lookup([])
        wait_for(lambda: _opens(client))
        assert node.opened[1] == ["first"]
        assert node.opened[-1] == ["first", "second", "second"]
    node.close()


def test_a_namespace_that_is_refused_keeps_no_other_from_being_used(tmp_path: Path) -> None:
    node = Scripted(tmp_path / "sock", [(2, "hang up"), (1, "refuse")])
    with Client(tmp_path / "sock", connect_timeout=0.5) as client:
        client.open_namespace(FIRST, 64)
        client.open_namespace(SECOND, 64)
        with pytest.raises(NodeUnavailable):
            client.call("status")
        with pytest.raises(IdentityError, match="another size"):
            client.open_namespace(SECOND, 64)
        assert client.epoch == 2
        assert node.opened[1] == ["first"]
    node.close()


def _opens(client: Client) -> bool:
    try:
        client.open_namespace(SECOND, 64)
    except NodeUnavailable:
        return False
    return True
