"""Bearer tokens: made once, shown once, kept as digests.

A token is ``kvs_<id>_<secret>`` with 256 random bits in its secret, so one SHA-256 is enough to keep it: there is nothing to
guess that a slow hash would protect. The file is read again whenever it changes; revoking works at once.
"""

from __future__ import annotations

import fcntl
import hashlib
import hmac
import re
import secrets
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from fastapi import Request
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from kvstore.admin.auth import Principal, Role
from kvstore.admin.problems import Problem
from kvstore.errors import ConfigError
from kvstore.files import check_private, replace_private
from kvstore.tenants.book import NAME

MAX_FILE_BYTES = 1 << 20
FAILURES, FAILURE_SECONDS = 10, 60.0
"""So many wrong tokens from one address in that time; more are refused unread, so that nobody can try many."""
_REMEMBERED_ADDRESSES = 4096
_TOKEN = re.compile(r"kvs_([0-9a-f]{12})_([A-Za-z0-9_-]{43})")


class Token(BaseModel):
    """What is kept of a token."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str = Field(pattern=r"^[0-9a-f]{12}$")
    name: str = Field(min_length=1, max_length=64)
    role: Role
    tenant: str = Field("", pattern=rf"^$|{NAME}")
    """The one it is limited to; empty: none."""
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    created: float
    expires: float | None = None
    """Seconds since the epoch."""


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid")

    tokens: list[Token] = Field(default_factory=list, max_length=10_000)


class TokenBook:
    """The tokens in a file. Any process may change it at any time; changes are made one after another."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._read_at: tuple[int, int] | None = None
        self._tokens: dict[str, Token] = {}

    def create(self, name: str, role: Role, lifetime: float | None = None, tenant: str = "") -> tuple[Token, str]:
        """A new token and its text, which is nowhere else. ``lifetime`` in seconds. Raises ConfigError."""
        identity, secret = secrets.token_hex(6), secrets.token_urlsafe(32)
        now = time.time()
        token = Token(
            id=identity,
            name=name,
            role=role,
            tenant=tenant,
            sha256=_digest(secret),
            created=now,
            expires=now + lifetime if lifetime else None,
        )
        with self._changing() as tokens:
            tokens[identity] = token
        return token, f"kvs_{identity}_{secret}"

    def revoke(self, identity: str) -> bool:
        """Whether there was such a token. Raises ConfigError."""
        with self._changing() as tokens:
            return tokens.pop(identity, None) is not None

    def tokens(self) -> list[Token]:
        """All of them, oldest first. Raises ConfigError when the file cannot be read."""
        self._refresh()
        return sorted(self._tokens.values(), key=lambda token: token.created)

    def check(self, text: str) -> Token | None:
        """The valid token whose text this is. Takes as long whether the secret is wrong early or late."""
        self._refresh()
        match = _TOKEN.fullmatch(text)
        token = self._tokens.get(match[1]) if match else None
        if match is None or token is None or not hmac.compare_digest(token.sha256, _digest(match[2])):
            return None
        return None if token.expires is not None and token.expires < time.time() else token

    @contextmanager
    def _changing(self) -> Iterator[dict[str, Token]]:
        self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with open(self._path.with_suffix(".lock"), "a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            self._refresh()
            yield self._tokens
            replace_private(self._path, _File(tokens=list(self._tokens.values())).model_dump_json(indent=1).encode())

    def _refresh(self) -> None:
        try:
            found = self._path.stat()
            if self._read_at == (found.st_mtime_ns, found.st_ino):
                return
            check_private(self._path, found, "api.tokens", MAX_FILE_BYTES)
            self._tokens = {token.id: token for token in _File.model_validate_json(self._path.read_bytes()).tokens}
            self._read_at = found.st_mtime_ns, found.st_ino
        except FileNotFoundError:
            self._tokens, self._read_at = {}, None
        except (OSError, ValidationError) as error:
            remedy = "Make tokens with kvstore token create."
            raise ConfigError(
                "api.tokens", str(self._path), f"not a token file: {type(error).__name__}", remedy
            ) from error


Check = Callable[[str], Awaitable[Principal | None]]
"""Whose token a text is; None: nobody's. Raises Problem (503) when that cannot be found out now."""


def in_book(book: TokenBook) -> Check:
    """The tokens of a book, as one of those that ``BearerTokens`` asks."""

    async def check(text: str) -> Principal | None:
        token = book.check(text)
        return None if token is None else Principal(token.name, token.role, token.tenant)

    return check


class BearerTokens:
    """``Site.authenticate`` by token. Called in the API's event loop."""

    def __init__(self, *checks: Check) -> None:
        """They are asked in turn."""
        self._checks = checks
        self._failures: dict[str, list[float]] = {}

    async def __call__(self, request: Request) -> Principal:
        address = request.client.host if request.client else ""
        self._hold_back(address)
        scheme, _, text = request.headers.get("authorization", "").partition(" ")
        for check in self._checks if scheme.lower() == "bearer" else ():
            if (principal := await check(text.strip())) is not None:
                return principal
        if text:
            self._failures.setdefault(address, []).append(time.monotonic())
        raise Problem(401, "unauthenticated", "a valid bearer token is needed", "Make one with kvstore token create.")

    def _hold_back(self, address: str) -> None:
        """Raises Problem (429) for an address that has failed too often lately."""
        since = time.monotonic() - FAILURE_SECONDS
        recent = [at for at in self._failures.pop(address, ()) if at > since]
        if recent:
            self._failures[address] = recent
        while len(self._failures) > _REMEMBERED_ADDRESSES:
            del self._failures[next(iter(self._failures))]
        if len(recent) >= FAILURES:
            raise Problem(
                429,
                "too-many-failures",
                "too many wrong tokens from this address",
                f"Wait {FAILURE_SECONDS:g} seconds.",
            )


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()
