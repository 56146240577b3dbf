"""A third reader and writer of blocks, beside the engines: KV as the model's reference implementation computes it."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kvstore.identity import NO_PARENT, BlockKey, Namespace, chain_digests
from kvstore.node.api import NewBlock
from kvstore.node.client import Client


class ReferenceModel:
    """A model in transformers, float32, that shares canonical blocks with the engines of one namespace. Grouped queries only."""

    def __init__(self, model: Path, status: dict[str, Any], device: str = "cpu") -> None:
        """``status``: of a node on which exactly one engine's canonical namespace is known."""
        self._torch: Any = importlib.import_module("torch")
        self._transformers: Any = importlib.import_module("transformers")
        self._device = device
        load = self._transformers.AutoModelForCausalLM.from_pretrained
        self._model = load(model, dtype=self._torch.float32).to(device)
        self._model.generation_config.eos_token_id = None
        (fields,) = [n["fields"] for n in status["namespaces"] if n["fields"]["layout"].startswith("canonical")]
        self.namespace = ns = Namespace.from_dict(fields)
        self._shape = (2, ns.kv_heads, ns.block_tokens, ns.layers, ns.head_dim)
        self._nbytes = 4 * int(np.prod(self._shape))

    def save(self, client: Client, tokens: Sequence[int]) -> int:
        """Compute the KV of a prompt and store its full blocks; how many."""
        with self._torch.no_grad():
            cache = self._model(self._tensor([tokens]), use_cache=True).past_key_values
        keys, size = self._keys(client, tokens), self.namespace.block_tokens
        parents = [NO_PARENT, *keys]
        blocks = [NewBlock(key, parents[i], i) for i, key in enumerate(keys)]
        reserved = client.reserve(self.namespace, blocks)
        for index, offset in enumerate(reserved.offsets):
            assert offset is not None, reserved.misses
            block = self._block(reserved.arena.slot(offset, self._nbytes))
            for layer, part in enumerate(cache.layers):
                for half, tensor in enumerate((part.keys, part.values)):
                    block[half, :, :, layer] = tensor[0, :, index * size : (index + 1) * size].cpu().numpy()
        return len(client.commit(keys))

    def resume(self, client: Client, tokens: Sequence[int], count: int) -> list[int]:
        """Load the KV of a prompt's full blocks, all of which must be stored, and continue it greedily from there.

        The end of the text is a token like any other, as for an engine that is told to ignore it.
        """
        keys = self._keys(client, tokens[:-1])  # the last token is always computed
        acquired = client.acquire(keys, 5)
        assert len(acquired.offsets) == len(keys)
        cache = self._transformers.DynamicCache()
        for offset in acquired.offsets:
            block = self._block(acquired.arena.slot(offset, self._nbytes))
            for layer in range(self.namespace.layers):
                cache.update(*(self._tensor(block[half, None, :, :, layer]) for half in (0, 1)), layer)
        client.release(keys)
        out = self._model.generate(
            self._tensor([tokens]),
            past_key_values=cache,
            max_new_tokens=count,
            do_sample=False,
        )
        found: list[int] = out[0, len(tokens) :].tolist()
        return found

    def _tensor(self, values: Any) -> Any:
        return self._torch.tensor(values, device=self._device)

    def _keys(self, client: Client, tokens: Sequence[int]) -> list[BlockKey]:
        digests = chain_digests(list(tokens), self.namespace.block_tokens)
        return client.open_namespace(self.namespace, self._nbytes).block_keys(digests)

    def _block(self, payload: memoryview) -> npt.NDArray[np.float32]:
        return np.frombuffer(payload, np.float32).reshape(self._shape)
