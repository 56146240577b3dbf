"""Every difference between SGLang 0.5.11 and 0.5.23 that matters to us, in one place."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

try:  # 0.5.17 and later
    from sglang.srt.runtime_context import get_server_args as server_args
except ImportError:
    from sglang.srt.server_args import get_global_server_args as server_args

try:  # 0.5.19 and later: a page's hash covers LoRA adapter and cache salt
    from sglang.srt.mem_cache.utils import storage_namespace_seed as _seed
except ImportError:
    _seed = None

from sglang.srt.observability.metrics_collector import StorageMetrics

__all__ = [
    "StorageMetrics",
    "hashes_name_adapters",
    "is_writer",
    "model_config",
    "prefix_of",
    "server_args",
    "sglang_version",
]


def sglang_version() -> str:
    try:
        return version("sglang")
    except PackageNotFoundError:
        return "unknown"


def model_config() -> Any:
    """SGLang's ``ModelConfig`` of the model that this process serves."""
    arguments = server_args()
    if hasattr(arguments, "get_model_config"):
        return arguments.get_model_config()
    from sglang.srt.runtime_context import process_model_config  # later versions

    return process_model_config()


def hashes_name_adapters() -> bool:
    """Whether two requests with the same tokens but other LoRA adapters have other page hashes."""
    return _seed is not None


def is_writer(config: Any) -> bool:
    """Whether this rank writes KV that all ranks hold alike."""
    known = getattr(config, "is_storage_writer", None)
    return bool(config.tp_rank == 0 if known is None else known)


def prefix_of(extra_info: Any) -> Sequence[str]:
    """Page hashes before the ones of a call; empty at the start of a prompt, and where SGLang does not say.

    The default of the field is ``(None,)`` in 0.5.11, None later.
    """
    prefix = getattr(extra_info, "prefix_keys", None) or ()
    return [] if None in prefix else prefix
