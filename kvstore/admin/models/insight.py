"""What prompts have in common: the tree of a prompt, and where prompts part early."""

from __future__ import annotations

from pydantic import Field

from kvstore.admin.models.base import DIGEST_EXAMPLE, KEY_EXAMPLE, Hex, Model, TierName


class Branch(Model):
    """Blocks in a row that the same prompts have."""

    start: int = Field(description="Index of the first block.")
    end: int = Field(description="Index behind the last one.")
    key: Hex = Field(description="Of the last block.", examples=[KEY_EXAMPLE])
    held: dict[TierName, int] = Field(description="How many of the blocks each tier holds.")
    prompts: int = Field(description="Hot prompts that have these blocks, the one asked about among them.")
    asked: bool = Field(description="Whether the prompt asked about has them.")
    ends: list[Hex] = Field(description="Prompts that end here, by their last block's key.")
    children: list[Branch]


class Tree(Model):
    """A prompt, and the hot prompts that begin as it does."""

    namespace: Hex = Field(examples=[DIGEST_EXAMPLE])
    block_tokens: int
    blocks: int = Field(description="Of the prompt.")
    compared: int = Field(description="Hot prompts of the namespace that were looked at.")
    root: Branch | None = Field(None, description="null: the prompt has no whole block.")


class BreakerExample(Model):
    """Two prompts that part at a breaker; positions in tokens, in the later one and in the earlier one."""

    later: str
    earlier: str
    resumes: list[int] = Field(description="Where the text that they share again begins in each.")
    shareable: int


class PrefixBreaker(Model):
    """A place where prompts part although they go on alike."""

    token: int = Field(description="About where they part.")
    prompts: int
    tokens: int = Field(description="Of these prompts, in all.")
    shareable: int = Field(description="Tokens that could be loaded if the part that differs came behind them.")
    breaking: int = Field(description="Length of the part to move, in tokens.")
    examples: list[BreakerExample]


class BreakerReport(Model):
    """Of recent prompts whose content is known: connectors tell it where `content_fingerprints` is on."""

    prompts: int
    tokens: int
    by_prefix: int = Field(description="Tokens that could be loaded as the prompts are.")
    anywhere: int = Field(description="Tokens that were seen earlier, at whatever position.")
    breakers: list[PrefixBreaker] = Field(description="Most shareable tokens first.")
