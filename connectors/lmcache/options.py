"""What ``adapter_params`` may hold."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from kvstore.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Settings of the backend. The node has its own configuration."""

    socket: str = ""
    """Where the node listens; empty for the default."""
    autostart: bool = True
    """Start a node when none answers."""
    load_timeout_s: float = 10.0
    """A load that takes longer ends, and what it has not brought is computed."""
    weights: str = ""
    """Revision of the weights. LMCache's keys name only the model: set this wherever two revisions share a name."""
    dtype: str = ""
    """Type of the KV elements, for the same reason."""
    chunk_tokens: int = 256
    """LMCache's ``--chunk-size``."""
    workers: int = 4
    """Threads that copy."""

    @classmethod
    def parse(cls, params: dict[str, Any]) -> Options:
        """Check settings that came from outside. Raises ConfigError naming the setting."""
        kinds = {field.name: type(field.default) for field in fields(cls)}
        for name, value in params.items():
            if name not in kinds:
                raise ConfigError(f"adapter_params.{name}", value, "no such setting", f"Known: {', '.join(kinds)}.")
            kind = kinds[name]
            if type(value) is not kind and not (kind is float and type(value) is int):
                raise ConfigError(f"adapter_params.{name}", value, f"not a {kind.__name__}", "Correct the type.")
        options = cls(**params)
        for name in ("chunk_tokens", "workers"):
            if getattr(options, name) < 1:
                raise ConfigError(f"adapter_params.{name}", getattr(options, name), "not positive", "Use 1 or more.")
        return options
