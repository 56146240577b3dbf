"""What all models share."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

Hex = Annotated[
    str, BeforeValidator(lambda value: value.hex() if isinstance(value, bytes) else value), Field(pattern="^[0-9a-f]*$")
]
"""Bytes, as the node sends them, or their hexadecimal text."""

KEY_EXAMPLE = "8d2f0c6b7a9143e5b0d4f1a2c3958e70"
DIGEST_EXAMPLE = "1f6a2b3c4d5e6f708192a3b4c5d6e7f8"


class TierName(StrEnum):
    """Kinds of tier, fastest first."""

    HOST = "host"
    DISK = "disk"
    OBJECT = "object"
    REMOTE = "remote"


class Model(BaseModel):
    """Base of all answers. Fields that a newer node adds are left out."""

    model_config = ConfigDict(extra="ignore", protected_namespaces=())


class Wanted(BaseModel):
    """Base of all requests. A field that nobody knows is refused."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())


Key = Annotated[str, Field(pattern="^[0-9a-f]{32}$", examples=[KEY_EXAMPLE])]
"""A block key."""
