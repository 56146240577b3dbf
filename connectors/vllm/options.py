"""What ``kv_connector_extra_config`` may hold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from connectors import settings
from kvstore.errors import ConfigError

MAX_PREVIEW_TOKENS = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Settings of the connector. The node has its own configuration."""

    socket: str = ""
    """Where the node listens; empty for the default."""
    autostart: bool = True
    """Start a node when none answers."""
    lookup_timeout_s: float = 0.05
    """An answer that takes longer counts as "nothing stored": vLLM's scheduler waits for it."""
    load_timeout_s: float = 10.0
    """A load that takes longer ends, and what it has not brought is computed."""
    block_tokens: int = 0
    """Tokens of a stored block, a multiple of vLLM's block size; 0 for 64, or vLLM's block size when that is larger."""
    model: str = ""
    """Name of the model; empty for vLLM's, without the folder."""
    weights: str = ""
    """Revision of the weights; empty for the hub's commit or a digest of the local files."""
    content_fingerprints: bool = False
    """Tell the node what prompts consist of, as keyed hashes, for ``kvstore breakers``; see ``connectors.vllm.describe``."""
    preview_tokens: int = 0
    """Tell the node this many of a prompt's first and last token ids, at most 256, for ``kvstore hot --tokenizer``."""

    otlp_endpoint: str = ""
    """Send spans of lookups and loads to this OpenTelemetry collector, as ``http://127.0.0.1:4318``; empty: none."""
    trace_sample_ratio: float = 0.01
    """Share of the requests without trace headers that are traced; those with are when their caller says so."""

    @classmethod
    def parse(cls, extra: dict[str, Any]) -> Options:
        """Check settings that came from outside. Raises ConfigError naming the setting."""
        options = settings.parse(cls, extra, "kv_connector_extra_config")
        if not 0 <= options.preview_tokens <= MAX_PREVIEW_TOKENS:
            raise ConfigError(
                "kv_connector_extra_config.preview_tokens",
                options.preview_tokens,
                f"not from 0 to {MAX_PREVIEW_TOKENS}",
                "Give it about 16.",
            )
        if not 0 <= options.trace_sample_ratio <= 1:
            name, value = "kv_connector_extra_config.trace_sample_ratio", options.trace_sample_ratio
            raise ConfigError(name, value, "not from 0 to 1", "Give it about 0.01.")
        return options
