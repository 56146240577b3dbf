"""LMCache L2 backends over the store; see ``docs/lmcache.md``.

``--l2-adapter '{"type": "plugin", "module_path": "connectors.lmcache", "class_name": "KVStoreAdapter"}'`` (leases, status), or
``{"type": "native_plugin", "module_path": "connectors.lmcache", "class_name": "KVStoreConnector", ...}``.
"""

from typing import TYPE_CHECKING, Any

from connectors.lmcache.connector import KVStoreConnector

if TYPE_CHECKING:
    from connectors.lmcache.adapter import KVStoreAdapter

__all__ = ["KVStoreAdapter", "KVStoreConnector"]


def __getattr__(name: str) -> Any:
    """The adapter on first use: it imports LMCache, which the connector does not need."""
    if name != "KVStoreAdapter":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from connectors.lmcache.adapter import KVStoreAdapter

    return KVStoreAdapter
