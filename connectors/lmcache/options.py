"""What ``adapter_params`` may hold."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from connectors import settings
from kvstore.config.schema import default_directory
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
    otlp_endpoint: str = ""
    """Send spans of lookups, loads and saves to this OpenTelemetry collector, as ``http://127.0.0.1:4318``; empty: none."""
    trace_sample_ratio: float = 0.01
    """Share of them that are traced: LMCache hands no trace headers on."""
    names: str = ""
    """File with the names of chunks, for listings; empty for ``lmcache-names.db`` in the default of ``node.directory``."""

    @property
    def names_file(self) -> Path:
        return Path(self.names) if self.names else default_directory() / "lmcache-names.db"

    @classmethod
    def parse(cls, params: dict[str, Any]) -> Options:
        """Check settings that came from outside. Raises ConfigError naming the setting."""
        options = settings.parse(cls, params, "adapter_params")
        for name in ("chunk_tokens", "workers"):
            if getattr(options, name) < 1:
                raise ConfigError(f"adapter_params.{name}", getattr(options, name), "not positive", "Use 1 or more.")
        if not 0 <= options.trace_sample_ratio <= 1:
            name, value = "adapter_params.trace_sample_ratio", options.trace_sample_ratio
            raise ConfigError(name, value, "not from 0 to 1", "Give it about 0.01.")
        return options
