"""What goes over the wire. Keys and digests are lower-case hexadecimal; sizes are bytes; times are seconds since the epoch."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

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


class Model(BaseModel):
    """Base of all answers. Fields that a newer node adds are left out."""

    model_config = ConfigDict(extra="ignore", protected_namespaces=())


class Wanted(BaseModel):
    """Base of all requests. A field that nobody knows is refused."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())


# --- health


class Health(Model):
    """The API is alive."""

    status: str = Field(examples=["ok"])
    version: str = Field(examples=["0.1.0"])


class Check(Model):
    """One thing that readiness needs."""

    name: str = Field(examples=["node"])
    ok: bool
    detail: str = Field(examples=["answers at /run/kvstore/node.sock"])


class Readiness(Model):
    """Everything is there that traffic needs."""

    ready: bool
    checks: list[Check]


class WarmthStatus(Model):
    """The last warm-up of the node."""

    state: str = Field(examples=["done"])
    share: float = Field(description="Of the planned bytes, those that are warm.", examples=[0.97])
    started: float
    updated: float
    finished: float | None = None
    planned_blocks: int
    planned_bytes: int
    warm_blocks: int
    warm_bytes: int
    fetched_bytes: int
    skipped: dict[str, int] = Field(default_factory=dict, description="Blocks by the reason why they are not warm.")
    problem: str = ""


# --- status


class TierStatus(Model):
    """Fill of a tier, and counters since the node's start."""

    medium: TierName
    blocks: int = Field(examples=[4096])
    used_bytes: int
    capacity_bytes: int | None = Field(description="null: without a limit of its own.")
    queued_bytes: int = Field(0, description="Waiting to be written to it.")
    quarantined: int = Field(0, description="Blocks that failed verification.")
    evicted: int = 0
    refused: int = 0


class ClientStatus(Model):
    """A client of the node: an engine's rank, a command, this API."""

    name: str = Field(examples=["vllm rank 0"])
    pid: int
    connected_seconds: float
    leases: int


class NamespaceInfo(Model):
    """What shapes the bytes of a group of blocks."""

    digest: Hex = Field(examples=[DIGEST_EXAMPLE])
    block_bytes: int | None = Field(description="null until a client has opened the namespace.")
    fields: dict[str, Any] = Field(description="Every field of the namespace.")

    @property
    def model(self) -> str:
        return str(self.fields.get("model", ""))

    @property
    def block_tokens(self) -> int:
        return int(self.fields["block_tokens"])


class NodeStatus(Model):
    """A node: its tiers, clients, namespaces and counters."""

    version: str
    pid: int
    epoch: Annotated[str, BeforeValidator(lambda value: f"{value:016x}" if isinstance(value, int) else value)] = Field(
        description="Names this run of the node; changes when it restarts.", examples=["00f3a2b4c5d6e7f8"]
    )
    uptime_seconds: float
    draining: bool
    tiers: list[TierStatus]
    clients: list[ClientStatus]
    namespaces: list[NamespaceInfo]
    counters: dict[str, float] = Field(
        description="Samples of the node's metrics.", examples=[{"kvstore_looked_up_blocks_total": 128.0}]
    )

    @model_validator(mode="before")
    @classmethod
    def _spread_queues(cls, value: Any) -> Any:
        """The node tells what is queued in a map of its own."""
        if isinstance(value, dict) and (queued := value.get("queued_bytes")):
            tiers = [{**tier, "queued_bytes": queued.get(tier["medium"], 0)} for tier in value["tiers"]]
            return {**value, "tiers": tiers}
        return value


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


# --- jobs


class JobState(StrEnum):
    """What became of a job."""

    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    """It broke off; ``problem`` says why. It can be resumed."""
    CANCELLED = "cancelled"
    """Somebody stopped it. It can be resumed."""
    INTERRUPTED = "interrupted"
    """The API ended under it. It can be resumed."""


class JobProgress(Model):
    """How far a job is."""

    done: float = 0
    total: float | None = Field(None, description="null while nobody knows.")
    unit: str = Field("", examples=["blocks"])
    note: str = Field("", description="What it is at.", examples=["disk"])


class Job(Model):
    """A piece of long work."""

    id: str = Field(examples=["019a2b3c4d5e-9f8e7d"])
    kind: str = Field(examples=["scrub"])
    options: dict[str, Any]
    state: JobState
    created: float
    started: float | None = None
    finished: float | None = None
    attempts: int = Field(1, description="Grows with each time it is resumed.")
    progress: JobProgress = JobProgress()
    result: dict[str, Any] | None = None
    problem: str = Field("", description="Why it failed.")


class JobPage(Model):
    """Jobs, newest first."""

    items: list[Job]
    cursor: str = Field("", description="Ask again with it for more; empty at the end.")


class JobKindInfo(Model):
    """A kind of job and what it may be asked."""

    name: str = Field(examples=["scrub"])
    summary: str
    options: dict[str, Any] = Field(description="JSON schema of the options.")


