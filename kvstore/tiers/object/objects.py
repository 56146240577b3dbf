"""Objects by name, in a bucket or in a folder: the verbs that the tier needs, over obstore.

obstore's blocking calls run in threads of our own rather than on its event loop: they cost less CPU per byte, and a
call that was cancelled can be waited for, so that a buffer is never given back while it is still being read or filled.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError, PermissionDeniedError, UnauthenticatedError
from obstore.store import LocalStore, S3Store

from kvstore import tracing
from kvstore.errors import BlockTooLarge, ConfigError, TierRefused, TierUnavailable
from kvstore.tiers.object.settings import ObjectSettings
from kvstore.tiers.tasks import run

if TYPE_CHECKING:
    from obstore import ObjectMeta
    from obstore.store import ClientConfig, RetryConfig, S3Config, S3Credential, S3CredentialProvider

T = TypeVar("T")

THREADS = 32
"""Requests at a time. One connection to S3 brings some 80 MB/s, so 32 fill a 20 Gbit/s link."""
PAGE = 500
"""Objects handed over at a time by a listing: a few ms of work in the event loop."""


@dataclass(frozen=True, slots=True)
class Found:
    """An object, as a listing or a reply describes it."""

    name: str
    size: int
    etag: str | None
    modified: float
    """Seconds since the epoch."""


class Objects:
    """Asynchronous verbs. All raise TierUnavailable when the server or the disk cannot answer.

    A cancelled call returns only when its thread is done with the buffer it was given.
    """

    def __init__(self, store: S3Store | LocalStore) -> None:
        self.store = store
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="kvstore-object")

    @classmethod
    def connect(cls, settings: ObjectSettings) -> Objects:
        """Objects under the prefix of ``settings``; no request is made yet. May import boto3: call it in a thread."""
        folder = settings.folder
        if folder is None:
            return cls(_s3_store(settings))
        try:
            return cls(LocalStore(folder, mkdir=True))
        except (BaseError, OSError) as error:
            raise ConfigError("object.url", settings.url, _first_line(error), "Name a writable folder.") from error

    async def put(self, name: str, body: memoryview | bytes, *, create: bool) -> bool:
        """Store an object in one request. With ``create``, False when it exists (if the server can tell)."""
        with tracing.span("object PUT", name=name, bytes=len(body)):
            return await self.run(_put, self.store, name, body, create)

    async def get(self, name: str, into: memoryview, check: Callable[[Found, memoryview], T]) -> T | None:
        """Fetch a whole object into the start of ``into`` and return what ``check`` says of it, or None if it is missing.

        ``check`` is given the object and its bytes, and runs in the same thread. Raises BlockTooLarge when the object does
        not fit; nothing was written then.
        """
        with tracing.span("object GET", name=name):
            return await self.run(_get, self.store, name, into, check)

    async def start_of(self, name: str, nbytes: int) -> bytes | None:
        """The first ``nbytes`` of an object, or None if it is missing."""
        return await self.run(_start_of, self.store, name, nbytes)

    async def head(self, name: str) -> Found | None:
        """Size and etag of an object, or None if it is missing."""
        return await self.run(_head, self.store, name)

    async def move(self, source: str, target: str, etag: str | None) -> None:
        """Copy within the server, then delete the source, unless it is no longer the object with ``etag``."""
        await self.run(_move, self.store, source, target, etag)

    async def delete(self, names: Sequence[str]) -> None:
        """Delete objects; missing ones are no error."""
        await self.run(_delete, self.store, names)

    async def walk(self, prefix: str) -> AsyncIterator[list[Found]]:
        """Objects below the folder ``prefix``, a page at a time."""
        pages = obstore.list(self.store, prefix, chunk_size=PAGE)
        while page := await self.run(_next_page, pages):
            yield page

    async def run(self, function: Callable[..., T], *arguments: Any) -> T:
        """Run a blocking call in one of the threads, with obstore's errors translated."""
        return await run(self._threads, _translated, function, *arguments)

    async def close(self) -> None:
        """Wait for the requests under way."""
        await asyncio.to_thread(self._threads.shutdown)


def _s3_store(settings: ObjectSettings) -> S3Store:
    config: S3Config = {
        "bucket": settings.bucket,
        "virtual_hosted_style_request": not settings.path_style,
        "disable_bulk_delete": True,  # not every server has DeleteObjects; obstore sends 10 deletes at a time
        "unsigned_payload": True,  # the envelope has a checksum of its own; TLS protects the rest
    }
    if settings.region:
        config["region"] = settings.region
    if settings.endpoint:
        scheme, host = settings.endpoint.rstrip("/").split("://")
        config["endpoint"] = f"{scheme}://{host}" if settings.path_style else f"{scheme}://{settings.bucket}.{host}"
    client: ClientConfig = {
        "allow_http": settings.endpoint.startswith("http://"),
        "connect_timeout": timedelta(seconds=settings.connect_timeout),
        "timeout": timedelta(seconds=settings.request_timeout),
    }
    if settings.read_timeout is not None:
        client["read_timeout"] = timedelta(seconds=settings.read_timeout)
    if settings.ca_file is not None:
        client["root_certificate"] = read_ca(settings)
    retry: RetryConfig = {
        "max_retries": settings.retries,
        "retry_timeout": timedelta(seconds=settings.request_timeout),
        "backoff": {"init_backoff": timedelta(seconds=0.1), "max_backoff": timedelta(seconds=2), "base": 2},
    }
    provider = _own_credentials(settings) if settings.access_key_id else _ambient_credentials()
    try:
        return S3Store(
            prefix=settings.prefix or None,
            config=config,
            client_options=client,
            retry_config=retry,
            credential_provider=provider,
        )
    except BaseError as error:
        remedy = "Check the endpoint and the ca_file."
        raise ConfigError("object.url", settings.url, _first_line(error), remedy) from error


