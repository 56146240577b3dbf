"""vLLM's KV cache groups: which layers go by which page table, and how far back each of them looks.

A hybrid model has layers that attend to every token and layers that attend to a window of the last ones. vLLM splits its layers
into groups, each with a page table of its own, and gives up a window layer's pages once the window has passed them. Our blocks
hold all layers all the same: while a block is being completed its pages are all there, if the window is no shorter than a
block. So one chain serves them all, and what is stored can be loaded up to any block. Only the pages that the engine keeps are
filled: all of the full-attention layers, the last window of the others. Recurrent layers keep no KV: ``states.py``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from connectors.paging.base import ABSENT
from kvstore.errors import ConfigError

NULL_PAGE = 0
"""In a page table of vLLM: no page, the window has passed. vLLM keeps page 0 for that."""


@dataclass(frozen=True, slots=True)
class Section:
    """Layers of one kind of attention: together they are one part of a block."""

    window: int
    """Tokens that a layer attends to; 0 for all."""
    layers: tuple[str, ...]
    """In the model's order."""
    tables: tuple[int, ...]
    """Which of the engine's page tables each layer goes by."""


@dataclass(frozen=True, slots=True)
class PageTables:
    """The engine's page tables, one for each KV cache group of attention layers."""

    windows: tuple[int, ...] = (0,)
    """Of each table: tokens back that its pages are kept; 0 for all."""
    layers: tuple[int, ...] = (1,)
    """Of each table: how many layers go by it."""
    groups: tuple[int, ...] = (0,)
    """Of each table: which of the engine's KV cache groups it belongs to."""

    @property
    def windowed(self) -> bool:
        return any(self.windows)

    def row(self, tables: Sequence[Sequence[int]], pages: range) -> tuple[int, ...]:
        """What ``BlockCopy.pages`` is of these pages of a request, whose tables of all groups are given."""
        row: list[int] = []
        for group, window in zip(self.groups, self.windows, strict=True):
            kept = tables[group][pages.start : pages.stop]
            row += [ABSENT if page == NULL_PAGE else page for page in kept] if window else kept
        return tuple(row)


ONE_TABLE = PageTables()


def is_a(spec: Any, name: str) -> bool:
    """Whether a KV cache spec is of a class of vLLM's, by name: the classes move between versions."""
    return any(base.__name__ == name for base in type(spec).__mro__)


def page_tables(groups: Sequence[Any]) -> PageTables:
    """Of ``KVCacheConfig.kv_cache_groups``. Raises ConfigError for groups whose KV our blocks cannot hold."""
    attending = {i: group.kv_cache_spec for i, group in enumerate(groups) if not is_a(group.kv_cache_spec, "MambaSpec")}
    specs = attending.values()
    if not specs:
        raise ConfigError(
            "kv_cache_groups", [type(group.kv_cache_spec).__name__ for group in groups],
            "a model without attention layers is not supported",
            "Put the store under vLLM's own offloading: docs/vllm.md says how.",
        )  # fmt: skip
    for spec in specs:
        if not is_a(spec, "FullAttentionSpec") and type(spec).__name__ != "SlidingWindowSpec":
            raise ConfigError(
                "kv_cache_groups", type(spec).__name__, "only full and sliding-window attention are supported",
                "Start vLLM without the KV store connector.",
            )  # fmt: skip
    shapes = {_shape(spec) for spec in specs}
    if len(shapes) > 1 or (len(specs) > 1 and any(is_a(spec, "MLAAttentionSpec") for spec in specs)):
        raise ConfigError(
            "kv_cache_groups", sorted(shapes), "groups of different page sizes are not supported",
            "Start vLLM with --disable-hybrid-kv-cache-manager, or without the KV store connector.",
        )  # fmt: skip
    windows = tuple(0 if is_a(spec, "FullAttentionSpec") else spec.sliding_window for spec in specs)
    return PageTables(windows, tuple(len(groups[i].layer_names) for i in attending), tuple(attending))


def sections(groups: Sequence[Any]) -> tuple[Section, ...]:
    """The parts of a block: layers that keep all tokens first, then by window. How vLLM grouped them does not show."""
    of_window: dict[int, list[tuple[str, int]]] = {}
    tables = page_tables(groups)
    for table, (group, window) in enumerate(zip(tables.groups, tables.windows, strict=True)):
        of_window.setdefault(window, []).extend((name, table) for name in groups[group].layer_names)
    found = []
    for window, layers in sorted(of_window.items()):
        names, theirs = zip(*sorted(layers, key=lambda layer: layer_numbers(layer[0])), strict=True)
        found.append(Section(window, names, theirs))
    return tuple(found)


def layer_numbers(name: str) -> list[int]:
    """``model.layers.12.self_attn.attn`` is layer 12."""
    return [int(number) for number in re.findall(r"\d+", name)]


def describe(parts: Sequence[Section]) -> str:
    """Which layers attend how, for a namespace: ``gqa@5,11+sliding_window:1024@0,1,2,3,4,6,7,8,9,10``."""
    kinds = [(f"sliding_window:{part.window}" if part.window else "gqa", part.layers) for part in parts]
    return "+".join(f"{kind}@{describe_layers(names)}" for kind, names in kinds) if len(parts) > 1 else kinds[0][0]


def describe_layers(names: Sequence[str]) -> str:
    """Their numbers."""
    return ",".join(".".join(map(str, layer_numbers(name))) or name for name in names)


def _shape(spec: Any) -> tuple[int, int, int, str]:
    return spec.block_size, spec.num_kv_heads, spec.head_size, str(spec.dtype)