class NewJob(Wanted):
    """Start a job."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"kind": "scrub", "options": {"tiers": ["disk"]}}]})

    kind: str = Field(max_length=64, examples=["scrub"])
    options: dict[str, Any] = Field(default_factory=dict)


# --- live


class Snapshot(Model):
    """Everything a dashboard shows, as of one moment."""

    time: float
    parts: dict[str, Any] = Field(
        description="By name: node (as /v1/status), hot (as /v1/hot), jobs (as /v1/jobs), warmth, and what extensions add."
    )
    problems: dict[str, str] = Field(description="Parts that could not be had, and why.")


# --- prompts and blocks

Key = Annotated[str, Field(pattern="^[0-9a-f]{32}$", examples=[KEY_EXAMPLE])]
"""A block key."""

TokenId = Annotated[int, Field(ge=0, lt=1 << 32)]

MAX_TOKENS = 1 << 19
MAX_TEXT = 4 << 20
_MAX_NAME = 512


class Prompt(Wanted):
    """A prompt: by its token ids or text, by the request that had it, or by a block in which it ends."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"namespace": "Qwen/Qwen3-8B", "tokens": [101, 2023, 2003]}]}
    )

    tokens: list[TokenId] | None = Field(None, max_length=MAX_TOKENS, description="Needs `namespace`.")
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
            for name in ("tokens", "text", "request", "key")
            if name in self.model_fields_set and getattr(self, name)
        ]
        if len(named) != 1:
            raise ValueError("name the prompt by one of tokens, text, request, key")
        if named[0] in ("tokens", "text") and not self.namespace:
            raise ValueError(f"{named[0]} needs a namespace")
        return self


class Found(Model):
    """What all answers about a prompt begin with."""

    namespace: Hex = Field(description="Empty when it is not known here.", examples=[DIGEST_EXAMPLE])
    block_tokens: int = Field(examples=[64])
    blocks: int = Field(description="Whole blocks of the prompt.", examples=[32])


class TierLookup(Model):
    """What a tier could serve of a prompt."""

    medium: TierName
    usable_blocks: int = Field(description="The prefix that this tier and the faster ones hold.")
    usable_tokens: int
    seconds: float = Field(description="Until that prefix is in host memory, estimated from what loads took lately.")
    held_blocks: int = Field(description="Blocks of the prompt in this tier alone, wherever they are in it.")


class LookupAnswer(Found):
    """What a prompt would find here now. Does not count as a use."""

    tiers: list[TierLookup] = Field(description="Fastest first.")


class RouterLookup(Wanted):
    """Many prompts at once."""

    prompts: list[Prompt] = Field(min_length=1, max_length=64)


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


class RouterAnswer(Model):
    """In the order of the question."""

    prompts: list[RoutedPrompt]


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


class HotPage(Model):
    """Hot prompts, best score first."""

    items: list[HotPrompt]
    cursor: str = ""


# --- namespaces


class NamespacePage(Model):
    """Namespaces, by digest."""

    items: list[NamespaceInfo]
    cursor: str = ""


class ModelInfo(Model):
    """A model and its namespaces on this node."""

    model: str = Field(examples=["Qwen/Qwen3-8B"])
    namespaces: list[Hex]
    tenants: list[str]
    dtypes: list[str]


# --- policy


class Mode(StrEnum):
    """What admission does."""

    OFF = "off"
    OBSERVE = "observe"
    """Counts what it would refuse, and refuses nothing."""
    ENFORCE = "enforce"


class Decisions(Model):
    """What the rule said of blocks offered to a tier, since the node's start."""

    tier: str
    reason: str = Field(examples=["seen_once"])
    blocks: int
    admits: bool


class Policy(Model):
    """What is kept."""

    mode: Mode = Field(description="Of admission.")
    eviction: str = Field(description="Which blocks a full tier gives up first.", examples=["reuse"])
    thresholds: dict[str, float]
    decisions: list[Decisions] = Field(description="Counted in observe and enforce.")


class PolicyChange(Wanted):
    """A new mode of admission. It holds until the node stops; the configuration says how it starts."""

    mode: Mode = Field(examples=["observe"])


class Run(Model):
    """Blocks in a row of which the rule says the same."""

    blocks: int
    reason: str = Field(examples=["seen_once"])
    admits: bool


class DryRun(Found):
    """What enforcing would do with a prompt's blocks, offered now."""

    tiers: dict[TierName, list[Run]]


# --- configuration and region


class SettingInfo(Model):
    """A setting of the configuration file that this API read."""

    name: str = Field(examples=["host.bytes"])
    value: str = Field(description="Masked when it is a secret.", examples=["16GiB"])
    origin: str = Field(description="default, file:line, the environment variable, or --set.", examples=["default"])
    description: str


class ClaimInfo(Model):
    """Who has a role in the region, or is alive."""

    name: str = Field(examples=["node/gpu-17:412:9f8e7d6c"])
    holder: str
    expires: float


class CatalogInfo(Model):
    """The index of the region's bucket."""

    epoch: str
    complete: bool = Field(description="Whether it covers the bucket.")
    blocks: int
    used_bytes: int
    changes: int
    claims: list[ClaimInfo]


class NodeInfo(Model):
    """A node of the region."""

    name: str
    here: bool = Field(description="Whether this API is beside it.")
    url: str = Field("", description="Its API, where known.")
    expires: float | None = Field(None, description="When it counts as gone, unless it is heard of again.")
