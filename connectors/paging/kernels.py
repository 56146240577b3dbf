"""The CUDA source that moves rows between engine pages and canonical payloads, and its arguments for one geometry.

A payload is reached through an address and four strides, so the same kernel fills a compact staging buffer in device memory
or a rank's part of a slot in registered host memory.
"""

from __future__ import annotations

import ctypes
import math

import numpy as np
import numpy.typing as npt

from connectors.paging.geometry import PagedKV, Pages, Share, Strides

THREADS = 128
UNROLL = 4
"""Independent loads in flight per thread. Small, short-lived thread blocks fit beside the engine's, and give way soon."""
MAX_BLOCKS = 64
MAX_PAGES = 768
"""With these bounds a batch is 3.6 KB, within the 4 KB that every CUDA version passes to a kernel by value: no table to
upload, keep alive or free."""

BATCH = np.dtype([("step", np.int64, 4), ("payload", np.int64, MAX_BLOCKS), ("page", np.int32, MAX_PAGES)], align=True)

SOURCE = r"""
struct Batch {
    long long step[4];               // bytes per kv, head, token, layer index of a payload
    long long payload[MAX_BLOCKS];   // address of each block's payload, at this rank's first head
    int page[MAX_PAGES];             // pages of each block, table after table, in token order; negative where one is left out
};

// Vector i of the batch, counted so that a thread block works on the tokens of one page in few layers: payloads lie in few
// memory pages whatever the order, but every layer of the engine is a memory region of its own. False if its page is left out.
__device__ __forceinline__ bool locate(
    unsigned i, const long long* planes, const Batch& batch, Vector*& engine, Vector*& stored)
{
    const unsigned vector = i % ROW; i /= ROW;
    const unsigned slot = i % PAGE_TOKENS; i /= PAGE_TOKENS;
    const unsigned layer = i % LAYERS; i /= LAYERS;
    const unsigned part = i % PAGES; i /= PAGES;
    const unsigned head = i % HEADS; i /= HEADS;
    const unsigned kv = i % KV, block = i / KV;
    const unsigned token = part * PAGE_TOKENS + slot;
    const unsigned table = TABLES > 1 ? planes[KV * LAYERS + layer] : 0;
    const long long page = batch.page[(block * TABLES + table) * PAGES + part];
    engine = (Vector*)(planes[kv * LAYERS + layer] + page * PAGE_STEP + slot * TOKEN_STEP + head * HEAD_STEP) + vector;
    stored = (Vector*)(batch.payload[block] + kv * batch.step[0] + head * batch.step[1] + token * batch.step[2]
                       + layer * batch.step[3]) + vector;
    return page >= 0;
}

// Moves vectors from ``origin`` on: a launch need not begin where a block does. All loads are issued before the first store,
// or one load's latency would be paid per vector. The bytes read are not read again: they stream past the cache that the
// engine's own kernels live on.
template <bool GATHER>
__device__ __forceinline__ void move(const long long* planes, unsigned origin, unsigned vectors, const Batch& batch)
{
    const unsigned chunk = blockDim.x * UNROLL;
    for (unsigned first = blockIdx.x * chunk + threadIdx.x; first < vectors; first += gridDim.x * chunk) {
        Vector value[UNROLL];
        Vector* target[UNROLL];
        #pragma unroll
        for (unsigned u = 0; u < UNROLL; ++u) {
            const unsigned i = first + u * blockDim.x;
            Vector *engine, *stored;
            target[u] = 0;
            if (i < vectors && locate(origin + i, planes, batch, engine, stored)) {
                value[u] = __ldcs(GATHER ? engine : stored);
                target[u] = GATHER ? stored : engine;
            }
        }
        #pragma unroll
        for (unsigned u = 0; u < UNROLL; ++u)
            if (target[u])
                *target[u] = value[u];
    }
}

extern "C" __global__ void __launch_bounds__(THREADS)
gather(const long long* planes, unsigned origin, unsigned vectors, const __grid_constant__ Batch batch)
{
    move<true>(planes, origin, vectors, batch);
}

extern "C" __global__ void __launch_bounds__(THREADS)
scatter(const long long* planes, unsigned origin, unsigned vectors, const __grid_constant__ Batch batch)
{
    move<false>(planes, origin, vectors, batch);
}
"""

