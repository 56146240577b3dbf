"""Every setting: sections, types, bounds and rules. The descriptions become ``docs/configuration.md``."""

from __future__ import annotations

import os
import re
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SecretStr, model_validator
from pydantic_core import PydanticCustomError

from kvstore.errors import ConfigError
from kvstore.units import exact_bytes, parse_bytes

PUBLIC_SECRET = b"kvstore-public-default"
"""Used when no tenant secret is set. Everyone knows it, so it hides nothing: for one machine, not for a shared bucket."""

_MIB, _GIB = 1 << 20, 1 << 30


def _as_bytes(value: object) -> object:
    if not isinstance(value, str):
        return value
    try:
        return parse_bytes(value)
    except ValueError as error:
        context = {"problem": str(error), "remedy": "Write it as 16GiB, 500MB, or a number of bytes."}
        raise PydanticCustomError("kvstore", "{problem}", context) from None


Bytes = Annotated[int, BeforeValidator(_as_bytes)]


def _as_texts(value: object) -> object:
    return [text.strip() for text in value.split(",") if text.strip()] if isinstance(value, str) else value


Texts = Annotated[tuple[str, ...], BeforeValidator(_as_texts)]
"""A list, or a text with commas."""


def _as_items(value: object) -> object:
    return [part for part in re.split(r"[,\s]+", value) if part] if isinstance(value, str) else value


Uids = Annotated[tuple[Annotated[int, Field(ge=0, lt=(1 << 32) - 1)], ...], BeforeValidator(_as_items)]


def _refuse(field: str, problem: str, remedy: str) -> PydanticCustomError:
    """An error of a rule that spans fields; ``field`` is the one to change."""
    return PydanticCustomError("kvstore", "{problem}", {"field": field, "problem": problem, "remedy": remedy})


def default_socket() -> Path:
    """Where a node listens and its clients look, unless told otherwise."""
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    base = Path(runtime) / "kvstore" if runtime else Path(f"/tmp/kvstore-{os.getuid()}")
    return base / "node.sock"


def default_directory() -> Path:
    """``/var/lib/kvstore`` for root, the user's cache folder for everybody else."""
    if os.getuid() == 0:
        return Path("/var/lib/kvstore")
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kvstore"


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, protected_namespaces=())


class NodeSection(_Section):
    """The process."""

    socket: Path = Field(
        default_factory=default_socket, description="Unix socket that the node listens on and its clients connect to."
    )
    directory: Path = Field(default_factory=default_directory, description="Where the node keeps its files.")
    allow_uids: Uids = Field(
        (),
        description="Users that may use the socket besides the node's own and root, as numbers: [1000, 1001], "
        "or 1000,1001 in a text.",
    )
    token_file: Path | None = Field(
        None,
        description="File with the token that a client of a node with several tenants shows; "
        "empty: an engine is known by its user, an operator by being able to read tenants.book.",
    )
    drain_seconds: float = Field(
        10.0,
        ge=0,
        le=3600,
        description="Seconds that a stopping node spends on writes it has queued; the rest is dropped.",
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="Least severe message that is logged."
    )


class HostSection(_Section):
    """Shared host memory."""

    bytes: Bytes = Field(4 * _GIB, ge=_MIB, description="Size of the arena in /dev/shm, taken when the node starts.")
    extent_bytes: Bytes | None = Field(
        None,
        ge=64 << 10,
        description="Unit in which the arena is given to a block size, at least the largest block; "
        "empty: a sixteenth of host.bytes, but 64MiB to 1GiB.",
    )

    @property
    def extent(self) -> int:
        """``extent_bytes``, or its default. Few large extents waste little at their ends, many suit many block sizes."""
        return self.extent_of(self.bytes, self.extent_bytes)

    @staticmethod
    def extent_of(nbytes: int, extent_bytes: int | None) -> int:
        """The extent of an arena of that size."""
        share = nbytes // 16 // 4096 * 4096
        return extent_bytes or min(max(share, 64 * _MIB), _GIB)

    @model_validator(mode="after")
    def _check(self) -> HostSection:
        if self.extent % 4096:
            raise _refuse("host.extent_bytes", "not a multiple of 4096 bytes", "Use a size such as 64MiB.")
        if self.bytes < self.extent:
            raise _refuse(
                "host.bytes",
                f"smaller than host.extent_bytes ({exact_bytes(self.extent)}), so not one block fits",
                "Raise host.bytes, or lower host.extent_bytes.",
            )
        return self


