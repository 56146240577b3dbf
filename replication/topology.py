"""Which regions there are, and what may flow between them: one TOML file, the same in every region.

mode = "enforce"                        # off, observe (plan and report, copy nothing) or enforce

[regions.na]
url = "s3://kv-na/prod"
endpoints = ["https://s3.na.example.com", "https://vpn.na.example.com"]    # links, best first
location = "US"                         # a tag for residency rules
public_key = "mFnD...="                 # kvstore region key FILE prints it
credentials_file = "/etc/kvstore/na.credentials"    # or the *_env names; neither: the AWS environment

[[flows]]
from = "na"
to = ["eu", "apac"]
min_score = 1.0
max_bytes = "2TiB"
bytes_per_second = "100MiB"
price_per_gb = 0.02
money_per_month = 500

[[residency]]
tenants = ["bank-*"]
allowed = ["US"]                        # names or locations of regions

[[retention]]
tenants = ["trial-*"]
ttl = "30d"                             # since a block was used last in the region
retire_old_revisions = true             # of a model, once a newer one serves and nobody asks for them
grace = "1h"

[[quota]]
tenant = "trial-7"
bytes = "500GiB"                        # of each region's bucket
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import PydanticCustomError

from kvstore.config.schema import Bytes
from kvstore.errors import ConfigError
from kvstore.tiers.object import ObjectSettings
from kvstore.tombstones import Labelled
from replication.keys import MAKE_ONE, parse_public

Name = Field(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")

CONNECT_SECONDS = 2.0
STALL_SECONDS = 3.0
"""A reply without a byte for so long is lost, and another link is tried."""
REQUEST_SECONDS = 300.0
"""For one block over a slow link."""


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, ignored_types=(cached_property,))


class Region(_Table):
    """A bucket and how to reach it."""

    url: str
    endpoints: tuple[str, ...] = ("",)
    """Addresses of the same bucket, best first; an empty one is AWS."""
    location: str = ""
    public_key: str = ""
    """Who pulls from the region needs it."""
    s3_region: str = ""
    access_key_id_env: str = ""
    secret_access_key_env: str = ""
    credentials_file: Path | None = None
    """TOML with access_key_id, secret_access_key and perhaps session_token."""
    ca_file: Path | None = None
    path_style: bool = True

    @field_validator("endpoints")
    @classmethod
    def _some(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not value:
            raise _refusal("no endpoint", "Name at least one, or leave the key out for AWS.")
        return value

    @field_validator("public_key")
    @classmethod
    def _is_key(cls, value: str) -> str:
        try:
            if value:
                parse_public(value)
        except ValueError:
            raise _refusal("not the base64 text of an Ed25519 public key", MAKE_ONE) from None
        return value

    @model_validator(mode="after")
    def _one_place_for_credentials(self) -> Region:
        if bool(self.access_key_id_env) != bool(self.secret_access_key_env):
            raise _refusal("access_key_id_env and secret_access_key_env come as a pair", "Set both, or neither.")
        if self.access_key_id_env and self.credentials_file:
            raise _refusal("credentials_file and the *_env names exclude each other", "Keep one of the two.")
        return self


class Flow(_Table):
    """What destinations may pull from a source, and at what price. Empty limits do not limit."""

    source: str = Field(alias="from")
    to: tuple[str, ...] = Field(min_length=1)
    models: tuple[str, ...] = ("*",)
    """Patterns as in a shell."""
    tenants: tuple[str, ...] = ("*",)
    min_score: float = Field(0.0, ge=0)
    """Prefill seconds that a block must be expected to save, itself or with what continues it."""
    max_bytes: Bytes | None = Field(None, ge=0)
    """How much of the source's hot set the destination holds, what it has already included."""
    bytes_per_second: Bytes | None = Field(None, ge=1)
    price_per_gb: float = Field(0.0, ge=0)
    """Of 10^9 bytes copied, in any currency."""
    money_per_month: float | None = Field(None, ge=0)
    """Calendar months, UTC."""

    @model_validator(mode="after")
    def _has_a_price(self) -> Flow:
        if self.money_per_month is not None and not self.price_per_gb:
            raise _refusal("money_per_month without a price limits nothing", "Set price_per_gb.")
        return self

    @property
    def identity(self) -> str:
        """Tells the flows into one destination apart, over restarts."""
        return f"{self.source} models={','.join(self.models)} tenants={','.join(self.tenants)}"

    def takes(self, label: Labelled) -> bool:
        return _matches(label.model, self.models) and _matches(label.tenant, self.tenants)


