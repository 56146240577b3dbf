"""From vLLM's configuration and requests to our namespaces and chains."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import vllm

from connectors.modelid import model_name, rope_text, weights_revision
from connectors.vllm.groups import ONE_TABLE, PageTables, Section, describe, is_a, page_tables, sections
from connectors.vllm.options import Options
from connectors.vllm.share import Share
from connectors.vllm.states import States, states
from connectors.weights import weights_digest
from kvstore.errors import ConfigError
from kvstore.identity import NO_PARENT, BlockKey, Keyring, Namespace, chain_digests, chain_seed
from kvstore.layout import BlockLayout
from kvstore.node.api import NewBlock

DEFAULT_BLOCK_TOKENS = 64


@dataclass(frozen=True, slots=True)
class Geometry:
    """How the engine's pages become our blocks."""

    namespace: Namespace
    page_tokens: int
    ranks: int
    """Tensor-parallel ranks; each holds its share of every page."""
    block_bytes: int
    layouts: tuple[BlockLayout, ...] = ()
    """Canonical layouts of a block's parts, see ``sections``; none: a block is the pages of all ranks as they are."""
    sections: tuple[Section, ...] = ()
    tables: PageTables = ONE_TABLE
    states: States | None = None
    """What recurrent layers keep, for a model that has some."""

    @property
    def block_tokens(self) -> int:
        return self.namespace.block_tokens

    @property
    def pages_per_block(self) -> int:
        return self.block_tokens // self.page_tokens

    @property
    def parts(self) -> int:
        """How many ranks write a block. With more ranks than KV heads, neighbours hold the same."""
        return min(self.ranks, self.namespace.kv_heads) if self.layouts else self.ranks

    def page_bytes(self, table: int) -> int:
        """Of one page of a page table, one rank's share."""
        page = self.block_bytes // self.pages_per_block // self.parts
        return page * self.tables.layers[table] // sum(self.tables.layers)

    def share(self, rank: int) -> Share:
        """What a rank writes of a block."""
        replicas = self.ranks // self.parts
        part = None if rank % replicas else rank // replicas
        return Share(self.namespace, part, self.parts, self.block_bytes // self.parts, self.block_tokens)

    @property
    def whole(self) -> bool:
        """Whether a load is good as a whole or not at all: no first bad page could be told of it."""
        return self.tables.windowed or self.states is not None


def geometry(vllm_config: Any, kv_cache_config: Any, options: Options) -> Geometry:
    """Read everything that shapes a block's bytes. Raises ConfigError for what this connector cannot serve."""
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    groups = kv_cache_config.kv_cache_groups
    tables, parts = page_tables(groups), sections(groups)
    for name in ("pipeline_parallel_size", "decode_context_parallel_size", "prefill_context_parallel_size"):
        if getattr(parallel, name, 1) > 1:
            raise ConfigError(
                name, getattr(parallel, name), "KV that is split this way is not supported", "Set it to 1."
            )
    spec = groups[tables.groups[0]].kv_cache_spec
    ranks = parallel.tensor_parallel_size
    page_tokens = spec.block_size
    recurrent = len(tables.groups) < len(groups)
    least = page_tokens if recurrent else DEFAULT_BLOCK_TOKENS  # a state stands behind any page
    block_tokens = options.block_tokens or -(-least // page_tokens) * page_tokens
    if block_tokens < 1 or block_tokens % page_tokens:
        raise ConfigError(
            "block_tokens", block_tokens, f"vLLM's block size is {page_tokens}", f"Use a multiple of {page_tokens}."
        )
    if any(0 < window < block_tokens for window in tables.windows):
        raise ConfigError(
            "block_tokens", block_tokens, f"layers of this model attend to {min(filter(None, tables.windows))} tokens",
            "Use fewer.",
        )  # fmt: skip
    cache_dtype = vllm_config.cache_config.cache_dtype
    layers, mla = sum(tables.layers), is_a(spec, "MLAAttentionSpec")
    kv_heads = 1 if mla else model.get_total_num_kv_heads()
    layouts: tuple[BlockLayout, ...] = ()
    device = vllm_config.device_config.device_type
    if device == "cuda":
        layouts = tuple(
            BlockLayout(
                tokens=block_tokens,
                layers=len(part.layers),
                kv_heads=kv_heads,
                head_dim=spec.head_size,
                itemsize=spec.dtype.itemsize,
                kv=1 if mla else 2,
                order="token_layer" if mla else "kv_head_token_layer",
            )
            for part in parts
        )
        block_bytes, layout = sum(layout.nbytes for layout in layouts), layouts[0].name
    else:
        block_bytes = spec.real_page_size_bytes * layers * (block_tokens // page_tokens) * ranks
        layout = _opaque_layout([groups[i] for i in tables.groups], kv_cache_config, ranks)
    namespace = Namespace(
        model=options.model or model_name(model.model),
        weights=options.weights or _weights(model),
        dtype=str(model.dtype if cache_dtype == "auto" else cache_dtype).removeprefix("torch."),
        layers=layers,
        kv_heads=kv_heads,
        head_dim=spec.head_size,
        attention=_attention(spec, parts),
        rope=rope_text(model.hf_text_config.to_dict()),
        block_tokens=block_tokens,
        layout=layout,
    )
    behind = states(groups, namespace, ranks, device)
    return Geometry(namespace, page_tokens, ranks, block_bytes, layouts, parts, tables, behind)


def request_seed(request: Any) -> bytes | None:
    """First parent of a request's chain, or None when what the request computes cannot be named by its tokens."""
    if request.prompt_embeds is not None or getattr(request, "resumable", False):
        return None
    lora = None
    if request.lora_request is not None and (lora := weights_digest(request.lora_request.lora_path)) is None:
        return None
    return chain_seed(cache_salt=request.cache_salt, lora=lora)


def multimodal_extra(request: Any, block_tokens: int) -> dict[int, bytes]:
    """Per block index, what the block's placeholder tokens stand for: content hash and position of each input in it."""
    parts: dict[int, list[str]] = {}
    for feature in request.mm_features or ():
        start, length = feature.mm_position.offset, feature.mm_position.length
        for index in range(start // block_tokens, (start + max(length, 1) - 1) // block_tokens + 1):
            parts.setdefault(index, []).append(f"{feature.identifier}@{start - index * block_tokens}")
    return {index: hashlib.sha256(json.dumps(names).encode()).digest() for index, names in parts.items()}


class Chain:
    """The blocks of one request, growing with its tokens."""

    def __init__(self, block_tokens: int, seed: bytes, extra: dict[int, bytes]) -> None:
        self._block_tokens = block_tokens
        self._parent = seed
        self._extra = extra
        self._digests: list[bytes] = []
        self.keys: list[BlockKey] = []
        """Key of every full block so far, as far as ``extend`` went."""

    def extend(self, tokens: Sequence[int], count: int, keyring: Keyring) -> None:
        """Make sure that the first ``count`` blocks of ``tokens`` (all tokens of the request) have keys."""
        known = len(self._digests)
        if count <= known:
            return
        size = self._block_tokens
        extra = {index - known: value for index, value in self._extra.items() if index >= known}
        fresh = chain_digests(tokens[known * size : count * size], size, self._parent, extra)
        self._digests += fresh
        self._parent = self._digests[-1]
        self.keys += keyring.block_keys(fresh)

    def block(self, index: int) -> NewBlock:
        return NewBlock(self.keys[index], self.keys[index - 1] if index else NO_PARENT, index)

    def states(self, blocks: range, keyring: Keyring) -> list[BlockKey]:
        """Keys of the states behind blocks that ``extend`` has reached; ``keyring`` is their namespace's."""
        return keyring.block_keys(self._digests[blocks.start : blocks.stop])


def _weights(model: Any) -> str:
    commit = getattr(model.hf_config, "_commit_hash", None) or model.revision
    dtype = str(model.dtype).removeprefix("torch.")
    return weights_revision(model.model, commit, dtype, model.quantization, "kv_connector_extra_config.weights")


def _attention(spec: Any, parts: Sequence[Section]) -> str:
    """What the layers attend to. Layers of several kinds are told apart by number, since that is how a block is laid out."""
    if is_a(spec, "MLAAttentionSpec"):
        return "mla"
    if len(parts) == 1 and is_a(spec, "FullAttentionSpec"):  # maybe window layers that keep all pages
        window = getattr(spec, "sliding_window", None)
        chunk = getattr(spec, "attention_chunk_size", None)
        return f"sliding_window:{window}" if window else f"chunked:{chunk}" if chunk else "gqa"
    return describe(parts)


def _opaque_layout(groups: Sequence[Any], kv_cache_config: Any, ranks: int) -> str:
    """Name of vLLM's own bytes on this kind of CPU: kernels pack a page by instruction set, and that may change by version."""
    spec = groups[0].kv_cache_spec
    amx = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()
    names = "\n\n".join("\n".join(group.layer_names) for group in groups)
    layers = hashlib.sha256(names.encode()).hexdigest()[:8]
    return ":".join(
        (
            "opaque:vllm-cpu",
            vllm.__version__.partition("+")[0],
            f"{platform.machine()}-{torch.backends.cpu.get_cpu_capability()}{'-amx' if amx else ''}",
            str(getattr(kv_cache_config, "kv_cache_layout", None)),
            "+".join(type(group.kv_cache_spec).__name__ for group in groups),
            f"page{spec.block_size}x{spec.page_size_bytes}",
            f"tp{ranks}",
            f"layers-{layers}",
        )
    )
