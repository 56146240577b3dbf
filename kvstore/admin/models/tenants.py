"""Tenants. No model but that of a new one has a secret or a token in it."""

from __future__ import annotations

from typing import Annotated

from pydantic import ConfigDict, Field

from kvstore.admin.models.base import Model, TierName, Wanted
from kvstore.tenants.book import LARGEST_SECRET, MOST_UIDS, NAME, SMALLEST_SECRET, Quota, Uid

Uids = Annotated[list[Uid], Field(max_length=MOST_UIDS, examples=[[1001]])]
Secret = Annotated[
    str,
    Field(
        pattern=f"^(([0-9a-f]{{2}}){{{SMALLEST_SECRET},{LARGEST_SECRET}}})?$",
        description="Hexadecimal: that of the tenant on the other nodes of the region; empty: a new one.",
        repr=False,
    ),
]
TenantName = Annotated[str, Field(pattern=NAME, examples=["acme"])]


class TenantTier(Model):
    """What a tenant has in a tier."""

    medium: TierName
    blocks: int
    used_bytes: int
    capacity_bytes: int | None = Field(description="Its quota, else the tier's cap; null: neither.")
    evicted: int = Field(0, description="Blocks given up for its own quota, since the node's start.")
    refused: int = Field(0, description="Blocks without room.")


class TenantInfo(Model):
    """A tenant of this node."""

    name: TenantName
    uids: list[int] = Field(description="Users whose engines are the tenant's.")
    shares: str = Field(description="The tenant whose blocks it shares; empty: it is on its own.")
    quota: Quota
    created: float
    rotated: float = Field(description="When its secret was made.")
    served: bool = Field(description="Whether the node serves it now.")
    clients: int = Field(0, description="Connected to the node.")
    tiers: list[TenantTier] = Field(default_factory=list)


class TenantPage(Model):
    """Tenants, by name."""

    items: list[TenantInfo]
    cursor: str = ""


class NewTenant(Wanted):
    """A tenant to make."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"name": "acme", "uids": [1001], "quota": {"disk": 107374182400}}]}
    )

    name: TenantName
    uids: Uids = Field(default_factory=list, description="Users whose engines are the tenant's.")
    shares: str = Field(
        "", max_length=64, description="A tenant whose blocks it is to share, with all that this tells."
    )
    quota: Quota = Quota()
    secret: Secret = ""


class TenantChange(Wanted):
    """What is to be otherwise. A field that is left out stays as it is."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"quota": {"disk": 53687091200}}]})

    uids: Uids | None = None
    quota: Quota | None = Field(None, description="Of all tiers: one that is left out in it has none.")


class CreatedTenant(Model):
    """A new tenant, and what is shown this once."""

    name: TenantName
    token: str = Field(description="What its engines show the node: the content of KVSTORE_NODE__TOKEN_FILE.")
    secret: str = Field(description="Behind its block keys, for the other nodes of the region; empty where it shares.")


class NewSecret(Wanted):
    """A secret to take in place of the one before."""

    model_config = ConfigDict(json_schema_extra={"examples": [{}]})

    secret: Secret = ""


class RotatedSecret(Model):
    """The new secret, shown this once."""

    name: TenantName
    secret: str


class RotatedToken(Model):
    """The new token, shown this once."""

    name: TenantName
    token: str


class Removed(Model):
    """A tenant that is no more."""

    name: TenantName


class TenantPurge(Model):
    """What went of a tenant on this node, and the job that deletes the rest."""

    name: TenantName
    deleted: dict[TierName, int] = Field(description="Blocks that went from this node's own tiers.")
    left: dict[TierName, int] = Field(description="Blocks that are there now; 0 unless its engines go on saving.")
    job: str | None = Field(description="Deletes them in the bucket, and everywhere; null where there is no bucket.")