class DiskSection(_Section):
    """Local NVMe."""

    enabled: bool = Field(True, description="Whether the node keeps blocks on a local disk.")
    directory: Path | None = Field(None, description="Folder of the segment files; empty: disk/ in node.directory.")
    bytes: Bytes = Field(16 * _GIB, ge=_MIB, description="Hard cap of the segment files together.")
    segment_bytes: Bytes = Field(_GIB, ge=_MIB, description="Size of one segment file; at least the largest block.")
    threads: int = Field(4, ge=1, le=64, description="Reads and writes at a time.")

    @model_validator(mode="after")
    def _check(self) -> DiskSection:
        if self.segment_bytes % 4096:
            raise _refuse("disk.segment_bytes", "not a multiple of 4096 bytes", "Use a size such as 1GiB.")
        if self.bytes < self.segment_bytes:
            raise _refuse(
                "disk.bytes",
                f"smaller than disk.segment_bytes ({exact_bytes(self.segment_bytes)}), so not one block fits",
                "Raise disk.bytes, lower disk.segment_bytes, or switch the tier off with disk.enabled = false.",
            )
        return self


class ObjectSection(_Section):
    """The region's bucket."""

    url: str = Field("", description="s3://bucket/prefix, or file:///folder; empty: no object tier.")
    endpoint: str = Field("", description="URL of the S3-compatible server; empty: AWS.")
    region: str = Field(
        "", description="Region name for signatures; empty: what the AWS environment says, else us-east-1."
    )
    access_key_id: str = Field(
        "", description="Access key; empty: the usual AWS chain (environment, profile, instance role)."
    )
    secret_access_key: SecretStr = Field(SecretStr(""), description="Secret of the access key.")
    session_token: SecretStr = Field(SecretStr(""), description="Token of temporary credentials.")
    path_style: bool = Field(True, description="Address the bucket as host/bucket, as most servers but AWS want it.")
    ca_file: Path | None = Field(None, description="PEM file of the authority that signed the server's certificate.")
    bytes: Bytes | None = Field(
        None,
        ge=_MIB,
        description="Hard cap of the blocks in it, the same on all nodes; several need a catalog to keep it. Empty: no limit.",
    )
    bytes_in_flight: Bytes = Field(
        256 * _MIB, ge=_MIB, description="Bytes that may be on the wire at a time, both ways together."
    )
    create_bucket: bool = Field(False, description="Whether to create the bucket when it does not exist.")

    @model_validator(mode="after")
    def _check(self) -> ObjectSection:
        if self.url and not re.fullmatch(r"s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](/.*)?|file:///.+", self.url):
            raise _refuse(
                "object.url",
                "not s3://bucket/prefix or file:///folder",
                "Write the bucket in lower case, without the endpoint.",
            )
        if self.endpoint and not re.fullmatch(r"https?://[^/]+/?", self.endpoint):
            raise _refuse("object.endpoint", "not an http:// or https:// address", "Write it as https://host:port.")
        if self.url.startswith("file:") and self.endpoint:
            raise _refuse("object.endpoint", "object.url is a folder, which has no endpoint", "Remove one of the two.")
        if bool(self.access_key_id) != bool(self.secret_access_key.get_secret_value()):
            raise _refuse(
                "object.access_key_id",
                "access_key_id and secret_access_key come as a pair",
                "Set both, or neither to use the AWS environment.",
            )
        return self


class CatalogSection(_Section):
    """The index of the bucket that the nodes of a region share."""

    url: str = Field(
        "",
        description="sqlite:///path, redis://host:port/db or rediss:// (TLS), redis+sentinel://hosts/service, "
        "redis+cluster://hosts; empty: no catalog, each node lists the bucket.",
    )
    password: SecretStr = Field(SecretStr(""), description="Password of the Redis or Valkey server.")
    ca_file: Path | None = Field(None, description="PEM file of the authority that signed the server's certificate.")

    @model_validator(mode="after")
    def _check(self) -> CatalogSection:
        if self.url and not re.fullmatch(r"sqlite:///[^?#]+|rediss?(\+sentinel|\+cluster)?://[^?#]+", self.url):
            raise ConfigError(
                "catalog.url",
                re.sub(r"//.*@", "//...@", self.url),
                "not sqlite:///path, redis:// or rediss://",
                "Write redis://host:6379/0.",
            )
        if re.match(r"[^/]*//[^/@]*:[^/@]*@", self.url):
            raise ConfigError(
                "catalog.url",
                re.sub(r"//.*@", "//...@", self.url),
                "has a password in it, and addresses are shown and logged",
                "Set catalog.password.",
            )
        return self


