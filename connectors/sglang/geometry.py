"""Which blocks the pages of a host pool are: namespace, bytes, and what part of a block this rank holds."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch

from connectors.modelid import model_name, rope_text, weights_revision
from connectors.sglang.compat import hashes_name_adapters, is_writer, model_config, server_args, sglang_version
from connectors.sglang.options import SETTING, Options
from connectors.sglang.pages import CanonicalPages, OpaquePages, Pages, is_mla, is_plain
from connectors.weights import weights_digest
from kvstore.errors import ConfigError, IdentityError
from kvstore.identity import Namespace, chain_seed
from kvstore.layout import BlockLayout

logger = logging.getLogger("kvstore")

KV = "kv"
"""SGLang's name of the pool that pages of tokens are looked up in."""
_SHARDED_STATE = "mamba"
"""The pool that ranks split even when they hold KV alike."""


@dataclass(frozen=True, slots=True)
class Binding:
    """A host pool, and what its pages are in the store."""

    namespace: Namespace
    pages: Pages
    part: int | None
    """Which part of a block this rank writes; None: another rank writes the same."""
    parts: int


@dataclass(frozen=True, slots=True)
class Model:
    """What shapes KV besides the geometry of its pages."""

    name: str
    weights: str
    rope: str
    attention: str
    layers: int
    kv_heads: int
    kv_dtype: str
    """What the user asked the KV cache to be."""
    lora: str

    @classmethod
    def served(cls, options: Options) -> Model:
        """The model of this process. Raises ConfigError for one whose KV its page hashes do not name."""
        config, arguments = model_config(), server_args()
        text = config.hf_text_config
        window = getattr(text, "sliding_window", None) if getattr(text, "use_sliding_window", True) else None
        commit = getattr(config.hf_config, "_commit_hash", None) or config.revision
        return cls(
            name=options.model or model_name(config.model_path),
            weights=options.weights
            or weights_revision(
                config.model_path, commit, _plain(config.dtype), config.quantization, f"{SETTING}.weights"
            ),
            rope=rope_text(text.to_dict()),
            attention=f"sglang_window:{window}" if window else "gqa",
            layers=text.num_hidden_layers,
            kv_heads=config.get_total_num_kv_heads(),
            kv_dtype=str(getattr(arguments, "kv_cache_dtype", None) or "auto"),
            lora=_adapters(arguments),
        )


def bind(name: str, pool: Any, config: Any, options: Options) -> Binding:
    """How pages of host pool ``name`` are kept, for the rank that SGLang's storage ``config`` names.

    Raises ConfigError, naming the setting, for what this backend cannot serve.
    """
    for field in ("attn_cp_size", "dcp_size"):
        if getattr(config, field, 1) > 1:
            raise ConfigError(
                field, getattr(config, field), "KV that is split this way is not supported", "Set it to 1."
            )
    model = Model.served(options)
    if name == KV and is_plain(pool) and config.pp_size == 1:
        try:
            return _canonical(pool, config, model)
        except IdentityError as error:
            logger.warning("KV store: pages are kept in SGLang's own order, for SGLang alone: %s", error)
    try:
        return _opaque(name, pool, config, model)
    except IdentityError as error:
        raise ConfigError(
            "hicache_mem_layout", getattr(pool, "layout", None), str(error), "Use page_first, page_head or layer_first."
        ) from error


def _canonical(pool: Any, config: Any, model: Model) -> Binding:
    mla = is_mla(pool)
    layout = BlockLayout(
        tokens=pool.page_size,
        layers=model.layers,
        kv_heads=1 if mla else model.kv_heads,
        head_dim=pool.kv_cache_dim if mla else pool.head_dim,
        itemsize=pool.dtype.itemsize,
        kv=1 if mla else 2,
        order="token_layer" if mla else "kv_head_token_layer",
    )
    heads = (0, 1) if mla else layout.rank_heads(config.tp_rank, config.tp_size)
    pages = CanonicalPages(pool, layout, heads)
    namespace = Namespace(
        model=model.name,
        weights=model.weights,
        dtype=_element(pool, model),
        layers=layout.layers,
        kv_heads=layout.kv_heads,
        head_dim=layout.head_dim,
        attention="mla" if mla else model.attention,
        rope=model.rope,
        block_tokens=layout.tokens,
        layout=layout.name,
        lora=model.lora,
    )
    parts = 1 if mla else min(config.tp_size, layout.kv_heads)
    replicas = config.tp_size // parts
    writes = is_writer(config) if mla else config.tp_rank % replicas == 0
    part = 0 if mla else config.tp_rank // replicas
    return Binding(namespace, pages, part if writes else None, parts)


def _opaque(name: str, pool: Any, config: Any, model: Model) -> Binding:
    """Each rank's pages by themselves: they go back to the same rank of the same version only.

    Hybrid models' pools, pipeline stages (a block has no parts of layers), and pools in an order that we do not know.
    """
    pages = OpaquePages(pool)
    replicated = config.is_mla_model and name != _SHARDED_STATE
    layout = (
        "opaque:sglang", sglang_version(), name, type(pool).__name__, str(getattr(pool, "layout", "")),
        f"page{pages.page_tokens}x{pages.block_bytes}",
        "replicated" if replicated else f"tp{config.tp_rank}of{config.tp_size}",
        f"pp{config.pp_rank}of{config.pp_size}",
    )  # fmt: skip
    namespace = Namespace(
        model=model.name,
        weights=model.weights,
        dtype=_element(pool, model),
        layers=max(int(getattr(pool, "layer_num", 1) or 1), 1),
        kv_heads=1,
        head_dim=1,
        attention="opaque",
        rope=model.rope,
        block_tokens=pages.page_tokens,
        layout=":".join(layout),
        lora=model.lora,
    )
    return Binding(namespace, pages, None if replicated and not is_writer(config) else 0, 1)


def _adapters(arguments: Any) -> str:
    """Digest of the LoRA adapters that the server starts with; empty when it serves none.

    A page's hash names an adapter by its path, which may hold another one tomorrow.
    """
    if not getattr(arguments, "enable_lora", None) and not getattr(arguments, "lora_paths", None):
        return ""
    if not hashes_name_adapters():
        raise ConfigError(
            "enable_lora", True, f"page hashes of SGLang {sglang_version()} do not tell adapters apart",
            "Use a newer SGLang, or serve adapters without the store.",
        )  # fmt: skip
    found = {}
    for adapter in arguments.lora_paths or ():
        path = str(getattr(adapter, "lora_path", adapter))
        found[path] = weights_digest(path) or path
    return chain_seed(enabled="1", **found).hex()[:32]


def _element(pool: Any, model: Model) -> str:
    """Type of an element. Pools keep quantised KV as plain bytes, with scales of SGLang's own: it is not shared."""
    dtype = getattr(pool, "dtype", None)
    shareable = isinstance(dtype, torch.dtype) and dtype.is_floating_point and dtype.itemsize > 1
    return _plain(dtype) if shareable else f"sglang:{model.kv_dtype}:{_plain(dtype)}"


def _plain(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")
