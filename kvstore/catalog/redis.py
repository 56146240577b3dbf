"""A catalog in Redis or Valkey: for a region of many nodes.

One server, a set watched by Sentinel, or a cluster (all of a catalog lies in one slot). The client reconnects by itself.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any, TypeVar, cast
from urllib.parse import unquote, urlsplit

from redis.asyncio import Redis, RedisCluster, Sentinel
from redis.asyncio.cluster import ClusterNode
from redis.asyncio.retry import Retry
from redis.backoff import ExponentialBackoff
from redis.exceptions import AuthenticationError, NoPermissionError, NoScriptError, RedisError

from kvstore.catalog import scripts
from kvstore.catalog.base import (
    BATCH,
    CHANGES_KEPT,
    Batch,
    Catalog,
    CatalogStatus,
    Changes,
    Claim,
    Cursor,
    Entry,
    check_name,
    read_changes,
)
from kvstore.catalog.documents import (
    BEGINNING,
    MOST_DOCUMENTS,
    PAGE,
    PAGE_BYTES,
    Document,
    Documents,
    Mark,
    Page,
    check_document,
)
from kvstore.errors import CatalogUnavailable, ConfigError
from kvstore.identity import BlockKey

T = TypeVar("T")

CONNECT_SECONDS = 1.0
ANSWER_SECONDS = 2.0
"""For one call from its start to its end, with what is repeated after a lost connection."""
CONNECTIONS = 4
"""Calls at a time, and so connections: a node's loops and a few questions. To open many at once takes longer than to wait."""
_READING = "-"
"""Stands for ``Cursor.page`` None on the wire."""

_SCHEMES = {"redis", "rediss", "redis+sentinel", "rediss+sentinel", "redis+cluster", "rediss+cluster"}


@dataclass(frozen=True, slots=True, kw_only=True)
class RedisSettings:
    """Where the servers are. Raises ConfigError.

    ``redis://host:6379/0``, ``redis+sentinel://host1:26379,host2:26379/service/0`` or ``redis+cluster://host1:6379,host2``;
    ``rediss`` in place of ``redis`` for TLS. A user may stand before the hosts, as ``redis://user@host``.
    """

    url: str
    password: str = field(default="", repr=False)
    ca_file: Path | None = None
    """PEM file of the authority that signed the servers' certificates, if the system does not know it."""

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        hosts = self.hosts
        if parts.scheme not in _SCHEMES or not hosts or parts.query or parts.fragment:
            raise self._refuse("not an address of Redis", "Write redis://host:6379/0 or rediss://host:6379/0.")
        if self.sentinel and not self._path[0]:
            raise self._refuse("names no service", "Write redis+sentinel://host:26379/service.")
        if not all(text.isdecimal() for text in self._path[self.sentinel :] if text):
            raise self._refuse("the database is not a number", "Write redis://host:6379/0.")
        if self.ca_file is not None and not self.ca_file.is_file():
            raise ConfigError("catalog.ca_file", str(self.ca_file), "cannot be read", "Name a readable PEM file.")

    @property
    def tls(self) -> bool:
        return urlsplit(self.url).scheme.startswith("rediss")

    @property
    def sentinel(self) -> bool:
        return urlsplit(self.url).scheme.endswith("+sentinel")

    @property
    def cluster(self) -> bool:
        return urlsplit(self.url).scheme.endswith("+cluster")

    @property
    def user(self) -> str:
        return unquote(urlsplit(self.url).netloc.rpartition("@")[0])

    @property
    def hosts(self) -> list[tuple[str, int]]:
        """Empty when they cannot be read."""
        default = 26379 if self.sentinel else 6379
        hosts = []
        for address in urlsplit(self.url).netloc.rpartition("@")[2].split(","):
            try:
                one = urlsplit(f"//{address}")
                hosts.append((one.hostname or "localhost", one.port or default))
            except ValueError:
                return []
        return hosts

    @property
    def service(self) -> str:
        """The name under which Sentinel knows the servers."""
        return self._path[0] if self.sentinel else ""

    @property
    def database(self) -> int:
        return int(self._path[-1] or 0) if len(self._path) > self.sentinel else 0

    @property
    def _path(self) -> list[str]:
        return urlsplit(self.url).path.strip("/").split("/")

    def _refuse(self, problem: str, remedy: str) -> ConfigError:
        return ConfigError("catalog.url", self.url, problem, remedy)


