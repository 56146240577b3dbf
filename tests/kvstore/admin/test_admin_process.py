"""The API beside a node: a process of its own that comes and goes with it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from kvstore.config import load
from kvstore.errors import ConfigError
from kvstore.testing.node import wait_for
from kvstore.testing.servers import free_port, listens


@contextmanager
def node_with_api(folder: Path) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    port = free_port()
    settings = [
        f"node.directory={folder}", f"node.socket={folder}/node.sock", f"api.listen=127.0.0.1:{port}",
        "host.bytes=4MiB", "host.extent_bytes=1MiB", "disk.enabled=false",
    ]  # fmt: skip
    command = [sys.executable, "-m", "kvstore", "node", *(f"--set={text}" for text in settings)]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        wait_for(lambda: process.poll() is not None or ready(port))
        assert process.poll() is None, (folder / "log").read_text()
        yield process, port
    finally:
        if process.poll() is None:
            process.terminate()
        process.wait(60)


def ready(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/readyz").is_success
    except httpx.TransportError:
        return False


def api_pid(node: int) -> int:
    """The node's only child."""
    (child,) = Path(f"/proc/{node}/task/{node}/children").read_text().split()
    return int(child)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_the_api_ends_with_its_node(tmp_path: Path, number: signal.Signals) -> None:
    with node_with_api(tmp_path) as (process, port):
        settings = httpx.get(f"http://127.0.0.1:{port}/v1/config").json()
        assert {setting["name"]: setting["origin"] for setting in settings}["host.bytes"] == "--set"
        process.send_signal(number)
        process.wait(60)
        wait_for(lambda: not listens(port))


def test_an_api_that_was_killed_is_started_again_and_a_second_one_is_refused(tmp_path: Path) -> None:
    with node_with_api(tmp_path) as (process, port):
        status = httpx.get(f"http://127.0.0.1:{port}/v1/status").json()
        before = api_pid(process.pid)
        assert before != status["pid"] == process.pid
        os.kill(before, signal.SIGKILL)
        wait_for(lambda: not listens(port))
        wait_for(lambda: ready(port))
        again = httpx.get(f"http://127.0.0.1:{port}/v1/status").json()
        assert again["epoch"] == status["epoch"]
        assert_port_is_refused(port, tmp_path / "other")


def assert_port_is_refused(port: int, folder: Path) -> None:
    command = [sys.executable, "-m", "kvstore", "api", f"--set=api.listen=127.0.0.1:{port}"]
    done = subprocess.run([*command, f"--set=node.directory={folder}"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "api.listen" in done.stderr


def test_live_views_do_not_keep_it_from_stopping(tmp_path: Path) -> None:
    with node_with_api(tmp_path) as (process, port), httpx.Client(timeout=60) as client:
        with client.stream("GET", f"http://127.0.0.1:{port}/v1/events") as stream:
            lines = stream.iter_lines()
            next(lines)
            process.terminate()
            process.wait(60)
            assert list(lines)[-1:] in ([""], [])  # the stream ended whole


@pytest.mark.parametrize(
    ("listen", "problem"),
    [
        ("0.0.0.0:7070", "does not ask who"),
        ("10.1.2.3:7070", "does not ask who"),
        ("example.org:7070", "does not ask who"),
        ("127.0.0.1", "host:port"),
        ("127.0.0.1:99999", "host:port"),
    ],
)
def test_it_listens_on_loopback_only(listen: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        load(None, [f"api.listen={listen}"], environ={})


@pytest.mark.parametrize("listen", ["127.0.0.1:7070", "[::1]:7070", "localhost:80", ""])
def test_loopback_is_fine(listen: str) -> None:
    assert load(None, [f"api.listen={listen}"], environ={}).config.api.listen == listen
