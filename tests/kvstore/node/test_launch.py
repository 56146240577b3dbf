"""Starting a node from a client's process."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from kvstore.errors import NodeUnavailable
from kvstore.node.launch import is_running, launch
from kvstore.testing.node import PatientClient


def status_soon(client: PatientClient, socket: Path) -> dict[str, object]:
    """As a connector does: launch, ask, launch again."""
    deadline = time.monotonic() + 30
    while True:
        launch(socket)
        try:
            return client.call("status")
        except NodeUnavailable:
            assert time.monotonic() < deadline
            time.sleep(0.1)


def stop(pid: object, socket: Path) -> None:
    os.kill(int(str(pid)), signal.SIGTERM)
    deadline = time.monotonic() + 30
    while is_running(socket):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_node_is_started_once_and_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    socket = tmp_path / "node.sock"
    monkeypatch.setenv("KVSTORE_NODE__DIRECTORY", str(tmp_path))
    monkeypatch.setenv("KVSTORE_HOST__BYTES", "64MiB")
    monkeypatch.setenv("KVSTORE_DISK__ENABLED", "false")
    with PatientClient(socket) as client:
        pid = status_soon(client, socket)["pid"]
        launch(socket)
        assert client.call("status")["pid"] == pid
    assert is_running(socket)
    stop(pid, socket)
    assert "listening" in (tmp_path / "node.log").read_text()
    with PatientClient(socket) as client:
        stop(status_soon(client, socket)["pid"], socket)


def test_a_node_that_cannot_start_is_reported_and_not_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    socket = tmp_path / "node.sock"
    monkeypatch.setenv("KVSTORE_HOST__BYTES", "many")
    with PatientClient(socket) as client, pytest.raises(NodeUnavailable, match=r"node\.log"):
        status_soon(client, socket)
    assert "host.bytes" in (tmp_path / "node.log").read_text()
