"""Lets the real SGLang engine with HiCache run on a CPU. Python imports this at start when the folder is on PYTHONPATH.

SGLang's wheel is made for GPUs. On a CPU its engine needs three things more, which this file gives to every process of it:

* stand-ins for packages that are imported and not used there (torchvision from PyPI brings a CUDA torch; triton is 1 GB);
* the copies between device and host pool that its CUDA package has (``io_backend=direct``; with ``page_head``, ``kernel``);
* host pools that are not pinned, and that do not insist on 10 GiB of free memory beside them.

Engines from 0.5.11 on run with it: ``older_sglang.py``.
"""

from __future__ import annotations

import ctypes
import importlib.abc
import importlib.machinery
import inspect
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from older_sglang import allocate_on_a_cpu

ABSENT = {"torchvision", "datasets", "vllm", "triton"}


def _is_dunder(name: str) -> bool:
    return name.startswith("__") and name.endswith("__")


class _Anything:
    """Any attribute, call or index gives another one; as a decorator it gives the function back."""

    def __getattr__(self, name: str) -> Any:
        if _is_dunder(name):
            raise AttributeError(name)
        return "cpu" if name == "backend" else _Anything()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return args[0] if len(args) == 1 and not kwargs and isinstance(args[0], types.FunctionType) else self

    def __getitem__(self, key: Any) -> Any:
        return self

    def __iter__(self) -> Iterator[Any]:
        return iter(())

    def __or__(self, other: Any) -> Any:
        return self

    __ror__ = __or__

    def __mro_entries__(self, bases: Any) -> tuple[type]:
        return (object,)


class _AnyClass(type):
    def __getattr__(cls, name: str) -> Any:
        if _is_dunder(name):
            raise AttributeError(name)
        return _Anything()


class _AnyModule(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        if _is_dunder(name):
            raise AttributeError(name)
        if not name[:1].isupper():
            return _Anything()
        made = _AnyClass(name, (), {"__init__": lambda self, *args, **kwargs: None})
        setattr(self, name, made)
        return made


class _StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if name.split(".")[0] in ABSENT else None

    def create_module(self, spec: Any) -> types.ModuleType:
        module = _AnyModule(spec.name)
        module.__path__ = []
        module.__version__ = "0.0.0"
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        """Nothing to run."""


class _AfterImport(importlib.abc.MetaPathFinder):
    """Calls a function with a module once that has been imported."""

    def __init__(self, patches: dict[str, Callable[[Any], None]]) -> None:
        self._patches = patches

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name not in self._patches:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module: types.ModuleType) -> None:
            execute(module)
            self._patches[name](module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _copies_on_a_cpu(mha: Any) -> None:
    """Layer-first device pools to and from host pools; half 0 is K, half 1 is V. The arguments are named as SGLang names them."""

    def transfer_kv_direct(
        src_layers: Any, dst_layers: Any, src_indices: Any, dst_indices: Any, page_size: int
    ) -> None:
        for source, target in zip(src_layers, dst_layers, strict=True):
            target[dst_indices] = source[src_indices]

    def transfer_kv_all_layer_direct_lf_pf(
        src_ptrs: Sequence[Any], dst_ptrs: Sequence[Any], src_indices: Any, dst_indices: Any, page_size: int
    ) -> None:
        layers, pages = len(src_ptrs) // 2, dst_indices[::page_size] // page_size
        for half in (0, 1):
            for layer in range(layers):
                rows = src_ptrs[half * layers + layer][src_indices]
                dst_ptrs[half][pages, layer] = rows.reshape(len(pages), page_size, *rows.shape[1:])

    def transfer_kv_per_layer_direct_pf_lf(
        src_ptrs: Sequence[Any],
        dst_ptrs: Sequence[Any],
        src_indices: Any,
        dst_indices: Any,
        layer_id: int,
        page_size: int,
    ) -> None:
        pages = src_indices[::page_size] // page_size
        for half in (0, 1):
            dst_ptrs[half][dst_indices] = src_ptrs[half][pages, layer_id].flatten(0, 1)

    def transfer_kv_all_layer_lf_ph(
        src_k_layers: Any,
        dst_k: Any,
        src_v_layers: Any,
        dst_v: Any,
        src_indices: Any,
        dst_indices: Any,
        page_size: int,
        **sizes: int,
    ) -> None:
        for addresses, target in ((src_k_layers, dst_k), (src_v_layers, dst_v)):
            for layer, address in enumerate(addresses.tolist()):
                memory = (ctypes.c_uint8 * ((int(src_indices.max()) + 1) * sizes["item_size"])).from_address(address)
                rows = mha.torch.frombuffer(memory, dtype=target.dtype).view(-1, target.shape[1], target.shape[-1])
                target[dst_indices // page_size, :, dst_indices % page_size, layer] = rows[src_indices]

    def transfer_kv_per_layer_ph_lf(
        src_k: Any,
        dst_k: Any,
        src_v: Any,
        dst_v: Any,
        src_indices: Any,
        dst_indices: Any,
        layer_id: int,
        page_size: int,
        **sizes: int,
    ) -> None:
        for source, target in ((src_k, dst_k), (src_v, dst_v)):
            target[dst_indices] = source[src_indices // page_size, :, src_indices % page_size, layer_id]

    for copy in (
        transfer_kv_direct,
        transfer_kv_all_layer_direct_lf_pf,
        transfer_kv_per_layer_direct_pf_lf,
        transfer_kv_all_layer_lf_ph,
        transfer_kv_per_layer_ph_lf,
    ):
        setattr(mha, copy.__name__, copy)

    pool = mha.MHATokenToKVPoolHost
    original, signature = pool.__init__, inspect.signature(pool.__init__)

    def unpinned(self: Any, *args: Any, **kwargs: Any) -> None:
        bound = signature.bind(self, *args, **kwargs)
        bound.arguments["pin_memory"] = False
        original(*bound.args, **bound.kwargs)

    pool.__init__ = unpinned


def _no_reserve(base: Any) -> None:
    base.HICACHE_HOST_MEMORY_RESERVE_BYTES = 0


def _pools_of_one_file(pools: Any) -> None:
    """SGLang 0.5.11, whose host pools are all in one file, which imports the CUDA package wherever it runs."""
    if getattr(pools, "MHATokenToKVPoolHost", type).__module__ == pools.__name__:
        _copies_on_a_cpu(pools)
        _no_reserve(pools)


POOLS = "sglang.srt.mem_cache.pool_host"
sys.modules["sgl_kernel.kvcacheio"] = _AnyModule("sgl_kernel.kvcacheio")
sys.meta_path.insert(0, _StandIns())
sys.meta_path.insert(
    0,
    _AfterImport(
        {
            f"{POOLS}.mha": _copies_on_a_cpu,
            f"{POOLS}.base": _no_reserve,
            "sglang.srt.mem_cache.memory_pool_host": _pools_of_one_file,
            "sglang.srt.mem_cache.allocator": allocate_on_a_cpu,
            "sglang.srt.mem_cache.allocator.paged": allocate_on_a_cpu,
        }
    ),
)
