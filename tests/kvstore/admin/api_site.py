"""A node with a few blocks in it, and its admin API, over real sockets."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from kvstore.identity import NO_PARENT, BlockKey, Namespace, chain_digests
from kvstore.node.api import NewBlock
from kvstore.testing.admin import RunningApi
from kvstore.testing.node import PatientClient, RunningNode
from kvstore.tiers.base import Medium

BLOCK_BYTES = 10_000
BLOCKS = 5
NAMESPACE = Namespace(
    model="org/toy", weights="1", dtype="float32", layers=2, kv_heads=2, head_dim=8, attention="gqa", rope="",
    block_tokens=16, layout="opaque:test",
)  # fmt: skip
TOKENS = list(range(NAMESPACE.block_tokens * BLOCKS + 3))


@dataclass
class Site:
    """What tests talk to."""

    node: RunningNode
    api: RunningApi
    http: httpx.Client
    keys: list[BlockKey]
    """One chain, in host memory and on disk."""

    def get(self, path: str, **params: Any) -> Any:
        """The JSON of an answer that is well."""
        return self._good(self.http.get(path, params=params))

    def post(self, path: str, body: object = None, **headers: str) -> Any:
        return self._good(self.http.post(path, json=body, headers=headers))

    def _good(self, answer: httpx.Response) -> Any:
        assert answer.is_success, answer.text
        return answer.json()


def save_chain(socket: Path, tokens: list[int]) -> list[BlockKey]:
    with PatientClient(socket, name="a test") as client:
        keyring = client.open_namespace(NAMESPACE, BLOCK_BYTES)
        keys = keyring.block_keys(chain_digests(tokens, NAMESPACE.block_tokens))
        parents = [NO_PARENT, *keys]
        blocks = [NewBlock(key, parent, index) for index, (key, parent) in enumerate(zip(keys, parents, strict=False))]
        reserved = client.reserve(NAMESPACE, blocks)
        new = [(index, offset) for index, offset in enumerate(reserved.offsets) if offset is not None]
        for index, offset in new:
            reserved.arena.slot(offset, BLOCK_BYTES)[:] = bytes([index]) * BLOCK_BYTES
        saved = [keys[index] for index, _ in new]
        assert client.commit(saved, durable=Medium.DISK) == tuple(saved)
    return keys


@contextmanager
def api_site(*overrides: str) -> Iterator[Site]:
    """``overrides`` are settings of the API."""
    with tempfile.TemporaryDirectory(prefix="kva-") as name:
        folder = Path(name)
        with RunningNode(folder) as node, RunningApi(folder, *overrides) as api, httpx.Client(base_url=api.url) as http:
            yield Site(node, api, http, save_chain(node.socket, TOKENS))
