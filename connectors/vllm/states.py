"""Recurrent layers (Mamba, linear attention, short convolutions): the state behind a prompt's last block.

Such a layer keeps no KV of each token but one state of all tokens so far. vLLM keeps a copy of it where a step ends at a page
boundary, and says which page that is with the step that writes it. Those of all recurrent layers become a block of their own,
in a namespace of their own, whose parent is the block that they stand behind. So what a request can load is its blocks up to one
that has a state, and that state, as one chain: what is hot, kept, sent to another region or deleted is the chain.

The bytes are the engine's own, of every rank: they go back to the same version of vLLM at the same TP degree only.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import vllm

from connectors.vllm.groups import NULL_PAGE, describe_layers, is_a, layer_numbers
from connectors.vllm.share import Share
from kvstore.errors import ConfigError
from kvstore.identity import Namespace
from kvstore.layout import BlockLayout
from kvstore.node.api import Lookup

try:  # vLLM 0.32 and later hand states over
    from vllm.v1.core.sched.output import KVConnectorBlockState
except ImportError:
    KVConnectorBlockState = None

Handed = tuple[int, int, int]
"""KV cache group, page, and how many tokens the state on it is of."""


@dataclass(frozen=True, slots=True)
class States:
    """How the engine's states become our blocks."""

    namespace: Namespace
    layers: tuple[str, ...]
    """In the model's order."""
    tables: tuple[int, ...]
    """Which of ``groups`` each layer goes by."""
    groups: tuple[int, ...]
    """The engine's KV cache groups that hold states; each gives one page a state."""
    heads: int
    """Of one rank's state of one layer."""
    head_bytes: int
    ranks: int

    @property
    def block_bytes(self) -> int:
        return self.layout.nbytes

    @property
    def layout(self) -> BlockLayout:
        """Of a state, as a block of one token whose heads are those of all ranks."""
        return BlockLayout(
            tokens=1, layers=len(self.layers), kv_heads=self.ranks * self.heads, head_dim=self.head_bytes, itemsize=1,
            kv=1, order="kv_head_token_layer",
        )  # fmt: skip

    def share(self, rank: int) -> Share:
        """What a rank writes of a state."""
        return Share(self.namespace, rank, self.ranks, len(self.layers) * self.heads * self.head_bytes, 0)

    def pages(self, tables: Sequence[Sequence[int]], tokens: int) -> tuple[int, ...]:
        """Where a request, whose page tables these are, keeps its state of ``tokens`` tokens."""
        return tuple(tables[group][tokens // self.namespace.block_tokens - 1] for group in self.groups)

    def complete(self, handed: Iterable[Handed]) -> dict[int, tuple[int, ...]]:
        """Pages of the states that all groups have and that stand behind a block, by how many tokens they are of."""
        found: dict[int, dict[int, int]] = defaultdict(dict)
        for group, page, tokens in handed:
            if page != NULL_PAGE and tokens % self.namespace.block_tokens == 0:
                found[tokens][group] = page
        return {
            tokens: tuple(pages[group] for group in self.groups)
            for tokens, pages in found.items()
            if pages.keys() >= set(self.groups)
        }


def loadable(found: Lookup, asked: int, held: Sequence[bool]) -> Lookup:
    """What can be loaded by an answer about ``asked`` blocks and the state behind the last of them: up to a block with a state.

    ``held``: which of the blocks have one in the store.
    """
    whole = found.blocks > asked

    def usable(blocks: int) -> int:
        if whole and blocks >= asked:
            return asked
        return max((index + 1 for index in range(min(blocks, asked - 1)) if held[index]), default=0)

    plan = found.plan and replace(found.plan, blocks=usable(found.plan.blocks))
    return replace(found.first(usable(found.blocks)), plan=plan)


def states(groups: Sequence[Any], blocks: Namespace, ranks: int, device: str) -> States | None:
    """Of ``KVCacheConfig.kv_cache_groups``; None without recurrent layers. ``blocks`` is the namespace of the model's other KV.

    Raises ConfigError for states that vLLM does not hand over, or that cannot be stored.
    """
    found = [(index, group) for index, group in enumerate(groups) if is_a(group.kv_cache_spec, "MambaSpec")]
    if not found:
        return None
    specs = [group.kv_cache_spec for _, group in found]
    spec = specs[0]
    if KVConnectorBlockState is None:
        raise ConfigError(
            "kv_cache_groups", type(spec).__name__, "this vLLM does not hand over the state of recurrent layers",
            "Use vLLM 0.32 or later.",
        )  # fmt: skip
    if spec.mamba_cache_mode != "align":
        raise ConfigError(
            "mamba_cache_mode", spec.mamba_cache_mode, "states are stored where vLLM keeps them at page boundaries",
            "Start vLLM with --enable-prefix-caching --mamba-cache-mode align.",
        )  # fmt: skip
    if len({(each.shapes, each.dtypes, each.block_size, each.num_heads) for each in specs}) > 1:
        raise ConfigError(
            "kv_cache_groups", [each.shapes for each in specs], "recurrent layers of different kinds are not supported",
            "Start vLLM without the KV store connector.",
        )  # fmt: skip
    if blocks.block_tokens != spec.block_size:
        raise ConfigError(
            "block_tokens", blocks.block_tokens, f"vLLM keeps states at pages of {spec.block_size} tokens",
            f"Leave it out, or set it to {spec.block_size}.",
        )  # fmt: skip
    layers = sorted(
        ((name, table) for table, (_, group) in enumerate(found) for name in group.layer_names),
        key=lambda layer: layer_numbers(layer[0]),
    )
    names, tables = zip(*layers, strict=True)
    kind = str(getattr(spec.mamba_type, "value", spec.mamba_type)).lower()
    namespace = replace(
        blocks,
        layers=len(names),
        attention=f"state:{kind}@{describe_layers(names)}",
        layout=_layout(spec, names, ranks, device),
        group=1,
    )
    return States(
        namespace, names, tables, tuple(index for index, _ in found), spec.num_heads,
        spec.real_page_size_bytes // spec.num_heads, ranks,
    )  # fmt: skip


def _layout(spec: Any, names: Sequence[str], ranks: int, device: str) -> str:
    """Name of vLLM's own bytes: which tensors a page holds, of which shape each."""
    tensors = "+".join(
        f"{str(dtype).removeprefix('torch.')}[{'x'.join(map(str, shape))}]"
        for shape, dtype in zip(spec.shapes, spec.dtypes, strict=True)
    )
    layers = hashlib.sha256("\n".join(names).encode()).hexdigest()[:8]
    version = vllm.__version__.partition("+")[0]
    return f"opaque:vllm-state:{version}:{device}:{tensors}:tp{ranks}:layers-{layers}"
