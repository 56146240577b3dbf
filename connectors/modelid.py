"""What names a model in a namespace, from the configuration that every engine reads: so that all engines find the same words."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from connectors.weights import weights_digest
from kvstore.errors import ConfigError


def model_name(model: str) -> str:
    """A local folder's name, or the hub's name of the model: where it lies on this machine does not matter."""
    return Path(model).resolve().name if Path(model).is_dir() else model


def weights_revision(model: str, commit: str | None, dtype: str, quantization: str | None, setting: str) -> str:
    """A digest of local files, or the hub's commit; and what the engine does to the weights while it loads them.

    Raises ConfigError when neither is known; ``setting`` is what its reader may set instead.
    """
    found = weights_digest(model) if Path(model).is_dir() else commit
    if not found:
        raise ConfigError("weights", model, "the revision of the weights is unknown", f"Set {setting}.")
    return ":".join(part for part in (found, dtype, quantization) if part)


def rope_text(config: Mapping[str, Any]) -> str:
    """Canonical text of all that a model's configuration (as a dict) says about rotary embeddings; empty for nothing.

    ``type`` is an older word for ``rope_type``; some engines add it to the configuration that they read.
    """
    chosen = {name: _plain(value) for name, value in config.items() if "rope" in name or "rotary" in name}
    return json.dumps(chosen, sort_keys=True, default=str, separators=(",", ":")) if any(chosen.values()) else ""


def _plain(value: Any) -> Any:
    if not isinstance(value, Mapping):
        return value
    plain = {name: _plain(item) for name, item in value.items()}
    kind = plain.pop("type", None)
    return {"rope_type": kind, **plain} if kind is not None and "rope_type" not in plain else plain