class Residency(_Table):
    """Where blocks of some tenants or models may be. All rules that match a block hold."""

    models: tuple[str, ...] = ("*",)
    tenants: tuple[str, ...] = ("*",)
    allowed: tuple[str, ...] = ()
    forbidden: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _rules_something(self) -> Residency:
        if bool(self.allowed) == bool(self.forbidden):
            raise _refusal("a rule has allowed or forbidden regions, one of the two", "Remove one, or split the rule.")
        return self

    def permits(self, label: Labelled, places: set[str]) -> bool:
        """Whether the block may be in the region with this name and location."""
        if not (_matches(label.model, self.models) and _matches(label.tenant, self.tenants)):
            return True
        return bool(places.intersection(self.allowed)) if self.allowed else not places.intersection(self.forbidden)


def _as_seconds(value: object) -> object:
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(s|min|h|d)\s*", value)
    if match is None:
        raise _refusal("not a duration", "Write it as 30d, 12h, 10min or 90s.")
    return float(match[1]) * {"s": 1, "min": 60, "h": 3600, "d": 86_400}[match[2]]


Seconds = Annotated[float, BeforeValidator(_as_seconds)]


class Retention(_Table):
    """How long blocks of some models and tenants are kept in each region's bucket. All rules that match a block hold."""

    models: tuple[str, ...] = ("*",)
    tenants: tuple[str, ...] = ("*",)
    ttl: Seconds | None = Field(None, ge=60)
    """Since a block, or what continues it, was used last; where no use is known, since it was created."""
    retire_old_revisions: bool = False
    """Whether a model's newer weights retire the blocks of older ones, once nobody asks for those any more."""
    grace: Seconds = Field(3600.0, ge=180)
    """For how long nobody must have asked. Nodes report once a minute."""

    @model_validator(mode="after")
    def _retains_something(self) -> Retention:
        if self.ttl is None and not self.retire_old_revisions:
            raise _refusal("a rule without ttl and retire_old_revisions does nothing", "Set one of them.")
        return self

    def covers(self, label: Labelled) -> bool:
        return _matches(label.model, self.models) and _matches(label.tenant, self.tenants)


class Quota(_Table):
    """How much of each region's bucket a tenant's blocks may fill."""

    tenant: str = Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")
    bytes: Bytes = Field(ge=1 << 20)


class Topology(_Table):
    """The whole file."""

    mode: Literal["off", "observe", "enforce"] = "observe"
    regions: dict[str, Region] = Field(min_length=1)
    flows: tuple[Flow, ...] = ()
    residency: tuple[Residency, ...] = ()
    retention: tuple[Retention, ...] = ()
    quota: tuple[Quota, ...] = ()

    @property
    def quotas(self) -> dict[str, int]:
        """Bytes by tenant."""
        return {quota.tenant: quota.bytes for quota in self.quota}

    @model_validator(mode="after")
    def _names_fit(self) -> Topology:
        known = ", ".join(self.regions)
        places = {*self.regions, *(region.location for region in self.regions.values())}
        for name in self.regions:
            if not _is_name(name):
                raise _refusal(f"{name!r} is no name for a region", "Use lower-case letters, digits and '-'.")
        for flow in self.flows:
            for name in (flow.source, *flow.to):
                if name not in self.regions:
                    raise _refusal(f"a flow names the region {name!r}, which is not there", f"There are: {known}.")
            if flow.source in flow.to:
                raise _refusal(f"a flow leads from {flow.source!r} to itself", "Remove it from 'to'.")
            if not self.regions[flow.source].public_key:
                raise _refusal(f"the source {flow.source!r} has no public_key", MAKE_ONE)
        for name in self.regions:
            flows = [flow.identity for flow in self.flows_to(name)]
            if len(flows) != len(set(flows)):
                raise _refusal(
                    f"two flows bring the same to {name!r}", "Join them, or tell them apart by model or tenant."
                )
        if len(self.quotas) < len(self.quota):
            raise _refusal("a tenant has two quotas", "Keep one of them.")
        for rule in self.residency:
            for place in (*rule.allowed, *rule.forbidden):
                if place not in places:
                    raise _refusal(f"a residency rule names {place!r}", "Name a region, or the location of one.")
        return self

    def flows_to(self, destination: str) -> Iterator[Flow]:
        return (flow for flow in self.flows if destination in flow.to)

    def limited(self, bytes_per_second: int | None) -> Topology:
        """The same with no flow faster than that."""
        if bytes_per_second is None:
            return self
        slower = [min(flow.bytes_per_second or bytes_per_second, bytes_per_second) for flow in self.flows]
        flows = (flow.model_copy(update={"bytes_per_second": s}) for flow, s in zip(self.flows, slower, strict=True))
        return self.model_copy(update={"flows": tuple(flows)})

    def permits(self, label: Labelled, region: str) -> bool:
        """Whether residency allows blocks of this label in the region."""
        places = {region, self.regions[region].location}
        return all(rule.permits(label, places) for rule in self.residency)

    def key_of(self, region: str) -> Ed25519PublicKey:
        return parse_public(self.regions[region].public_key)

    def links(self, region: str) -> list[ObjectSettings]:
        """Settings of each link to a region's bucket, best first. Raises ConfigError."""
        table = self.regions[region]
        credentials = _credentials(region, table)
        return [
            ObjectSettings(
                url=table.url,
                endpoint=endpoint,
                region=table.s3_region,
                path_style=table.path_style,
                ca_file=table.ca_file,
                connect_timeout=CONNECT_SECONDS,
                read_timeout=STALL_SECONDS,
                request_timeout=REQUEST_SECONDS,
                retries=0,
                access_key_id=credentials.get("access_key_id", ""),
                secret_access_key=credentials.get("secret_access_key", ""),
                session_token=credentials.get("session_token", ""),
            )
            for endpoint in table.endpoints
        ]


