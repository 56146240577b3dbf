"""Prompts: what they would find, why not, and which are hot."""

from __future__ import annotations

from typing import Annotated, Any, Self

import numpy as np
from pydantic import BeforeValidator, ConfigDict, Field, PlainSerializer, WithJsonSchema, model_validator

from kvstore.admin.models.base import DIGEST_EXAMPLE, KEY_EXAMPLE, Hex, Key, Model, TierName, Wanted
from kvstore.identity import TokenIds


class HotPrompt(Model):
    """A prompt that is asked for again and again, by the key of its deepest shared block."""

    key: Hex = Field(examples=[KEY_EXAMPLE])
    namespace: Hex = Field(description="Empty when no tier holds the block.", examples=[DIGEST_EXAMPLE])
    tokens: int
    bytes: int
    hits: float = Field(description="Decayed: they fade by half in an hour.")
    seconds_saved: float = Field(description="Prefill that one hit saves, estimated.")
    last_used: float
    media: list[TierName] = Field(description="Tiers that hold that block.")


TokenId = Annotated[int, Field(ge=0, lt=1 << 32)]


MAX_TOKENS = 1 << 19


def _unpacked(value: object) -> object:
    data = bytes.fromhex(value) if isinstance(value, str) else value
    if isinstance(data, bytes) and (len(data) % 4 or len(data) > 4 * MAX_TOKENS):
        raise ValueError(f"4 bytes are wanted for each of at most {MAX_TOKENS} tokens, not {len(data)}")
    return data


PackedTokens = Annotated[
    bytes,
    BeforeValidator(_unpacked),
    PlainSerializer(bytes.hex, when_used="json"),
    WithJsonSchema({"type": "string", "pattern": "^([0-9a-f]{8})*$", "maxLength": 8 * MAX_TOKENS}),
]
"""Little-endian unsigned 32-bit token ids, or their hexadecimal text: base64 is shorter, and eight times slower to read."""


MAX_TEXT = 4 << 20


MAX_BATCH = 64
"""Prompts of one question."""


MAX_KEY_BYTES = 1 << 19
"""Of one chain: 32,768 blocks."""


_MAX_NAME = 512


class Prompt(Wanted):
    """A prompt: by its token ids or text, by the request that had it, or by a block in which it ends."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"namespace": "Qwen/Qwen3-8B", "tokens": [101, 2023, 2003]}]}
    )

    tokens: list[TokenId] | None = Field(None, max_length=MAX_TOKENS, description="Needs `namespace`.")
    packed_tokens: PackedTokens | None = Field(
        None,
        description="The same at a fraction of the work: 4 bytes each, little-endian, in hexadecimal. Needs `namespace`.",
    )
    text: str | None = Field(
        None, max_length=MAX_TEXT, description="Needs `namespace`, and a tokenizer in `api.tokenizers`."
    )
    request: str | None = Field(
        None, min_length=1, max_length=128, description="Id of a request that an engine made lately, or its start."
    )
    key: Key | None = Field(None, description="The chain that ends in this block.")
    namespace: str = Field("", max_length=_MAX_NAME, description="Model name, or start of a namespace digest.")
    cache_salt: str = Field("", max_length=_MAX_NAME, description="As the engine's request had it.")
    lora: str = Field("", max_length=_MAX_NAME, description="Digest of the adapter.")

    @model_validator(mode="after")
    def _one_name(self) -> Self:
        named = [
            name
            for name in ("tokens", "packed_tokens", "text", "request", "key")
            if name in self.model_fields_set and getattr(self, name)
        ]
        if len(named) != 1:
            raise ValueError("name the prompt by one of tokens, packed_tokens, text, request, key")
        if named[0] not in ("request", "key") and not self.namespace:
            raise ValueError(f"{named[0]} needs a namespace")
        return self

    @property
    def token_ids(self) -> TokenIds | list[TokenId] | None:
        """None for a prompt that is named otherwise."""
        return self.tokens if self.packed_tokens is None else np.frombuffer(self.packed_tokens, dtype="<u4")


class Found(Model):
    """What all answers about a prompt begin with."""

    namespace: Hex = Field(description="Empty when it is not known here.", examples=[DIGEST_EXAMPLE])
    block_tokens: int = Field(examples=[64])
    blocks: int = Field(description="Whole blocks of the prompt.", examples=[32])


class PeekedTier(Model):
    """What a tier could serve of a chain of blocks."""

    medium: TierName
    usable_blocks: int = Field(description="The prefix that this tier and the faster ones hold.")
    seconds: float = Field(description="Until that prefix is in host memory, estimated from what loads took lately.")
    held_blocks: int = Field(description="Blocks of the prompt in this tier alone, wherever they are in it.")


class TierLookup(PeekedTier):
    """What a tier could serve of a prompt."""

    usable_tokens: int


class LookupAnswer(Found):
    """What a prompt would find here now. Does not count as a use."""

    tiers: list[TierLookup] = Field(description="Fastest first.")


class RouterLookup(Wanted):
    """Many prompts at once."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"prompts": [{"namespace": "Qwen/Qwen3-8B", "tokens": [101, 2023, 2003]}]}]}
    )

    prompts: list[Prompt] = Field(min_length=1, max_length=MAX_BATCH)
    timeout_seconds: float = Field(0.1, gt=0, le=10, description="What nodes have to answer; the others go without.")