class IdentitySection(_Section):
    """Whose blocks these are."""

    tenant: str = Field(
        "default", pattern=r"^[A-Za-z0-9._-]{1,64}$", description="Tenant's name; tenants never share a block."
    )
    secret: SecretStr = Field(
        SecretStr(""),
        description="Secret behind block keys, the same on all nodes that share blocks; empty: a public default.",
    )
    secret_file: Path | None = Field(None, description="File that holds the secret, in place of identity.secret.")

    @model_validator(mode="after")
    def _check(self) -> IdentitySection:
        text = self.secret.get_secret_value()
        if text and self.secret_file:
            raise _refuse("identity.secret_file", "identity.secret is set as well", "Keep one of the two.")
        if text and len(text.encode()) < 16:
            raise _refuse("identity.secret", "shorter than 16 bytes", "Make one with: openssl rand -hex 32")
        return self

    @property
    def is_public(self) -> bool:
        """True while block keys are derived from the public default."""
        return not self.secret.get_secret_value() and self.secret_file is None

    def secret_bytes(self) -> bytes:
        """The tenant secret. Reads ``secret_file``; raises ConfigError when it cannot be used."""
        if self.secret_file is None:
            return self.secret.get_secret_value().encode() or PUBLIC_SECRET
        try:
            secret = self.secret_file.read_bytes().strip()
        except OSError as error:
            raise ConfigError(
                "identity.secret_file",
                str(self.secret_file),
                error.strerror or "cannot be read",
                "Name a readable file.",
            ) from error
        if len(secret) < 16:
            raise ConfigError(
                "identity.secret_file",
                str(self.secret_file),
                "holds less than 16 bytes",
                "Make one with: openssl rand -hex 32",
            )
        return secret


class TenantsSection(_Section):
    """Several tenants on one node."""

    book: Path | None = Field(
        None,
        description="File of the tenants that kvstore tenants makes, as /var/lib/kvstore/tenants.json; "
        "empty: the node has one, identity.tenant.",
    )
    host_bytes: Bytes = Field(
        _GIB, ge=_MIB, description="Size of a tenant's arena, where it has no quota of its own; beside host.bytes."
    )


class EncryptionSection(_Section):
    """Encryption of the blocks on disk and in the bucket; every node and region that shares them needs the keys."""

    keys: SecretStr = Field(
        SecretStr(""), description="Keys as id:key, separated by spaces, the active one first; empty: none."
    )
    key_file: Path | None = Field(
        None, description="File with one id:key a line, the active one first; read again when it changes."
    )

    @model_validator(mode="after")
    def _check(self) -> EncryptionSection:
        if self.keys.get_secret_value() and self.key_file:
            raise _refuse("encryption.key_file", "encryption.keys is set as well", "Keep one of the two.")
        return self


class WriteSection(_Section):
    """Writing down to the slower tiers."""

    queue_bytes: Bytes | None = Field(
        None,
        ge=_MIB,
        description="Bytes that may wait for each slower tier, more is dropped; empty: a quarter of host.bytes.",
    )


class PolicySection(_Section):
    """What is kept, and what is loaded."""

    eviction: Literal["reuse", "lru"] = Field(
        "reuse", description="Which blocks a full tier gives up first: by learnt reuse, or the least recently used."
    )
    admission: Literal["off", "observe", "enforce"] = Field(
        "observe",
        description="Whether disk and bucket refuse blocks that will hardly be used again; observe only counts them.",
    )
    planner: Literal["off", "observe", "enforce"] = Field(
        "enforce",
        description="Whether engines that report their speed are told to compute what would take longer to load; "
        "observe only counts it, off loads all that is stored.",
    )
    prefetch: Literal["best_effort", "wait_complete", "timeout"] = Field(
        "timeout",
        description="How long a load may take: no longer than copying what is in host memory, as long as it takes, "
        "or prefetch_timeout_base and prefetch_timeout_per_ki_token. What is missing then is computed.",
    )
    prefetch_timeout_base: float = Field(1.0, ge=0, le=3600, description="Seconds that any load may take.")
    prefetch_timeout_per_ki_token: float = Field(
        0.25, ge=0, le=3600, description="Seconds more for each 1,024 tokens to load."
    )


