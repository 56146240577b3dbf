"""Which nodes of a region are alive, and how to reach them: each says so every two seconds, in a document that runs out."""

from __future__ import annotations

import json
import os
import re
import secrets
import socket
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from ipaddress import ip_address
from typing import Self
from urllib.parse import urlsplit

import kvstore
from kvstore.catalog.documents import Document
from kvstore.parsing import parse_json

FOLDER = "nodes"
_NOWHERE = {"0.0.0.0", "::"}
_API = re.compile(r"https?://[^/?#@\s]+")


@dataclass(frozen=True, slots=True, kw_only=True)
class Presence:
    """What a node says of itself."""

    name: str
    """The node's own, which survives restarts (``node_name``)."""
    process: str
    """One life of it: ``host:pid:random``."""
    host: str
    region: str = ""
    """As configured; empty where none is."""
    api: str = ""
    """Address of its admin API, as ``http://10.0.0.2:7070``; empty: it has none."""
    started: float = 0.0
    """Seconds since the epoch."""
    version: str = ""
    expires: float = 0.0
    """When it counts as gone, unless it is heard of again. Known to readers only."""

    @classmethod
    def here(cls, name: str, region: str, api: str) -> Self:
        """Of this process. ``api``: the address that its API listens at, if it has one."""
        host = this_host()
        return cls(
            name=name,
            process=f"{host}:{os.getpid()}:{secrets.token_hex(4)}",
            host=host,
            region=region,
            api=_reachable(api, host),
            started=time.time(),
            version=kvstore.__version__,
        )

    @property
    def document(self) -> str:
        return f"{FOLDER}/{self.process}"

    def pack(self) -> bytes:
        fields = asdict(self)
        del fields["expires"]
        return json.dumps(fields).encode()

    @classmethod
    def unpack(cls, document: Document) -> Self | None:
        """None for what no node of this or a later version wrote."""
        try:
            fields = parse_json(document.body)
            known = {name: kind(fields[name]) for name, kind in _FIELDS.items()}
        except (ValueError, TypeError, KeyError):
            return None
        if not _API.fullmatch(known["api"]):
            known["api"] = ""
        return cls(**known, expires=document.expires)


_FIELDS: Mapping[str, type] = {
    "name": str, "process": str, "host": str, "region": str, "api": str, "started": float, "version": str,
}  # fmt: skip


def this_host() -> str:
    return re.sub(r"[^A-Za-z0-9.-]", "-", socket.gethostname())


def present(documents: Iterable[Document]) -> list[Presence]:
    """The nodes that are alive, by name; of one that came back, its latest life."""
    latest: dict[str, Presence] = {}
    for document in documents:
        one = Presence.unpack(document)
        if one is not None and (one.name not in latest or latest[one.name].started <= one.started):
            latest[one.name] = one
    return [latest[name] for name in sorted(latest)]


def apis(nodes: Iterable[Presence], host: str) -> list[str]:
    """Addresses of the nodes' APIs that can be reached from ``host``: those on loopback only where they are."""
    return [one.api for one in nodes if one.api and (one.host == host or not _loopback(one.api))]


def _reachable(api: str, host: str) -> str:
    """The address as others may use it: one that listens everywhere is reached by the machine's name."""
    parts = urlsplit(api)
    return parts._replace(netloc=f"{host}:{parts.port}").geturl() if parts.hostname in _NOWHERE else api


def _loopback(api: str) -> bool:
    try:
        host = urlsplit(api).hostname or ""
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False