class NodeLookup(Model):
    """What one node could serve of a prompt."""

    node: str = Field(description="Its name.", examples=["gpu-17-1f6a2b3c"])
    url: str = Field(description="Its API.", examples=["http://127.0.0.1:7070"])
    tiers: list[TierLookup]


class RoutedPrompt(Model):
    """Where a prompt would find most of itself."""

    blocks: int
    block_tokens: int
    nodes: list[NodeLookup]
    problem: str = Field("", description="Why nothing can be said of this prompt.")


class Unanswered(Model):
    """A node that did not say what it holds."""

    url: str = Field(description="Its API.", examples=["http://10.0.0.2:7070"])
    problem: str = Field(examples=["no answer in 0.1 s"])


class RouterAnswer(Model):
    """In the order of the question."""

    prompts: list[RoutedPrompt]
    unanswered: list[Unanswered] = Field([], description="Nodes of which nothing is known now.")


class RouterPeek(Wanted):
    """Chains of blocks, by their keys."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"chains": [KEY_EXAMPLE]}]})

    chains: list[Annotated[str, Field(pattern="^([0-9a-f]{32})*$", max_length=2 * MAX_KEY_BYTES)]] = Field(
        min_length=1, max_length=MAX_BATCH, description="Each is the keys of a prompt's blocks in order, joined."
    )


class RouterPeeked(Model):
    """What one node could serve of each chain, in the order of the question."""

    node: str = Field(description="Its name.", examples=["gpu-17-1f6a2b3c"])
    chains: list[list[PeekedTier]]


class BlockEvent(Model):
    """Something that happened to a block."""

    at: float
    what: str = Field(examples=["evicted"])
    tier: TierName | None = None
    rule: str | None = Field(None, description="Of admission, when it kept the block out.")
    newcomer: Hex = Field("", description="The block that wanted its place.")
    estimates: list[float] | None = Field(
        None, description="Seconds to load and to compute, when computing was preferred."
    )
    text: str = Field(examples=["evicted from host at 12:00:01 UTC"])


class ExplainedBlock(Model):
    """One block of an explained prompt."""

    index: int
    key: Hex = Field(examples=[KEY_EXAMPLE])
    where: list[TierName] = Field(description="Tiers that hold it now.")
    why: str = Field(description="held, or why it is missed.", examples=["evicted"])
    detail: str = Field(examples=["evicted from host at 12:00:01 UTC"])
    events: list[BlockEvent] = Field(description="What happened to it lately, oldest first.")
    hits: float = Field(description="Decayed.")
    sightings: int = Field(description="Requests that asked for it.")
    chance_within_hour: float | None = Field(None, description="Of being asked for again, as the node expects.")
    pinned_until: float | None = None
    score: float | None = Field(None, description="Prefill seconds saved per byte, of the prefix that ends here.")


class Explanation(Model):
    """Why a prompt's blocks are found or missed."""

    request: str | None = None
    client: str | None = None
    asked_at: float | None = None
    found: list[int] | None = Field(None, description="What the engine met then: blocks it had itself, blocks found.")
    namespace: Hex
    fields: dict[str, Any]
    block_tokens: int
    tokens: int
    chain_blocks: int
    usable_blocks: int
    history_since: float = Field(description="Nothing is remembered from before.")
    elsewhere: list[Elsewhere] = Field(description="Other namespaces that hold a prefix of the same tokens.")
    blocks: list[ExplainedBlock]


class Elsewhere(Model):
    """A namespace that holds the prompt, but is not the engine's."""

    namespace: Hex
    tokens: int
    differs: Any = Field(description="Fields in which the two differ.")


class HotPage(Model):
    """Hot prompts, best score first."""

    items: list[HotPrompt]
    cursor: str = ""