class ApiSection(_Section):
    """The admin API."""

    listen: str = Field("", description="host:port of the admin API, as 127.0.0.1:7070; empty: none.")
    ready_warm: float = Field(
        0.0, ge=0, le=1, description="Share of its warm-up that a node needs to be ready; 0: it is ready cold."
    )
    tokenizers: Path | None = Field(
        None,
        description="Folder with MODEL/tokenizer.json of each model, for lookups of text; empty: token ids only.",
    )
    tokens: Path | None = Field(
        None, description="File of the tokens that kvstore token makes; empty: whoever reaches the API may use it."
    )
    oidc_issuer: str = Field(
        "",
        description="URL of an OpenID Connect issuer whose tokens are taken, as https://login.example.com; empty: none.",
    )
    oidc_audience: str = Field("", description="What such tokens must name as their audience.")
    oidc_role_claim: str = Field(
        "roles", min_length=1, description="Claim that gives the role, as roles or realm_access.roles."
    )
    oidc_roles: Texts = Field(
        (),
        max_length=256,
        description="What values of that claim mean, as sre=operator,platform=admin; empty: viewer, operator, admin.",
    )
    oidc_tenant_claim: str = Field(
        "",
        max_length=256,
        description="Claim that limits a token to one tenant, as tenant or org.tenant, or says * for all; tokens without it "
        "are refused. Empty: tokens are of all tenants.",
    )
    tls_certificate: Path | None = Field(None, description="PEM file of the API's certificate chain; empty: no TLS.")
    tls_key: Path | None = Field(None, description="PEM file of the certificate's private key.")
    client_ca: Path | None = Field(
        None, description="PEM file of the authority whose certificates clients must show; empty: none asked for."
    )
    peers: Texts = Field(
        (),
        max_length=256,
        description="APIs of nodes that lookups for routers ask too, as http://10.0.0.2:7070, with commas; may have its own. "
        "Nodes of one catalog find each other.",
    )
    peer_token: Path | None = Field(None, description="File with the token that peers are asked with; empty: none.")

    @property
    def asks_who(self) -> bool:
        """Whether requests must show a token."""
        return self.tokens is not None or bool(self.oidc_issuer)

    @property
    def url(self) -> str:
        """Where clients reach it, when ``listen`` is not empty."""
        return f"{'https' if self.tls_certificate else 'http'}://{self.listen}"

    @property
    def address(self) -> tuple[str, int]:
        """Host and port of ``listen``, which is not empty."""
        host, _, port = self.listen.rpartition(":")
        return host.strip("[]"), int(port)

    @model_validator(mode="after")
    def _check(self) -> ApiSection:
        for peer in self.peers:
            if not re.fullmatch(r"https?://[^/?#@\s]+", peer):
                raise _refuse(
                    "api.peers", f"{peer!r} is not the address of an API", "Write it as http://10.0.0.2:7070."
                )
        _check_oidc(self)
        if not self.listen:
            return self
        if not re.fullmatch(r"([A-Za-z0-9.-]+|\[[0-9a-fA-F:]+\]):\d{1,5}", self.listen) or self.address[1] > 65535:
            raise _refuse("api.listen", "not host:port", "Write it as 127.0.0.1:7070.")
        if bool(self.tls_certificate) != bool(self.tls_key):
            problem = "certificate and key come as a pair"
            raise _refuse("api.tls_key" if self.tls_certificate else "api.tls_certificate", problem, "Set both.")
        if self.client_ca and not self.tls_certificate:
            raise _refuse("api.client_ca", "only TLS asks for certificates", "Set api.tls_certificate and api.tls_key.")
        if not is_loopback(self.address[0]) and not self.asks_who:
            raise _refuse(
                "api.listen",
                "others than this machine could reach it, and it does not ask who they are",
                "Make a token with kvstore token create and set api.tokens, set api.oidc_issuer, or listen on 127.0.0.1.",
            )
        return self


def _check_oidc(api: ApiSection) -> None:
    url = urlsplit(api.oidc_issuer)
    if not api.oidc_issuer:
        return
    if not (url.scheme == "https" or (url.scheme == "http" and is_loopback(url.hostname or ""))) or not url.hostname:
        raise _refuse(
            "api.oidc_issuer", "not an https address", "Write it as the issuer does: https://login.example.com."
        )
    if not api.oidc_audience:
        raise _refuse(
            "api.oidc_audience", "empty: tokens for other services would do here", "Set it as the issuer does."
        )
    for pair in api.oidc_roles:
        if pair.rpartition("=")[2] not in ("viewer", "operator", "admin") or "=" not in pair:
            raise _refuse("api.oidc_roles", f"{pair!r} is not value=role", "Write it as sre=operator,platform=admin.")


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a listener there; names other than localhost count as others."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class EventsSection(_Section):
    """KV cache events for routers, in vLLM's format."""

    listen: str = Field(
        "",
        description="ZeroMQ address to publish at, as tcp://127.0.0.1:5557 or ipc:///run/kvstore/events; empty: nowhere.",
    )

    @model_validator(mode="after")
    def _check(self) -> EventsSection:
        match = re.fullmatch(r"ipc:///.+|tcp://(\[[0-9a-fA-F:]+\]|[A-Za-z0-9.-]+):\d{1,5}", self.listen)
        if self.listen and match is None:
            raise _refuse("events.listen", "not tcp://host:port or ipc:///path", "Write it as tcp://127.0.0.1:5557.")
        if match is not None and match[1] and not is_loopback(match[1].strip("[]")):
            problem = "others than this machine could listen, and it does not ask who they are"
            raise _refuse(
                "events.listen", problem, "Publish on 127.0.0.1 or ipc:///, and forward it over something that asks."
            )
        return self


