"""SGLang's HiCache storage backend over the store.

``--enable-hierarchical-cache --hicache-storage-backend dynamic --hicache-storage-backend-extra-config '{"backend_name":
"kvstore", "module_path": "connectors.sglang", "class_name": "KVStoreStorage", "interface_v1": 1,
"hicache_storage_pass_prefix_keys": true}'``
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from connectors.sglang.backend import KVStoreStorage

__all__ = ["KVStoreStorage"]


def __getattr__(name: str) -> Any:
    """The class on first use: this package is also imported where SGLang is not wanted."""
    if name != "KVStoreStorage":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from connectors.sglang.backend import KVStoreStorage

    return KVStoreStorage
