"""Blocks and pins."""

from __future__ import annotations

from typing import Self

from pydantic import ConfigDict, Field, model_validator

from kvstore.admin.models.base import DIGEST_EXAMPLE, KEY_EXAMPLE, Hex, Key, Model, TierName, Wanted
from kvstore.admin.models.prompts import Found, Prompt


class Block(Model):
    """A block, as one tier knows it. Fields that a listing cannot tell are 0 or empty."""

    key: Hex = Field(examples=[KEY_EXAMPLE])
    namespace: Hex = Field(examples=[DIGEST_EXAMPLE])
    parent: Hex | None = Field(None, description="The block before; zeros for the first of a prompt.")
    index: int = Field(description="Position in its chain.")
    tokens: int
    length: int = Field(description="Payload bytes.")
    hits: int
    accessed: float


class BlockPage(Model):
    """Blocks of a tier, by key."""

    items: list[Block]
    cursor: str = Field("", description="Ask again with it for more; empty at the end.")


class BlockInfo(Block):
    """A block, and the tiers that hold it."""

    media: list[TierName] = Field(description="Fastest first.")


class PromptBlocksQuery(Wanted):
    """The blocks of a prompt."""

    prompt: Prompt
    limit: int = Field(100, ge=1, le=1000)
    cursor: str = Field("", max_length=256)


class PromptBlock(Model):
    """A block of a prompt, held or not."""

    index: int
    key: Hex = Field(examples=[KEY_EXAMPLE])
    media: list[TierName] = Field(description="Tiers that hold it; empty when none does.")


class PromptBlocks(Found):
    """Blocks in chain order."""

    items: list[PromptBlock]
    cursor: str = ""


class SomeBlocks(Wanted):
    """Blocks by their keys, or all of a prompt."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"keys": [KEY_EXAMPLE]}]})

    keys: list[Key] | None = Field(None, min_length=1, max_length=1000)
    prompt: Prompt | None = None

    @model_validator(mode="after")
    def _one_of_two(self) -> Self:
        if (self.keys is None) == (self.prompt is None):
            raise ValueError("give keys or prompt, one of the two")
        return self


class Eviction(SomeBlocks):
    """Blocks that one tier is to give up."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"tier": "host", "keys": [KEY_EXAMPLE]}]})

    tier: TierName


class Evicted(Model):
    """How many blocks went."""

    evicted: int


class Deleted(Model):
    """How many blocks went, by tier."""

    deleted: dict[TierName, int]


class VerifiedTier(Model):
    """A copy that was read and checked."""

    tier: TierName
    ok: bool
    reason: str = Field("", description="What is wrong with it; it was dropped and quarantined.")


class Verified(Model):
    """All copies of a block."""

    key: Hex = Field(examples=[KEY_EXAMPLE])
    tiers: list[VerifiedTier]


class NewPin(Wanted):
    """Keep a prompt until a deadline."""

    prompt: Prompt
    seconds: float = Field(gt=0, le=24 * 3600, description="From now on.", examples=[3600])


class Pinned(Model):
    """What a pin reached."""

    pinned: int = Field(description="Blocks pinned: fewer than the prompt has when there is room for no more pins.")
    blocks: int
    held: dict[TierName, int] = Field(description="How many of them each tier holds.")
    until: float


class Pin(Model):
    """Blocks that are pinned until one time."""

    key: Hex = Field(description="The last block that was named with it.", examples=[KEY_EXAMPLE])
    blocks: int
    held: dict[TierName, int]
    until: float


class Unpinned(Model):
    """How many blocks were pinned until now."""

    unpinned: int
