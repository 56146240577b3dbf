"""Reads the sources of a configuration and remembers where each value came from."""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, SecretStr, ValidationError
from pydantic.fields import FieldInfo

from kvstore.config.schema import Config
from kvstore.errors import ConfigError
from kvstore.units import exact_bytes

ENV_PREFIX = "KVSTORE_"
ENV_FILE = "KVSTORE_CONFIG"
"""Names the TOML file when ``--config`` does not."""

DEFAULT = "default"
MASK = "********"


@dataclass(frozen=True, slots=True)
class Setting:
    """One key as ``kvstore config`` shows it."""

    name: str
    value: str
    """Text that would set it; masked when it is a secret."""
    origin: str
    """``default``, ``file:line``, the environment variable, or ``--set``."""
    description: str


@dataclass(frozen=True, slots=True)
class Loaded:
    """A configuration and the origin of every value that is not the default."""

    config: Config
    origins: Mapping[str, str]

    def settings(self) -> list[Setting]:
        """All keys, in the order of the sections."""
        return [
            Setting(
                name,
                _text(name, getattr(getattr(self.config, section), key)),
                self.origins.get(name, DEFAULT),
                description,
            )
            for name, section, key, description in fields()
        ]


def fields() -> Iterator[tuple[str, str, str, str]]:
    """``(name, section, key, description)`` of every setting."""
    for section in Config.model_fields:
        for key, field in _keys(section).items():
            yield f"{section}.{key}", section, key, field.description or ""


def load(file: Path | None = None, overrides: Sequence[str] = (), environ: Mapping[str, str] | None = None) -> Loaded:
    """Read all sources. Raises ConfigError.

    ``file`` falls back to KVSTORE_CONFIG, then to none. ``overrides`` are texts like ``host.bytes=16GiB``.
    """
    environ = os.environ if environ is None else environ
    if file is None and environ.get(ENV_FILE):
        file = Path(environ[ENV_FILE])
    values: dict[str, tuple[object, str]] = {}
    if file is not None:
        values.update(_from_file(file))
    values.update(_from_environment(environ))
    values.update(_from_overrides(overrides))

    known = {name for name, *_ in fields()}
    tree: dict[str, dict[str, object]] = {}
    for name, (value, origin) in values.items():
        if name not in known:
            raise _unknown(name, value, origin, known)
        section, key = name.split(".")
        # An empty text stands for "not set" where a field may be absent, as in environment variables.
        tree.setdefault(section, {})[key] = None if value == "" and _optional(section, key) else value
    origins = {name: origin for name, (_, origin) in values.items()}
    try:
        return Loaded(Config.model_validate(tree), origins)
    except ValidationError as error:
        raise _refusal(error, values) from None


def _from_file(path: Path) -> dict[str, tuple[object, str]]:
    try:
        text = path.read_text()
        tables = tomllib.loads(text)
    except OSError as error:
        raise ConfigError(
            "--config", str(path), error.strerror or "cannot be read", "Name a readable TOML file."
        ) from error
    except ValueError as error:
        raise ConfigError("--config", str(path), f"not TOML: {error}", "Mend the file.") from error
    values: dict[str, tuple[object, str]] = {}
    for section, keys in tables.items():
        if not isinstance(keys, dict):
            raise ConfigError(section, keys, f"stands outside of any section of {path}", "Put it under a [section].")
        for key, value in keys.items():
            name = f"{section}.{key}"
            line = _line(text, section, key)
            values[name] = value, f"{path}:{line}" if line else str(path)
    return values


def _line(text: str, section: str, key: str) -> int | None:
    """Line of a key in a TOML text, where it is written the plain way."""
    current = ""
    for number, line in enumerate(text.splitlines(), 1):
        if header := re.match(r"\s*\[\s*([\w-]+)\s*\]", line):
            current = header[1]
        elif current == section and re.match(rf"\s*{re.escape(key)}\s*=", line):
            return number
    return None


def _from_environment(environ: Mapping[str, str]) -> dict[str, tuple[object, str]]:
    """Variables with the prefix and a section.

    Others are not ours: Kubernetes sets KVSTORE_PORT and the like for a service called kvstore.
    """
    values: dict[str, tuple[object, str]] = {}
    for variable, value in environ.items():
        section, separator, key = variable.removeprefix(ENV_PREFIX).partition("__")
        if variable.startswith(ENV_PREFIX) and separator:
            values[f"{section.lower()}.{key.lower()}"] = value, variable
    return values


def _from_overrides(overrides: Sequence[str]) -> dict[str, tuple[object, str]]:
    values: dict[str, tuple[object, str]] = {}
    for text in overrides:
        name, separator, value = text.partition("=")
        if not separator:
            raise ConfigError("--set", text, "has no '='", "Write --set section.key=value.")
        values[name.strip()] = value.strip(), "--set"
    return values


def _optional(section: str, key: str) -> bool:
    return _keys(section)[key].default is None


def _keys(section: str) -> Mapping[str, FieldInfo]:
    model = Config.model_fields[section].annotation
    assert isinstance(model, type)
    assert issubclass(model, BaseModel)
    return model.model_fields


def _unknown(name: str, value: object, origin: str, known: set[str]) -> ConfigError:
    close = difflib.get_close_matches(name, known, n=1)
    remedy = f"Did you mean {close[0]}?" if close else "List all keys with: kvstore config"
    return ConfigError(name, MASK if _is_secret(name) else value, f"there is no such setting (from {origin})", remedy)


def _refusal(error: ValidationError, values: Mapping[str, tuple[object, str]]) -> ConfigError:
    """The first problem, in this project's words."""
    first = error.errors(include_url=False)[0]
    context = first.get("ctx") or {}
    name = context.get("field") or ".".join(str(part) for part in first["loc"][:2])
    value, origin = values.get(name, ("", DEFAULT))
    if _is_secret(name):
        value = MASK
    problem = str(first["msg"]).removeprefix("Input ")
    remedy = context.get("remedy") or "".join(description for known, _, _, description in fields() if known == name)
    return ConfigError(name, value, f"{problem} (from {origin})", remedy)


def _is_secret(name: str) -> bool:
    """Whether a value must not be shown; also for a name with a slip of the pen in it."""
    return any(word in name for word in ("secret", "token", "password")) and name != "identity.secret_file"


def _text(name: str, value: object) -> str:
    if isinstance(value, SecretStr):
        return MASK if value.get_secret_value() else ""
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int) and "bytes" in name:
        return exact_bytes(value)
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return str(value)
