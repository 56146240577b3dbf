"""What the node is told of a request besides its keys."""

from __future__ import annotations

from typing import Any

from connectors.weights import weights_digest
from kvstore.node.api import About
from kvstore.tracing import MAX_CHARS


def traceparent(request: Any) -> str:
    """The trace that the engine's caller sent along; what is no such header is nobody's parent."""
    return str((getattr(request, "trace_headers", None) or {}).get("traceparent", ""))[:MAX_CHARS]


def about(request: Any, seed: bytes) -> About:
    """Names a request, so that ``kvstore explain`` finds it. ``seed`` as from ``request_seed``."""
    lora = request.lora_request
    return About(request.request_id, seed, (weights_digest(lora.lora_path) if lora else None) or "")