def load_topology(path: Path) -> Topology:
    """Read and check the file. Raises ConfigError that names field, value and remedy."""
    try:
        tables = tomllib.loads(path.read_text())
    except OSError as error:
        raise ConfigError("--topology", str(path), error.strerror or "cannot be read", "Name a TOML file.") from error
    except ValueError as error:
        raise ConfigError("--topology", str(path), f"not TOML: {error}", "Mend the file.") from error
    try:
        return Topology.model_validate(tables)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(str(part) for part in first["loc"]) or path.name
        remedy = (first.get("ctx") or {}).get("remedy") or "See docs/regions.md."
        value = first["input"] if isinstance(first["input"], str | int | float) else ""
        raise ConfigError(field, value, str(first["msg"]).removeprefix("Input "), remedy) from None


def _credentials(name: str, region: Region) -> dict[str, str]:
    if region.credentials_file is not None:
        return _from_file(f"regions.{name}.credentials_file", region.credentials_file)
    if not region.access_key_id_env:
        return {}
    credentials = {}
    for key in ("access_key_id", "secret_access_key"):
        variable = getattr(region, f"{key}_env")
        if not os.environ.get(variable):
            raise ConfigError(
                f"regions.{name}.{key}_env", variable, "the variable is not set", f"export {variable}=..."
            )
        credentials[key] = os.environ[variable]
    return credentials


def _from_file(field: str, path: Path) -> dict[str, str]:
    remedy = 'Write access_key_id = "..." and secret_access_key = "..." in it, and let nobody else read it.'
    try:
        values: Mapping[str, Any] = tomllib.loads(path.read_text())
    except OSError as error:
        raise ConfigError(field, str(path), error.strerror or "cannot be read", remedy) from error
    except ValueError as error:
        raise ConfigError(field, str(path), "not TOML", remedy) from error
    needed, known = (
        {"access_key_id", "secret_access_key"},
        {"access_key_id", "secret_access_key", "session_token"},
    )
    if not needed <= values.keys() <= known or not all(isinstance(value, str) for value in values.values()):
        raise ConfigError(field, str(path), "not the keys of an S3 account", remedy)
    return dict(values)


def _matches(text: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(text, pattern) for pattern in patterns)


def _is_name(text: str) -> bool:
    return 0 < len(text) <= 63 and text.replace("-", "a").isalnum() and text.islower() and text.isascii()


def _refusal(problem: str, remedy: str) -> PydanticCustomError:
    return PydanticCustomError("kvstore", "{problem}", {"problem": problem, "remedy": remedy})