class RedisCatalog(Catalog):
    """Scripts and one multi-key command on a client; see ``kvstore.catalog.scripts`` for what is stored."""

    def __init__(self, client: Redis | RedisCluster, scope: str) -> None:
        """``scope`` says whose catalog it is: the URL of the bucket. Catalogs of several may share a server."""
        self._client = client
        self._turns = asyncio.Semaphore(CONNECTIONS)
        self._tag = "{kvstore:" + blake2b(scope.encode(), digest_size=8).hexdigest() + "}"
        self.names = [self._tag + name for name in ("meta", "blocks", "changes", "claims")]
        """Keys on the server."""
        self.documents = RedisDocuments(self)

    @classmethod
    async def open(cls, settings: RedisSettings, scope: str) -> RedisCatalog:
        """Connect when first used. Raises ConfigError when the server answers, and refuses the password."""
        catalog = cls(_connect(settings), scope)
        try:
            await catalog.status()
        except CatalogUnavailable as error:
            if isinstance(error.__cause__, AuthenticationError | NoPermissionError):
                await catalog.close()
                remedy = "Check catalog.password and the user in the URL."
                raise ConfigError("catalog.url", settings.url, str(error.__cause__), remedy) from None
        return catalog

    async def record(self, changes: Changes) -> None:
        flat: list[bytes] = []
        for key, entry in changes.items():
            flat += (key, b"" if entry is None else entry.pack())
        await self._call(scripts.RECORD, CHANGES_KEPT, *flat)

    async def follow(self, cursor: Cursor, limit: int = BATCH) -> Batch:
        page = _READING if cursor.page is None else cursor.page or "0"
        reply = await self._call(scripts.FOLLOW, cursor.epoch, cursor.since, page, limit)
        epoch, since, page_bytes, restarted, caught_up, complete, used_bytes, found = reply
        page = page_bytes.decode()
        return Batch(
            changes=read_changes(list(zip(found[::2], found[1::2], strict=True))),
            cursor=Cursor(epoch.decode(), since, None if page == _READING else page),
            restarted=bool(restarted),
            caught_up=bool(caught_up),
            complete=bool(complete),
            used_bytes=used_bytes,
        )

    async def lookup(self, keys: Sequence[BlockKey]) -> list[Entry | None]:
        if not keys:
            return []

        async def run() -> list[bytes | None]:
            return await cast("Awaitable[list[bytes | None]]", self._client.hmget(self.names[1], list(keys)))

        values = await self._answer(run)
        return [None if value is None else Entry.unpack(key, value) for key, value in zip(keys, values, strict=True)]

    async def claim(self, name: str, holder: str, seconds: float) -> Claim | None:
        reply = await self._call(scripts.CLAIM, check_name(name), check_name(holder), round(seconds * 1000))
        return None if reply is None else Claim(name, holder, reply[0], reply[1] / 1000)

    async def status(self) -> CatalogStatus:
        epoch, complete, blocks, used_bytes, changes, claims = await self._call(scripts.STATUS)
        living = [
            Claim(name.decode(), holder.decode(), token, expires / 1000) for name, holder, token, expires in claims
        ]
        return CatalogStatus(
            epoch=epoch.decode(),
            complete=bool(complete),
            blocks=blocks,
            used_bytes=used_bytes,
            changes=changes,
            claims=tuple(sorted(living, key=lambda claim: claim.name)),
        )

    async def reset(self) -> str:
        epoch: bytes = await self._call(scripts.RESET)
        return epoch.decode()

    async def complete(self, epoch: str) -> bool:
        return bool(await self._call(scripts.COMPLETE, epoch))

    async def close(self) -> None:
        await self._client.aclose()

    async def _call(self, script: scripts.Script, *arguments: str | bytes | int, folder: str = "") -> Any:
        """Run a script, on the documents of a folder too if one is named; the server may have to be given its source first."""
        names = self.names
        if folder:
            names = [*names, *(f"{self._tag}{kind}:{folder}" for kind in ("documents", "revisions", "expiries"))]
        everything = [*names, secrets.token_hex(8), *arguments]

        async def run() -> Any:
            try:
                return await self._client.evalsha(script.sha, len(names), *everything)
            except NoScriptError:
                return await self._client.eval(script.source, len(names), *everything)

        return await self._answer(run)

    async def _answer(self, work: Callable[[], Awaitable[T]]) -> T:
        task = asyncio.current_task()
        assert task is not None, "called in a task"
        cancellations = task.cancelling()
        try:
            async with asyncio.timeout(ANSWER_SECONDS), self._turns:
                return await work()
        except (RedisError, OSError) as error:  # TimeoutError is an OSError
            raise CatalogUnavailable(str(error) or "no answer in time") from error
        finally:
            if task.cancelling() > cancellations:  # asyncio.wait_for of Python 3.11, which the client uses, loses some
                raise asyncio.CancelledError


class RedisDocuments(Documents):
    """The documents of a catalog on a server."""

    def __init__(self, catalog: RedisCatalog) -> None:
        self._catalog = catalog

    async def put(self, name: str, body: bytes, seconds: float, expected: int | None = None) -> int | None:
        folder = check_document(name, body)
        wanted = "" if expected is None else expected
        lasts = round(seconds * 1000)
        revision: int | None = await self._catalog._call(
            scripts.PUT_DOCUMENT, name, body, lasts, wanted, MOST_DOCUMENTS, folder=folder
        )
        return revision

    async def read(self, folder: str, since: Mark = BEGINNING) -> Page:
        reply = await self._catalog._call(
            scripts.READ_DOCUMENTS, since.epoch, since.revision, PAGE, PAGE_BYTES, folder=folder
        )
        epoch, revision, restarted, caught_up, found = reply
        documents = (Document(name.decode(), body, number, expires / 1000) for name, body, number, expires in found)
        return Page(tuple(documents), Mark(epoch.decode(), revision), bool(restarted), bool(caught_up))


def _connect(settings: RedisSettings) -> Redis | RedisCluster:
    options: dict[str, Any] = {
        "username": settings.user or None,
        "password": settings.password or None,
        "socket_connect_timeout": CONNECT_SECONDS,
        "socket_timeout": ANSWER_SECONDS,
    }
    tls: dict[str, Any] = {}
    if settings.tls:
        tls = {"ssl": True, "ssl_ca_certs": str(settings.ca_file) if settings.ca_file else None}
    if settings.cluster:
        return RedisCluster(startup_nodes=[ClusterNode(*host) for host in settings.hosts], **options, **tls)
    options |= {"retry": Retry(ExponentialBackoff(cap=0.1, base=0.02), 1), "db": settings.database}
    if settings.sentinel:
        timeouts = {name: options[name] for name in ("socket_connect_timeout", "socket_timeout")}
        sentinels = Sentinel(  # type: ignore[no-untyped-call]
            settings.hosts, sentinel_kwargs={**timeouts, **tls}, **options, **tls
        )
        master: Redis = sentinels.master_for(settings.service)
        return master
    host, port = settings.hosts[0]
    return Redis(host=host, port=port, **options, **tls)
