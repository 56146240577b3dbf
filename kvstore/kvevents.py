"""KV cache events as vLLM publishes them, so that KV-aware routers can follow what this node holds.

A ZeroMQ PUB socket sends (topic, sequence number as 8 big-endian bytes, msgpack of ``[time, events, 0]``), the wire format of
``vllm/distributed/kv_events.py``. Block hashes are our block keys: keyed, so a subscriber learns nothing of a prompt, and a
router that is to match prompts with them asks ``/v1/router/lookup``, or derives keys with the tenant's secret. ``token_ids`` is
empty, since a node never sees tokens. ``medium`` is CPU or STORAGE, ``ownership`` the tier.

PUB never blocks: a subscriber that is too slow loses batches, sees the gap in the numbers, and asks anew what is here.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Any

import msgpack
import structlog

from kvstore.errors import ConfigError
from kvstore.history import What
from kvstore.identity import NO_PARENT, BlockKey
from kvstore.tiers.base import BlockStat, Medium

log = structlog.get_logger(__name__)

TOPIC = b"kv-events"
HIGH_WATER_MARK = 10_000
"""Batches kept for a slow subscriber."""
GATHER_SECONDS = 0.01
"""Events of so long go out together."""

_STORED = {What.SAVED, What.FETCHED, What.WRITTEN}
_REMOVED = {What.EVICTED, What.DELETED, What.GONE, What.CORRUPT, What.BURIED}
_MEDIUM = {Medium.HOST: "CPU", Medium.DISK: "STORAGE", Medium.OBJECT: "STORAGE"}
_LOCALITY = {Medium.HOST: "LOCAL", Medium.DISK: "LOCAL", Medium.OBJECT: "REMOTE"}

Stat = Callable[[BlockKey], BlockStat | None]


class KVEvents:
    """Publishes what a node's history records. Owned by the node's event loop."""

    def __init__(self, address: str, stat: Stat) -> None:
        """``address`` as ``tcp://127.0.0.1:5557``; ``stat`` tells of a block in host memory. Raises ConfigError."""
        try:
            import zmq
        except ImportError:
            problem, remedy = "pyzmq is not installed", "Install llm-kvstore[events], or leave events.listen empty."
            raise ConfigError("events.listen", address, problem, remedy) from None
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PUB)
        self._socket.setsockopt(zmq.SNDHWM, HIGH_WATER_MARK)
        self._socket.setsockopt(zmq.LINGER, 0)
        try:
            self._socket.bind(address)
        except zmq.ZMQError as error:
            self._socket.close()
            raise ConfigError("events.listen", address, str(error), "Choose another port.") from error
        self._stat = stat
        self._sequence = 0
        self._gathered: list[dict[str, Any]] = []
        self._sending: asyncio.TimerHandle | None = None

    def tell(self, what: What, keys: Sequence[BlockKey], medium: Medium | None) -> None:
        """Something happened to blocks; see ``History.listener``."""
        if what in _STORED:
            where = medium if what is What.WRITTEN and medium is not None else Medium.HOST
            self._gathered += [self._stored(key, where) for key in keys]
        elif what in _REMOVED and medium in _MEDIUM:  # of what other regions have, nobody was told
            self._gathered.append({"type": "BlockRemoved", "block_hashes": list(keys), **_place(medium)})
        else:
            return
        if self._sending is None and self._gathered:
            self._sending = asyncio.get_running_loop().call_later(GATHER_SECONDS, self._send)

    def close(self) -> None:
        if self._sending is not None:
            self._sending.cancel()
            self._send()
        self._socket.close()

    def _stored(self, key: BlockKey, medium: Medium) -> dict[str, Any]:
        stat = self._stat(key)
        parent = stat.parent if stat is not None and stat.parent != NO_PARENT else None
        return {
            "type": "BlockStored",
            "block_hashes": [key],
            "parent_block_hash": parent,
            "token_ids": [],
            "block_size": stat.tokens if stat is not None else 0,
            "lora_id": None,
            "lora_name": None,
            **_place(medium),
        }

    def _send(self) -> None:
        self._sending = None
        events, self._gathered = self._gathered, []
        number, self._sequence = self._sequence, self._sequence + 1
        self._socket.send_multipart([TOPIC, number.to_bytes(8, "big"), msgpack.packb([time.time(), events, 0])])


def _place(medium: Medium) -> dict[str, str]:
    return {"medium": _MEDIUM[medium], "locality": _LOCALITY[medium], "ownership": medium.value}
