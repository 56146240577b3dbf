"""Settings that an engine's configuration hands over as a map."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, TypeVar

from kvstore.errors import ConfigError

T = TypeVar("T")


def parse(kind: type[T], values: Mapping[str, Any], where: str) -> T:
    """Check ``values`` against the defaults of a dataclass, and make one. Raises ConfigError naming the setting.

    ``where`` is what the engine's configuration calls the map.
    """
    kinds = {field.name: type(field.default) for field in fields(kind)}  # type: ignore[arg-type]
    for name, value in values.items():
        if name not in kinds:
            raise ConfigError(f"{where}.{name}", value, "no such setting", f"Known: {', '.join(kinds)}.")
        wanted = kinds[name]
        if type(value) is not wanted and not (wanted is float and type(value) is int):
            raise ConfigError(f"{where}.{name}", value, f"not a {wanted.__name__}", "Correct the type.")
    return kind(**values)
