"""Health, nodes, namespaces, the region and the configuration."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field, model_validator

from kvstore.admin.models.base import DIGEST_EXAMPLE, KEY_EXAMPLE, Hex, Model, TierName


class Health(Model):
    """The API is alive."""

    status: str = Field(examples=["ok"])
    version: str = Field(examples=["0.1.0"])


class WhoAmI(Model):
    """Who asks, and whom."""

    name: str = Field(description="Of the token.", examples=["on-call"])
    role: str = Field(examples=["operator"])
    tenant: str = Field("", description="The only one that it may see and change; empty: all.", examples=["acme"])
    token: bool = Field(description="Whether this API asks for tokens.")
    site: str = Field(description="The node or service.", examples=["gpu-17-1f6a2b3c"])
    region: str = Field(description="Empty when none is configured.", examples=["eu"])
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
    namespace: Hex | None = Field(
        None, description="The one it opened last, and asks about. null: it asks about none (yet)."
    )
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

    @property
    def asked_of(self) -> dict[str, str]:
        """Arguments of verbs about it: a node with several tenants asks the one whose it is."""
        return {"tenant": str(self.fields["tenant"])} if "tenant" in self.fields else {}


class BadBlock(Model):
    """A copy of a block that was read and did not verify. It was dropped; engines computed anew."""

    at: float
    key: Hex = Field(examples=[KEY_EXAMPLE])
    tier: TierName | None


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
    bad_blocks: list[BadBlock] = Field([], description="The latest, newest first.")
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


class Snapshot(Model):
    """Everything a dashboard shows, as of one moment."""

    time: float
    parts: dict[str, Any] = Field(
        description="By name: node (as /v1/status), nodes, hot, pins and jobs (as those routes), warmth, and what extensions add."
    )
    problems: dict[str, str] = Field(description="Parts that could not be had, and why.")


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


class SettingInfo(Model):
    """A setting of the configuration file that this API read."""

    name: str = Field(examples=["host.bytes"])
    value: str = Field(description="Masked when it is a secret.", examples=["16GiB"])
    origin: str = Field(description="default, file:line, the environment variable, or --set.", examples=["default"])
    description: str


class ClaimInfo(Model):
    """Who has a role in the region."""

    name: str = Field(examples=["role/evictor"])
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
    region: str = Field("", description="As it was configured.")
    started: float | None = Field(None, description="When its process began.")
    expires: float | None = Field(None, description="When it counts as gone, unless it is heard of again.")
