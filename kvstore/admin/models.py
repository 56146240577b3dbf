"""What goes over the wire. Keys and digests are lower-case hexadecimal; sizes are bytes; times are seconds since the epoch."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any

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