class TelemetrySection(_Section):
    """Traces, sent to an OpenTelemetry collector."""

    otlp_endpoint: str = Field(
        "", description="OTLP over HTTP address that spans are sent to, as http://127.0.0.1:4318; empty: no traces."
    )
    sample_ratio: float = Field(
        0.01,
        ge=0,
        le=1,
        description="Share of the traces that begin here which are recorded; what an engine's trace leads to is if that is.",
    )

    @model_validator(mode="after")
    def _check(self) -> TelemetrySection:
        if self.otlp_endpoint and not re.fullmatch(r"https?://[^/@]+(/.*)?", self.otlp_endpoint):
            problem = "not an http:// or https:// address"
            raise _refuse("telemetry.otlp_endpoint", problem, "Write it as http://127.0.0.1:4318.")
        return self


class RegionSection(_Section):
    """The node's region: where it reads from (remote.mode), and what the admin API shows of replication."""

    name: str = Field("", description="Name of this region in the topology; empty: it stands alone.")
    topology: Path | None = Field(None, description="TOML file with all regions.")

    @model_validator(mode="after")
    def _check(self) -> RegionSection:
        if bool(self.name) != bool(self.topology):
            raise _refuse(
                "region.name" if self.topology else "region.topology", "name and topology come as a pair", "Set both."
            )
        return self


class RemoteSection(_Section):
    """Reading what only other regions have, when a request asks for it."""

    mode: Literal["off", "observe", "enforce"] = Field(
        "off",
        description="Whether blocks that other regions have published are loaded from there where that beats computing; "
        "observe only counts them.",
    )
    bytes_per_second: Bytes | None = Field(
        None,
        ge=1,
        description="What this node may read of a flow; empty: as much as the flow's own bytes_per_second allows.",
    )
    bytes_in_flight: Bytes = Field(
        256 * _MIB, ge=_MIB, description="Bytes that may be on their way from other regions at a time."
    )


class Config(_Section):
    """Every setting of a node and of the tools around it."""

    node: NodeSection = NodeSection()
    host: HostSection = HostSection()
    disk: DiskSection = DiskSection()
    object: ObjectSection = ObjectSection()
    catalog: CatalogSection = CatalogSection()
    identity: IdentitySection = IdentitySection()
    tenants: TenantsSection = TenantsSection()
    encryption: EncryptionSection = EncryptionSection()
    write: WriteSection = WriteSection()
    policy: PolicySection = PolicySection()
    api: ApiSection = ApiSection()
    events: EventsSection = EventsSection()
    telemetry: TelemetrySection = TelemetrySection()
    region: RegionSection = RegionSection()
    remote: RemoteSection = RemoteSection()

    @property
    def disk_directory(self) -> Path:
        """Where the segment files are."""
        return self.disk.directory or self.node.directory / "disk"

    @property
    def queue_bytes(self) -> int:
        """Bytes that may wait to be written to each slower tier."""
        return self.write.queue_bytes or self.host.bytes // 4

    @model_validator(mode="after")
    def _check(self) -> Config:
        if self.catalog.url and not self.object.url:
            raise _refuse("catalog.url", "there is no bucket for it to index", "Set object.url too.")
        if self.remote.mode != "off" and not (self.object.url and self.region.name):
            raise _refuse(
                "remote.mode",
                "what other regions have, only a node with a bucket knows that has a place in a topology",
                "Set object.url, region.name and region.topology too.",
            )
        if self.queue_bytes > self.host.bytes // 4:
            raise _refuse(
                "write.queue_bytes",
                "more than a quarter of host.bytes, and waiting blocks hold their place in host memory",
                "Lower write.queue_bytes, or leave it empty.",
            )
        return self
