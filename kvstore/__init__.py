"""KV-cache persistence and sharing for LLM inference: identity, tiers, the node and its client."""

from kvstore.identity import BlockKey, Namespace
from kvstore.node.client import AsyncClient, Client

__all__ = ["AsyncClient", "BlockKey", "Client", "Namespace", "__version__"]

__version__ = "0.1.0"
