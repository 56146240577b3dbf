"""Who may use a node's socket."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvstore.config import default_socket, load
from kvstore.errors import ConfigError, NodeUnavailable
from kvstore.node.api import PROTOCOL_VERSION
from kvstore.node.protocol import encode
from kvstore.testing.node import PatientClient, RunningNode

STRANGER = 54_321
PYTHON = shutil.which("python3", path="/usr/bin:/usr/local/bin")
"""Not this one: other users may not be able to read it."""
GREET = """
import socket, sys
client = socket.socket(socket.AF_UNIX)
client.settimeout(30)
client.connect(sys.argv[1])
client.sendall(bytes.fromhex(sys.argv[2]))
print(len(client.recv(4096)))
"""


@pytest.fixture
def folder() -> Iterator[Path]:
    """One that other users can pass, unlike pytest's own."""
    with tempfile.TemporaryDirectory(prefix="kvp-") as name:
        Path(name).chmod(0o711)
        yield Path(name)


def greet_as(uid: int, path: Path) -> subprocess.CompletedProcess[str]:
    """How many bytes a client of this user is answered; it fails where it may not even connect."""
    if os.geteuid() != 0:
        pytest.skip("only root can act as another user")
    if PYTHON is None:
        pytest.skip("there is no Python that another user could run")
    hello = encode({"protocol": PROTOCOL_VERSION, "name": "stranger", "pid": 1}).hex()
    command = [PYTHON, "-I", "-c", GREET, str(path), hello]
    return subprocess.run(
        command, user=uid, group=uid, extra_groups=[], cwd="/", capture_output=True, text=True, timeout=60
    )


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_the_socket_and_its_folder_are_their_users_alone(folder: Path) -> None:
    path = folder / "run" / "node.sock"
    with RunningNode(folder, f"node.socket={path}"):
        assert (mode(path), mode(path.parent)) == (0o600, 0o700)
        assert greet_as(STRANGER, path).returncode != 0
    with PatientClient(path) as client, RunningNode(folder, f"node.socket={path}"):
        assert client.call("status")["tiers"]


def test_another_user_is_refused_by_what_the_kernel_says_and_the_refusal_logged(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """It can reach the socket, since a third user is allowed."""
    with RunningNode(folder, f"node.allow_uids={STRANGER + 1}") as node:
        assert mode(node.socket) == 0o666
        refused = greet_as(STRANGER, node.socket)
        assert refused.stdout.strip() in ("0", ""), "nothing was sent, the arena's descriptor least of all"
        with PatientClient(node.socket) as client:
            assert len(client.call("status")["clients"]) == 1
    said = "".join(capfd.readouterr())
    assert f"user {STRANGER} " in said
    assert "node.allow_uids" in said


def test_a_user_who_is_allowed_is_welcome(folder: Path) -> None:
    path = folder / "run" / "node.sock"
    with RunningNode(folder, f"node.socket={path}", f"node.allow_uids={STRANGER + 1}, {STRANGER}"):
        answered = greet_as(STRANGER, path)
        assert int(answered.stdout) > 0, answered.stderr
        assert mode(path.parent) == 0o711


def test_a_folder_in_which_others_could_put_their_socket_is_refused(folder: Path) -> None:
    folder.chmod(0o777)
    with pytest.raises(ConfigError, match="everybody may write to its folder"):
        RunningNode(folder)
    folder.chmod(0o1777)
    RunningNode(folder).stop()
    if os.geteuid() == 0:
        os.chown(folder, STRANGER, STRANGER)
        with pytest.raises(ConfigError, match=f"belongs to user {STRANGER}"):
            RunningNode(folder)


LISTEN = """
import os, socket, sys
listener = socket.socket(socket.AF_UNIX)
listener.bind(sys.argv[1])
os.chmod(sys.argv[1], 0o666)
listener.listen()
print("listening", flush=True)
connection, _ = listener.accept()
print(len(connection.recv(4096)), flush=True)
"""


def test_a_client_does_not_speak_to_a_stranger_at_the_default_path(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if os.geteuid() != 0 or PYTHON is None:
        pytest.skip("only root can act as another user, with a Python that it can run")
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(folder))
    path = default_socket()
    path.parent.mkdir()
    os.chown(path.parent, STRANGER, STRANGER)
    command = [PYTHON, "-I", "-c", LISTEN, str(path)]
    with subprocess.Popen(
        command, user=STRANGER, group=STRANGER, extra_groups=[], stdout=subprocess.PIPE, text=True
    ) as it:
        assert it.stdout is not None
        assert it.stdout.readline() == "listening\n"
        with PatientClient(path) as client, pytest.raises(NodeUnavailable, match=f"user {STRANGER} "):
            client.call("status")
        assert it.stdout.readline() == "0\n", "it was told nothing"


@pytest.mark.parametrize("text", ["me", "-1", "1000;1001", str(1 << 32)])
def test_what_is_no_uid_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"node\.allow_uids"):
        load(None, [f"node.allow_uids={text}"], environ={})


def test_uids_come_as_a_list_or_a_text(tmp_path: Path) -> None:
    file = tmp_path / "kvstore.toml"
    file.write_text("[node]\nallow_uids = [1000, 1001]\n")
    for loaded in (load(file, [], environ={}), load(None, [], environ={"KVSTORE_NODE__ALLOW_UIDS": "1000,1001"})):
        assert loaded.config.node.allow_uids == (1000, 1001)
        assert {setting.name: setting.value for setting in loaded.settings()}["node.allow_uids"] == "1000,1001"


def test_a_client_that_left_keeps_nothing_of_the_nodes_memory(tmp_path: Path) -> None:
    """A descriptor left open would keep the arena of a node that is gone, in an engine that outlives many nodes."""

    def held() -> int:
        return sum("/dev/shm/" in _opened(name) for name in os.listdir("/proc/self/fd"))

    with RunningNode(tmp_path) as node:
        before = held()
        for _ in range(3):
            with PatientClient(node.socket) as client:
                assert client.call("status")["pid"]
        assert held() == before


def _opened(descriptor: str) -> str:
    """What a descriptor is of; nothing when another thread has closed it meanwhile."""
    try:
        return os.readlink(f"/proc/self/fd/{descriptor}")
    except FileNotFoundError:
        return ""
