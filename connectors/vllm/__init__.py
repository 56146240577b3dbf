"""vLLM's KV connector for the store.

``--kv-transfer-config '{"kv_connector": "KVStoreConnector", "kv_connector_module_path": "connectors.vllm",
"kv_role": "kv_both", "kv_load_failure_policy": "recompute"}'``
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from connectors.vllm.connector import KVStoreConnector

__all__ = ["KVStoreConnector"]


def __getattr__(name: str) -> Any:
    """The class on first use: this package is also imported where vLLM is not wanted."""
    if name != "KVStoreConnector":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from connectors.vllm.connector import KVStoreConnector

    return KVStoreConnector