_VECTOR_TYPES = {16: "uint4", 8: "uint2", 4: "unsigned", 2: "unsigned short", 1: "unsigned char"}


def defines(pages: PagedKV, share: Share) -> dict[str, str]:
    """The constants that SOURCE is compiled with: divisions by them become multiplications."""
    vector = vector_bytes(pages)
    item = pages.sample.element_size()
    page_step, token_step, head_step, _ = (stride * item for stride in pages.sample.stride())
    return {
        "Vector": _VECTOR_TYPES[vector],
        "ROW": f"{pages.row_bytes // vector}u",
        "LAYERS": f"{pages.layers}u",
        "PAGES": f"{share.block.tokens // pages.page_tokens}u",
        "PAGE_TOKENS": f"{pages.page_tokens}u",
        "TABLES": f"{pages.table_count}u",
        "HEADS": f"{pages.heads}u",
        "KV": f"{len(pages.planes)}u",
        "PAGE_STEP": f"{page_step}LL",
        "TOKEN_STEP": f"{token_step}LL",
        "HEAD_STEP": f"{head_step}LL",
        "THREADS": str(THREADS),
        "UNROLL": f"{UNROLL}u",
        "MAX_BLOCKS": str(MAX_BLOCKS),
        "MAX_PAGES": str(MAX_PAGES),
    }


def vector_bytes(pages: PagedKV) -> int:
    """The widest access, up to 16 bytes, that every row of every plane is aligned to."""
    item = pages.sample.element_size()
    steps = [
        stride * item
        for stride, size in zip(pages.sample.stride()[:3], pages.sample.shape[:3], strict=True)
        if size > 1
    ]
    return math.gcd(16, pages.row_bytes, *steps, *addresses(pages))


def addresses(pages: PagedKV) -> list[int]:
    """Address of each plane, K before V, layers ascending."""
    return [plane.data_ptr() for half in pages.planes for plane in half]


def directory(pages: PagedKV) -> list[int]:
    """What the kernels find an engine's page by: address of each plane, then each layer's page table."""
    return [*addresses(pages), *pages.tables]


class Arguments:
    """A kernel's arguments; a launch copies them, so the next one may use them again."""

    def __init__(self, directory: int, steps: Strides) -> None:
        """``directory`` is the address of ``directory()`` on the device."""
        self._batch = np.zeros((), BATCH)
        self._batch["step"] = (steps.kv, steps.head, steps.token, steps.layer)
        self._directory = ctypes.c_longlong(directory)
        self._origin, self._vectors = ctypes.c_uint(), ctypes.c_uint()
        self._pointers = (ctypes.c_void_p * 4)(
            ctypes.addressof(self._directory),
            ctypes.addressof(self._origin),
            ctypes.addressof(self._vectors),
            self._batch.ctypes.data,
        )
        self.address = ctypes.addressof(self._pointers)
        self._payloads, self._pages = self._batch["payload"], self._batch["page"]

    def fill(self, payloads: npt.NDArray[np.int64], pages: Pages, origin: int, vectors: int) -> None:
        """Blocks whose payloads are at these addresses and whose pages are these, ``[block, page]``; so many vectors of them,
        from ``origin`` on."""
        self._payloads[: len(payloads)] = payloads
        self._pages[: pages.size] = pages.ravel()
        self._origin.value, self._vectors.value = origin, vectors


def max_blocks(pages: PagedKV, share: Share) -> int:
    """Blocks that fit in one batch; 0 when even one has too many pages."""
    return min(MAX_BLOCKS, MAX_PAGES // (pages.table_count * share.block.tokens // pages.page_tokens))
