"""Frames between a node and its clients.

A frame is a little-endian u32 length and that many bytes of msgpack. The client speaks first: ``{"protocol", "name", "pid"}``,
with a ``"token"`` where the node has several tenants; the node answers ``{"protocol", "version", "epoch", "arena_bytes"}`` and
attaches the arena's descriptor, or ``{"protocol", "refused": message}`` to who is of no tenant. Then requests
``[id, verb, {argument: value}]`` are answered, in any order, by ``[id, None, result]`` or ``[id, error name, message]``; a
request with id 0 is not answered. Block data never crosses the socket.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from typing import Any

import msgpack
import numpy as np

from kvstore.errors import ProtocolError
from kvstore.identity import KEY_BYTES, BlockKey

MAX_FRAME_BYTES = 4 << 20
"""Bound on a frame: 128k keys with their parents, twice the longest chain in use."""

_LENGTH = struct.Struct("<I")


def encode(message: Any) -> bytes:
    """A whole frame. Raises ProtocolError when the message is beyond the bound."""
    body: bytes = msgpack.packb(message)
    if len(body) > MAX_FRAME_BYTES:
        raise ProtocolError(f"a frame of {len(body)} bytes is beyond the bound of {MAX_FRAME_BYTES}")
    return _LENGTH.pack(len(body)) + body


class FrameDecoder:
    """Bytes in, messages out. Holds at most one frame."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes | bytearray | memoryview) -> Iterator[Any]:
        """Messages completed by ``data``. Raises ProtocolError; the connection is then of no more use."""
        self._buffer += data
        while len(self._buffer) >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._buffer)
            if length > MAX_FRAME_BYTES:
                raise ProtocolError(f"a frame of {length} bytes is beyond the bound of {MAX_FRAME_BYTES}")
            end = _LENGTH.size + length
            if len(self._buffer) < end:
                return
            body = bytes(self._buffer[_LENGTH.size : end])
            del self._buffer[:end]
            yield decode(body)


def decode(body: bytes) -> Any:
    """A frame's body. Raises ProtocolError."""
    try:
        return msgpack.unpackb(body, strict_map_key=True)
    except (ValueError, msgpack.exceptions.UnpackException, RecursionError) as error:
        raise ProtocolError(f"not msgpack: {error}") from None


def join_keys(keys: Sequence[BlockKey]) -> bytes:
    """Keys as one byte string: cheaper to pack than an array."""
    return b"".join(keys)


def split_keys(joined: object) -> list[BlockKey]:
    """The keys of ``join_keys``. Raises ProtocolError."""
    if not isinstance(joined, bytes) or len(joined) % KEY_BYTES:
        raise ProtocolError(f"keys must be a byte string of {KEY_BYTES} bytes a key")
    keys: list[BlockKey] = np.frombuffer(joined, dtype=f"V{KEY_BYTES}").tolist()
    return keys
