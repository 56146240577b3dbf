"""Who may use a node's socket: users of the machine, by what the kernel says of them."""

from __future__ import annotations

import os
import socket
import stat
import struct
from collections.abc import Collection
from pathlib import Path

from kvstore.config import default_socket
from kvstore.errors import ConfigError, NodeUnavailable, ProtocolError

_CREDENTIALS = struct.Struct("3i")
"""``struct ucred``: pid, uid, gid."""
ROOT = 0


def check_peer(client: socket.socket, further: Collection[int]) -> None:
    """Raise ProtocolError unless the other end is this user's, root's, or that of one of the ``further`` uids.

    What counts is who connected (SO_PEERCRED), which no client can choose.
    """
    pid, uid = peer(client)
    if uid not in (os.geteuid(), ROOT) and uid not in further:
        raise ProtocolError(f"user {uid} (process {pid}) is not in node.allow_uids")


def check_node(node: socket.socket, path: str) -> None:
    """Raise NodeUnavailable if another user listens at the default path, which lies in /tmp where there is nothing better.

    A path that somebody chose may well be that of another user's node.
    """
    pid, uid = peer(node)
    if uid not in (os.geteuid(), ROOT) and path == str(default_socket()):
        raise NodeUnavailable(f"user {uid} (process {pid}) listens at {path}, which is not theirs: set node.socket")


def peer(connection: socket.socket) -> tuple[int, int]:
    """Process and user at the other end."""
    packed = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid, uid, _ = _CREDENTIALS.unpack(packed)
    return pid, uid


def listen(path: Path, further: Collection[int]) -> socket.socket:
    """A listening socket that only this user can reach; with ``further`` uids everybody can, and ``check_peer`` decides.

    Replaces what is at ``path``, so the caller holds the node's lock. Raises ConfigError.
    """
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    mask = os.umask(0o111 if further else 0o177)
    try:
        listener.bind(str(path))
    except OSError as error:
        listener.close()
        raise ConfigError("node.socket", str(path), str(error), "A socket's path has at most 107 bytes.") from error
    finally:
        os.umask(mask)
    listener.listen(128)
    return listener


def make_folder(path: Path, further: Collection[int]) -> None:
    """The folder of the socket at ``path``; one that is made is this user's alone, or passable for ``further`` uids.

    Raises ConfigError for one in which another user could put a socket in the place of ours: engines would take its bytes
    for KV, and hand it theirs.
    """
    folder = path.parent
    folder.mkdir(parents=True, exist_ok=True, mode=0o711 if further else 0o700)
    found = folder.stat()
    if found.st_uid not in (os.geteuid(), ROOT):
        problem = f"its folder belongs to user {found.st_uid}, who could put another socket there"
        raise ConfigError("node.socket", str(path), problem, "Name a folder of your own.")
    if found.st_mode & stat.S_IWOTH and not found.st_mode & stat.S_ISVTX:
        problem = "everybody may write to its folder, and so put another socket there"
        raise ConfigError("node.socket", str(path), problem, f"chmod o-w {folder}")
