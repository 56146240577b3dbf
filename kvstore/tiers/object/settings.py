"""Where the objects are, and how to reach them."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote, urlsplit

from kvstore.errors import ConfigError

_URL = re.compile(r"s3://(?P<bucket>[a-z0-9][a-z0-9.-]{1,61}[a-z0-9])(?:/(?P<prefix>.*))?")


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectSettings:
    """A bucket or a folder. Raises ConfigError when the fields contradict each other."""

    url: str
    """``s3://bucket/prefix`` or ``file:///folder``."""
    endpoint: str = ""
    """``http://`` or ``https://`` address of an S3-compatible server; empty: AWS."""
    region: str = ""
    """Empty: what the AWS environment says, else us-east-1."""
    access_key_id: str = ""
    """Empty: boto3's chain of credentials (environment, profile, instance role)."""
    secret_access_key: str = field(default="", repr=False)
    session_token: str = field(default="", repr=False)
    path_style: bool = True
    """Address the bucket as ``host/bucket`` and not as ``bucket.host``."""
    ca_file: Path | None = None
    """PEM file with authorities to trust besides the system's."""
    create_bucket: bool = False
    capacity_bytes: int | None = None
    """Hard cap of the blocks under the prefix. Without peers only right while no other process writes there."""
    bytes_in_flight: int = 256 << 20
    """Bytes on the wire at a time, both ways together."""
    max_blocks: int = 2_000_000
    """Bound of the index in memory, some 200 bytes each; beyond it the least valuable are forgotten."""
    connect_timeout: float = 2.0
    request_timeout: float = 10.0
    """Seconds for one request from connecting to its last byte."""
    read_timeout: float | None = None
    """Seconds without a byte after which a reply counts as lost; None: only ``request_timeout`` counts."""
    retries: int = 2
    """How often a request is repeated after a 5xx answer or a lost connection; none is started after ``request_timeout``."""

    def __post_init__(self) -> None:
        if self.folder is None and not _URL.fullmatch(self.url):
            raise ConfigError("object.url", self.url, "not s3://bucket/prefix or file:///folder", "Write one of these.")
        if self.endpoint and not re.fullmatch(r"https?://[^/]+/?", self.endpoint):
            raise ConfigError("object.endpoint", self.endpoint, "not an http(s) address", "Write https://host:port.")
        if bool(self.access_key_id) != bool(self.secret_access_key):
            remedy = "Set both, or neither to use the AWS environment."
            raise ConfigError("object.access_key_id", self.access_key_id, "the key or its secret is missing", remedy)

    @property
    def folder(self) -> Path | None:
        """The folder of a ``file://`` URL, else None."""
        parts = urlsplit(self.url)
        return Path(unquote(parts.path)) if parts.scheme == "file" and parts.path.startswith("/") else None

    @property
    def bucket(self) -> str:
        """Name of the bucket; empty for a folder."""
        match = _URL.fullmatch(self.url)
        return match["bucket"] if match else ""

    @property
    def prefix(self) -> str:
        """What all object names start with, without slashes at its ends."""
        match = _URL.fullmatch(self.url)
        return (match["prefix"] or "").strip("/") if match else ""