def read_ca(settings: ObjectSettings) -> bytes:
    """The PEM text of ``ca_file``. Raises ConfigError."""
    assert settings.ca_file is not None
    try:
        pem = settings.ca_file.read_bytes()
    except OSError as error:
        remedy = "Name a readable PEM file."
        raise ConfigError("object.ca_file", str(settings.ca_file), error.strerror or "unreadable", remedy) from error
    if b"-----BEGIN CERTIFICATE-----" not in pem:
        raise ConfigError("object.ca_file", str(settings.ca_file), "no certificate in it", "Name a PEM file.")
    return pem


def _own_credentials(settings: ObjectSettings) -> S3CredentialProvider:
    """Exactly the settings' credentials: given as options, obstore would join them with a token of the environment."""
    credential: S3Credential = {
        "access_key_id": settings.access_key_id,
        "secret_access_key": settings.secret_access_key,
        "token": settings.session_token or None,
        "expires_at": None,
    }
    return lambda: credential


def _ambient_credentials() -> S3CredentialProvider:
    from obstore.auth.boto3 import Boto3CredentialProvider

    try:
        return Boto3CredentialProvider()
    except ValueError as error:
        remedy = "Set access_key_id and secret_access_key, or configure the AWS environment."
        raise ConfigError("object.access_key_id", "", "the AWS environment has no credentials", remedy) from error


def _put(store: S3Store | LocalStore, name: str, body: memoryview | bytes, create: bool) -> bool:
    try:
        obstore.put(store, name, body, mode="create" if create else "overwrite", use_multipart=False)
    except AlreadyExistsError:
        return False
    return True


def _get(store: S3Store | LocalStore, name: str, into: memoryview, check: Callable[[Found, memoryview], T]) -> T | None:
    try:
        reply = obstore.get(store, name)
    except FileNotFoundError:
        return None
    found = _found(reply.meta)
    if found.size > len(into):
        raise BlockTooLarge(f"object {name} has {found.size} bytes, the buffer {len(into)}")
    position = 0
    for chunk in reply.stream(min_chunk_size=1):  # as they come from the socket: copied while still in the CPU's cache
        end = position + len(chunk)
        if end > found.size:
            break
        into[position:end] = chunk
        position = end
    return check(found, into[:position])


def _start_of(store: S3Store | LocalStore, name: str, nbytes: int) -> bytes | None:
    try:
        return bytes(obstore.get_range(store, name, start=0, length=nbytes))
    except FileNotFoundError:
        return None


def _head(store: S3Store | LocalStore, name: str) -> Found | None:
    try:
        return _found(obstore.head(store, name))
    except FileNotFoundError:
        return None


def _move(store: S3Store | LocalStore, source: str, target: str, etag: str | None) -> None:
    try:
        obstore.copy(store, source, target)
        if obstore.head(store, source)["e_tag"] == etag:
            obstore.delete(store, source)
    except FileNotFoundError:
        pass


def _delete(store: S3Store | LocalStore, names: Sequence[str]) -> None:
    try:
        obstore.delete(store, names)
    except FileNotFoundError:  # folders only; which of the others are gone is not said
        for name in names:
            try:
                obstore.delete(store, name)
            except FileNotFoundError:
                pass


def _next_page(pages: Iterator[Sequence[ObjectMeta]]) -> list[Found] | None:
    page = next(pages, None)
    return None if page is None else [_found(meta) for meta in page]


def _found(meta: ObjectMeta) -> Found:
    return Found(meta["path"], meta["size"], meta["e_tag"], meta["last_modified"].timestamp())


def _translated(function: Callable[..., T], *arguments: Any) -> T:
    with _translation():
        return function(*arguments)


@contextmanager
def _translation() -> Iterator[None]:
    try:
        yield
    except (PermissionDeniedError, UnauthenticatedError) as error:
        raise TierRefused(_first_line(error)) from error
    except (BaseError, OSError) as error:
        raise TierUnavailable(_first_line(error)) from error


def _first_line(error: Exception) -> str:
    """What the server calls it, and obstore's message without the long dump of its internals."""
    text = str(error).partition("\n")[0] or type(error).__name__
    code = re.search(r"<Code>(\w+)</Code>", text)
    return f"{code[1]}: {text}"[:300] if code else text[:300]
