"""Starts a node on this machine when none answers."""

from __future__ import annotations

import fcntl
import subprocess
import sys
import threading
from pathlib import Path

from kvstore.config import default_socket
from kvstore.errors import NodeUnavailable

_lock = threading.Lock()
_launched: dict[Path, subprocess.Popen[bytes]] = {}


def launch(socket_path: str | Path = "") -> None:
    """Start ``kvstore node`` detached from this process, unless one runs or is starting at the socket. Does not wait.

    The node takes its configuration from KVSTORE_CONFIG and the environment, and logs to ``node.log`` beside the socket.
    Raises NodeUnavailable when the node that an earlier call started has failed: calling again would not help.
    Any thread may call; of several processes that start one at the same time, one succeeds.
    """
    path = Path(socket_path or default_socket())
    log = path.with_name("node.log")
    with _lock:
        if is_running(path):
            return
        earlier = _launched.get(path)
        if earlier is not None:
            if earlier.poll() is None:
                return
            if earlier.returncode > 0:
                raise NodeUnavailable(f"the node did not start (exit status {earlier.returncode}): see {log}")
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with open(log, "ab") as output:
            _launched[path] = subprocess.Popen(
                [sys.executable, "-m", "kvstore", "node", "--socket", str(path)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )


def lock_path(socket_path: Path) -> Path:
    """The file that a node holds locked while it runs."""
    return socket_path.with_name(socket_path.name + ".lock")


def is_running(socket_path: Path) -> bool:
    """Whether a node runs, or is starting or stopping, at the socket."""
    try:
        with open(lock_path(socket_path), "rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False
