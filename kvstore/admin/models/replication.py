"""Other regions: what flows in from them, and what became of purges."""

from __future__ import annotations

from pydantic import Field

from kvstore.admin.models.base import KEY_EXAMPLE, Hex, Model, Wanted

MAX_CHAIN = 32768
"""Blocks."""


class SourceStatus(Model):
    """How far this region is with a source."""

    sequence: int = Field(description="Of the manifest that was read last.")
    published: float
    lag_seconds: float | None = Field(description="null: never level yet.")
    blocks: int = Field(description="Copied so far.")
    bytes: int
    month_bytes: int
    month_cost: float
    updated: float
    problem: str
    paused: str = Field("", description="Since when and by whom, where it is.")


class ManifestStatus(Model):
    """What the region has published."""

    sequence: int
    published: float
    blocks: int
    bytes: int
    tombstones: int


class LeaseStatus(Model):
    """Who does a duty of the region."""

    holder: str
    held: bool


class ReplicationStatus(Model):
    """Replication into this region."""

    region: str = Field(examples=["eu"])
    mode: str = Field(examples=["enforce"])
    manifest: ManifestStatus | None
    leases: dict[str, LeaseStatus]
    sources: dict[str, SourceStatus]


class RegionInfo(Model):
    """A region of the topology."""

    name: str
    url: str
    endpoints: list[str]
    location: str
    publishes: bool = Field(description="Whether others can pull from it: it has a public key.")


class FlowInfo(Model):
    """What destinations may pull from a source, and at what price. null: no limit."""

    source: str
    to: list[str]
    models: list[str]
    tenants: list[str]
    min_score: float
    max_bytes: int | None
    bytes_per_second: int | None
    price_per_gb: float
    money_per_month: float | None


class TopologyInfo(Model):
    """Which regions there are, and what may flow between them. Without credentials."""

    region: str = Field(description="This one.")
    mode: str
    regions: list[RegionInfo]
    flows: list[FlowInfo]


class Sources(Wanted):
    """Regions to pull from; all, if none is named."""

    sources: list[str] = Field(default_factory=list, max_length=100, examples=[["na"]])


class ChainKeys(Wanted):
    """A chain of blocks."""

    keys: str = Field(
        pattern="^([0-9a-f]{32})+$",
        max_length=32 * MAX_CHAIN,
        examples=[KEY_EXAMPLE],
        description="Keys of a prompt's blocks in order, joined.",
    )


class RegionHolding(Model):
    """What a region has of a chain, as it published it last."""

    region: str = Field(examples=["na"])
    published: float
    blocks: int = Field(description="How many of the blocks it has.")
    prefix: int = Field(description="How many from the first on, without a gap.")
    runs: list[tuple[int, int]] = Field(description="First block and the one behind the last, of each run that it has.")


class Paused(Model):
    """Sources from which nothing is copied."""

    paused: dict[str, str] = Field(description="By source: since when and by whom.")


class NodeReceipt(Model):
    """A node has swept its memory and its disk."""

    node: str = Field(examples=["gpu-17-1f6a2b3c"])
    time: float
    blocks: int = Field(description="That went with the sweep.")


class RegionReceipts(Model):
    """What a region's bucket shows."""

    done: bool
    known: bool = Field(description="Whether the tombstone is there.")
    left: int | None = Field(description="Blocks from before the purge that are still there; null: not to be seen.")
    receipts: list[NodeReceipt]
    waiting: list[str] = Field(description="Nodes of the region that have not confirmed it yet.")
    problem: str = Field(description="Why the region could not be looked at.")


class PurgeProof(Model):
    """A purge, and who has carried it out."""

    tombstone: str
    time: float
    tenant: str
    model: str
    namespace: Hex
    prefix: Hex
    done: bool = Field(description="Everywhere that can be seen from here.")
    regions: dict[str, RegionReceipts]
