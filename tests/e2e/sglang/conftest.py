"""A node in a thread, SGLang's own host pools on a CPU, and our backend as SGLang makes it.

These files run in SGLang's virtual environment; ``test_sglang.py`` runs them there.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import sglang.srt.utils
import sglang.srt.utils.common
import torch
from sglang.srt.mem_cache.hicache_storage import HiCacheStorageConfig
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, MLATokenToKVPool
from sglang.srt.mem_cache.storage import StorageBackendFactory
from sglang.srt.server_args import ServerArgs, set_global_server_args_for_scheduler

from connectors.sglang import KVStoreStorage
from connectors.sglang.pages import page_view
from kvstore.testing.node import RunningNode

try:
    from sglang.srt.mem_cache.pool_host.mha import MHATokenToKVPoolHost
    from sglang.srt.mem_cache.pool_host.mla import MLATokenToKVPoolHost
except ImportError:  # 0.5.11
    from sglang.srt.mem_cache.memory_pool_host import MHATokenToKVPoolHost, MLATokenToKVPoolHost

sglang.srt.utils.get_device = sglang.srt.utils.common.get_device = lambda *_: "cpu"
"""SGLang's own test fixtures, imported later, find no device."""

LAYERS, HEADS, DIM, PAGE, PAGES = 2, 4, 16, 16, 12
LORA_RANK, ROPE_DIM = 48, 16
LAYOUTS = ("layer_first", "page_first", "page_first_direct", "page_head")

LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 64,
    "num_hidden_layers": LAYERS, "num_attention_heads": 8, "num_key_value_heads": HEADS, "head_dim": DIM, "vocab_size": 512,
    "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "hidden_act": "silu", "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "rope_theta": 10000.0,
}  # fmt: skip


def serve(folder: Path, arguments: dict[str, Any] | None = None, **changes: Any) -> None:
    """Make this process one that serves the model of ``LLAMA``, changed, with these server arguments."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**LLAMA, **changes}))
    set_global_server_args_for_scheduler(
        ServerArgs(model_path=str(folder), device="cpu", page_size=PAGE, **(arguments or {}))
    )


def mha_pool(layout: str, heads: int = HEADS, dtype: torch.dtype = torch.bfloat16, **options: Any) -> Any:
    """SGLang's host pool of one rank with ``heads`` KV heads."""
    device = MHATokenToKVPool(
        size=PAGE * PAGES // 2, page_size=PAGE, dtype=dtype, head_num=heads, head_dim=DIM, layer_num=LAYERS, device="cpu",
        enable_memory_saver=False,
    )  # fmt: skip
    return _host(MHATokenToKVPoolHost, device, "_mha_buffer_info", layout, **options)


def mla_pool(layout: str, dtype: torch.dtype = torch.bfloat16, **options: Any) -> Any:
    device = MLATokenToKVPool(
        size=PAGE * PAGES // 2, page_size=PAGE, dtype=dtype, kv_lora_rank=LORA_RANK, qk_rope_head_dim=ROPE_DIM,
        layer_num=LAYERS, device="cpu", enable_memory_saver=False,
    )  # fmt: skip
    return _host(MLATokenToKVPoolHost, device, "_mla_buffer_info", layout, target_layer_num=LAYERS, **options)


def _host(kind: type, device: Any, info: str, layout: str, **options: Any) -> Any:
    common = {
        "host_to_device_ratio": 2.0, "host_size": 0, "page_size": PAGE, "layout": layout, "pin_memory": False, "device": "cpu",
    }  # fmt: skip
    if not hasattr(device, info):  # older versions take the device pool itself
        options.pop("target_layer_num", None)
        return kind(device, **common, **options)
    newer = {"device_capacity_tokens": PAGE * PAGES // 2, "start_layer": 0, "end_layer": LAYERS}
    return kind(getattr(device, info)(), **common, **newer, **options)


def fill(pool: Any, seed: int) -> Any:
    """Random bytes everywhere, NaNs included."""
    raw = pool.kv_buffer.view(torch.uint8)
    raw.copy_(torch.randint(0, 256, raw.shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)))
    return pool


def slots(*pages: int) -> torch.Tensor:
    """SGLang's ``host_indices`` of these pages."""
    return torch.cat([torch.arange(page * PAGE, (page + 1) * PAGE) for page in pages])


def content(pool: Any, *pages: int) -> torch.Tensor:
    """What is in pages, as ``[kv, page, head, token, layer, byte]``."""
    return page_view(pool)[:, list(pages)].clone()


def hashes(count: int, prompt: int = 0) -> list[str]:
    """Page hashes of a prompt, as SGLang makes them."""
    digest, found = b"", []
    for page in range(count):
        tokens = b"".join((prompt * 1000 + page * PAGE + i).to_bytes(4, "little") for i in range(PAGE))
        digest = hashlib.sha256(digest + tokens).digest()
        found.append(digest.hex())
    return found


def wait(condition: Callable[[], Any], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.005)


@pytest.fixture(scope="session")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningNode]:
    with RunningNode(tmp_path_factory.mktemp("node"), "host.bytes=64MiB", "host.extent_bytes=4MiB") as node:
        yield node


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """The served model, another one in every test: so that tests share no block."""
    serve(tmp_path / "model")
    return tmp_path / "model"


Backends = Callable[..., KVStoreStorage]


@pytest.fixture
def backends(node: RunningNode, model: Path, tmp_path: Path) -> Iterator[Backends]:
    """Makes backends as SGLang does: through its factory, then with the host pools registered."""
    made: list[Any] = []

    def make(
        pool: Any,
        others: Sequence[tuple[str, Any]] = (),
        *,
        connected: bool = True,
        rank: Sequence[int] = (0, 1),
        **settings: Any,
    ) -> Any:
        extra = {
            "backend_name": "kvstore", "module_path": "connectors.sglang", "class_name": "KVStoreStorage", "interface_v1": 1,
            "socket": str(node.socket), "autostart": False, "weights": str(tmp_path), "lookup_timeout_s": 10.0, **settings,
        }  # fmt: skip
        backend = StorageBackendFactory.create_backend("dynamic", storage_config(pool, rank, extra), pool)
        backend.register_mem_pool_host(pool)
        for name, other in [("kv", pool), *others]:
            backend.register_mem_host_pool_v2(other, name)
        if hasattr(backend, "on_host_pools_registered"):
            backend.on_host_pools_registered()
        made.append(backend)
        if connected:
            wait(lambda: all(p._link.keyring is not None for p in backend._pools.values()))
        return backend

    yield make
    for backend in made:
        backend.close()


def storage_config(pool: Any, rank: Sequence[int] = (0, 1), extra: dict[str, Any] | None = None, **more: Any) -> Any:
    values = {
        "tp_rank": rank[0], "tp_size": rank[1], "pp_rank": 0, "pp_size": 1, "attn_cp_rank": 0, "attn_cp_size": 1,
        "is_mla_model": isinstance(pool, MLATokenToKVPoolHost), "enable_storage_metrics": False,
        "is_page_first_layout": False, "model_name": "m", "extra_config": extra or {},
    }  # fmt: skip
    return HiCacheStorageConfig(**{**values, **more})
