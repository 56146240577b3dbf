"""What ``--hicache-storage-backend-extra-config`` may hold for us."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from connectors import settings
from kvstore.errors import ConfigError

SETTING = "hicache_storage_backend_extra_config"

_SGLANGS = {
    "backend_name", "module_path", "class_name", "interface_v1", "allocator", "prefetch_threshold", "prefetch_timeout_base",
    "prefetch_timeout_per_ki_token", "prefetch_timeout_max", "hicache_storage_pass_prefix_keys", "tp_lcm_size",
}  # fmt: skip
"""Keys of the same object that are SGLang's own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Settings of the backend. The node has its own configuration."""

    socket: str = ""
    """Where the node listens; empty for the default."""
    autostart: bool = True
    """Start a node when none answers."""
    lookup_timeout_s: float = 0.25
    """An answer that takes longer counts as "nothing stored"; SGLang's queue of prefetches waits for it."""
    load_timeout_s: float = 10.0
    """A load that takes longer ends; SGLang computes what it has not brought."""
    save_timeout_s: float = 10.0
    """A save that takes longer is given up."""
    model: str = ""
    """Name of the model; empty for SGLang's model path, without the folder."""
    weights: str = ""
    """Revision of the weights; empty for the hub's commit or a digest of the local files."""

    @classmethod
    def parse(cls, extra: Mapping[str, Any]) -> Options:
        """Check settings that came from outside. Raises ConfigError naming the setting."""
        if not extra.get("interface_v1"):
            raise ConfigError(
                f"{SETTING}.interface_v1", extra.get("interface_v1"), "pages are moved by its calls", "Set it to 1."
            )
        ours = {name: value for name, value in extra.items() if name not in _SGLANGS}
        return settings.parse(cls, ours, SETTING)
