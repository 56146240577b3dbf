"""Blocks that one engine saved and another loads, at any tensor-parallel degrees: bit for bit, through a real node.

SGLang's side is its own host pool classes behind our backend; vLLM's side is its page layouts behind our pager, reserving,
copying and committing as the connector's worker does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

import pytest
import torch
from conftest import DIM, LAYERS, LORA_RANK, PAGE, ROPE_DIM, Backends, fill, hashes, mha_pool, mla_pool, serve, slots
from paging_cases import Case

from connectors.paging.base import BlockCopy
from connectors.paging.geometry import PagedKV
from connectors.paging.reference import ReferencePager
from connectors.sglang.pages import page_view
from kvstore.identity import NO_PARENT, Namespace
from kvstore.layout import BlockLayout
from kvstore.node.api import NewBlock
from kvstore.testing.node import PatientClient, RunningNode

DEGREES = (1, 2, 4, 8)
BLOCKS = 3
SGLANG_LAYOUTS = {
    1: "page_head", 2: "page_first", 3: "page_first_direct", 4: "layer_first", 6: "page_head", 8: "page_first_direct",
}  # fmt: skip
SGLANG_MLA_LAYOUTS = {1: "page_first", 2: "layer_first", 4: "page_first_direct", 8: "page_first"}
VLLM_LAYOUTS = {
    1: ("LBHNC", 16), 2: ("BLNHC", 4), 3: ("BHLNC", 4), 4: ("kv_heads", 8), 6: ("kv_heads", 2), 8: ("BHLNC", 2),
}  # fmt: skip
VLLM_MLA_LAYOUTS = {1: ("LBHNC", 16), 2: ("mla_3d", 4), 4: ("BLHNC", 8), 8: ("mla_3d", 2)}

Truth = torch.Tensor
"""Canonical bytes of some blocks: ``[kv, block, head, token, layer, byte]``."""


class Ranks(Protocol):
    """All ranks of one engine."""

    def save(self, truth: Truth, keys: Sequence[str]) -> None:
        """Hold these blocks in the engine's pages, and save them."""

    def load(self, keys: Sequence[str]) -> Truth:
        """Load these blocks to other pages. What all ranks hold then, by head; replicas must hold the same."""


class SGLang:
    def __init__(self, backends: Backends, block: BlockLayout, degree: int) -> None:
        mla = block.kv == 1
        self._block, self._degree = block, degree
        self._heads = [(0, 1) if mla else block.rank_heads(rank, degree) for rank in range(degree)]
        layout = (SGLANG_MLA_LAYOUTS if mla else SGLANG_LAYOUTS)[degree]
        self._pools = [
            fill(mla_pool(layout) if mla else mha_pool(layout, heads=stop - first), degree)
            for first, stop in self._heads
        ]
        self._backends = [backends(pool, rank=(rank, degree)) for rank, pool in enumerate(self._pools)]

    @property
    def namespace(self) -> Namespace:
        (namespace,) = {backend._pools["kv"]._binding.namespace for backend in self._backends}
        return namespace

    def save(self, truth: Truth, keys: Sequence[str]) -> None:
        for pool, heads, backend in zip(self._pools, self._heads, self._backends, strict=True):
            page_view(pool)[:, :BLOCKS] = truth[:, :, slice(*heads)]
            assert all(backend.batch_set_v1(list(keys), slots(*range(BLOCKS))))

    def load(self, keys: Sequence[str]) -> Truth:
        pages = range(BLOCKS + 2, 2 * BLOCKS + 2)
        found = Gathered(self._block)
        for pool, heads, backend in zip(self._pools, self._heads, self._backends, strict=True):
            assert backend.batch_exists(list(keys)) == BLOCKS
            assert all(backend.batch_get_v1(list(keys), slots(*pages)))
            found.put(heads, page_view(pool)[:, list(pages)])
        return found.whole


class VLLM:
    def __init__(
        self, node: RunningNode, namespace: Namespace, block: BlockLayout, degree: int, stack: ExitStack
    ) -> None:
        mla = block.kv == 1
        self._block, self._degree, self._namespace = block, degree, namespace
        self._heads = [(0, 1) if mla else block.rank_heads(rank, degree) for rank in range(degree)]
        layout, self._page = (VLLM_MLA_LAYOUTS if mla else VLLM_LAYOUTS)[degree]
        pages = 3 * BLOCKS * block.tokens // self._page
        self._pages: list[PagedKV] = [
            Case(block, heads, torch.bfloat16, layout, self._page, pages).build("cpu") for heads in self._heads
        ]
        self._clients = [stack.enter_context(PatientClient(node.socket)) for _ in self._heads]
        self._keyrings = [client.open_namespace(namespace, block.nbytes) for client in self._clients]

    def save(self, truth: Truth, keys: Sequence[str]) -> None:
        parts = 1 if self._block.kv == 1 else min(self._degree, self._block.kv_heads)
        replicas = self._degree // parts
        for rank, heads in enumerate(self._heads):
            if rank % replicas:
                continue
            client, pages = self._clients[rank], self._pages[rank]
            block_keys = self._keyrings[rank].block_keys(map(bytes.fromhex, keys))
            blocks = [
                NewBlock(key, parent, i)
                for i, (key, parent) in enumerate(zip(block_keys, [NO_PARENT, *block_keys[:-1]], strict=True))
            ]
            self._each_page(pages, truth[:, :, slice(*heads)], lambda mine, theirs: mine.copy_(theirs))
            reserved = client.reserve(self._namespace, blocks, rank // replicas, parts)
            copies = [
                BlockCopy(self._page_ids(i), offset) for i, offset in enumerate(reserved.offsets) if offset is not None
            ]
            assert len(copies) == BLOCKS
            ReferencePager(pages, self._block, heads).save(reserved.arena, copies).wait()
            client.commit(block_keys, rank // replicas)

    def load(self, keys: Sequence[str]) -> Truth:
        found = Gathered(self._block)
        for client, keyring, pages, heads in zip(self._clients, self._keyrings, self._pages, self._heads, strict=True):
            block_keys = keyring.block_keys(map(bytes.fromhex, keys))
            acquired = client.acquire(block_keys, 5)
            copies = [BlockCopy(self._page_ids(i), offset) for i, offset in enumerate(acquired.offsets)]
            assert len(copies) == BLOCKS
            ReferencePager(pages, self._block, heads).load(acquired.arena, copies).wait()
            client.release(block_keys)
            held = torch.zeros(
                self._block.kv, BLOCKS, heads[1] - heads[0], PAGE, LAYERS, pages.row_bytes, dtype=torch.uint8
            )
            self._each_page(pages, held, lambda mine, theirs: theirs.copy_(mine))
            found.put(heads, held)
        return found.whole

    def _page_ids(self, block: int) -> tuple[int, ...]:
        each = self._block.tokens // self._page
        return tuple(range((BLOCKS + block) * each, (BLOCKS + block + 1) * each))[::-1]

    def _each_page(self, pages: PagedKV, share: Truth, copy: Callable[[torch.Tensor, torch.Tensor], Any]) -> None:
        for kv, planes in enumerate(pages.planes):
            for layer, plane in enumerate(planes):
                rows = plane.view(torch.uint8)
                for block in range(BLOCKS):
                    for place, page in enumerate(self._page_ids(block)):
                        tokens = slice(place * self._page, (place + 1) * self._page)
                        copy(rows[page].transpose(0, 1), share[kv, block, :, tokens, layer])


class Gathered:
    """Ranks' shares, put together."""

    def __init__(self, block: BlockLayout) -> None:
        row = block.head_dim * block.itemsize
        self.whole = torch.zeros(block.kv, BLOCKS, block.kv_heads, block.tokens, block.layers, row, dtype=torch.uint8)
        self._seen: set[int] = set()

    def put(self, heads: tuple[int, int], share: Truth) -> None:
        mine = self.whole[:, :, slice(*heads)]
        if self._seen.issuperset(range(*heads)):
            assert torch.equal(mine, share), "ranks that hold the same head hold other bytes"
        mine.copy_(share)
        self._seen.update(range(*heads))


@pytest.mark.parametrize("kv_heads", [8, 6, 2, None], ids=["gqa", "six-heads", "more-ranks-than-heads", "mla"])
@pytest.mark.parametrize("saver", ["vllm", "sglang"])
def test_any_engine_at_any_degree_loads_what_any_other_saved(
    node: RunningNode, backends: Backends, tmp_path: Path, kv_heads: int | None, saver: str
) -> None:
    mla = kv_heads is None
    degrees = (1, 2, 3, 6) if kv_heads == 6 else DEGREES
    block = BlockLayout(
        tokens=PAGE, layers=LAYERS, kv_heads=kv_heads or 1, head_dim=LORA_RANK + ROPE_DIM if mla else DIM, itemsize=2,
        kv=1 if mla else 2, order="token_layer" if mla else "kv_head_token_layer",
    )  # fmt: skip
    serve(tmp_path / "other" / "model", num_key_value_heads=kv_heads or 8)
    with ExitStack() as stack:
        sglangs = {degree: SGLang(backends, block, degree) for degree in degrees}
        namespaces = {engine.namespace for engine in sglangs.values()}
        assert len(namespaces) == 1, "degrees and layouts do not shape a block"
        (namespace,) = namespaces
        vllms = {degree: VLLM(node, namespace, block, degree, stack) for degree in degrees}
        savers: dict[int, Ranks] = {**(vllms if saver == "vllm" else sglangs)}
        for degree in degrees:
            truth = torch.randint(
                0, 256, (block.kv, BLOCKS, block.kv_heads, PAGE, LAYERS, block.head_dim * 2), dtype=torch.uint8,
                generator=torch.Generator().manual_seed(degree),
            )  # fmt: skip
            keys = hashes(BLOCKS, prompt=degree)
            savers[degree].save(truth, keys)
            for loader in (*sglangs.values(), *vllms.values()):
                assert torch.equal(loader.load(keys), truth)


def test_ranks_of_two_degrees_do_not_complete_each_others_blocks(
    node: RunningNode, backends: Backends, tmp_path: Path
) -> None:
    """Half of a block by one engine and a quarter by another make no block."""
    serve(tmp_path / "other" / "model", num_key_value_heads=8)
    two = backends(fill(mha_pool("page_first", heads=4), 1), rank=(1, 2))
    four = backends(fill(mha_pool("page_first", heads=2), 2), rank=(0, 4))
    keys = hashes(1)
    assert two.batch_set_v1(keys, slots(0)) == [True]
    assert four.batch_set_v1(keys, slots(0)) == [True]
    assert four.batch_exists(keys) == 0
    rest = backends(fill(mha_pool("page_first", heads=4), 1), rank=(0, 2))
    assert rest.batch_set_v1(keys, slots(0)) == [True]
    assert four.batch_exists(keys) == 1
