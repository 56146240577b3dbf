"""The tenants of a node: a file that holds their secrets, the digests of their tokens, their users and their quotas.

Any process of the node's user may change it at any time; the node follows within a second. The file is the only place where
secrets are: nothing here logs or shows one.
"""

from __future__ import annotations

import fcntl
import hashlib
import hmac
import os
import re
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from kvstore.errors import ConfigError
from kvstore.files import check_private, replace_private

MAX_FILE_BYTES = 4 << 20
MOST_TENANTS = 1000
MOST_UIDS = 256
NAME = r"^[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}$"
"""Also of a folder."""
SMALLEST_SECRET, LARGEST_SECRET = 16, 64
"""Bytes; BLAKE2b takes keys of up to 64."""

_TOKEN = re.compile(r"kvt_([A-Za-z0-9._-]{1,64})_([A-Za-z0-9_-]{43})")
_OPERATOR = re.compile(r"kvo_([A-Za-z0-9_-]{43})")

Uid = Annotated[int, Field(ge=0, lt=(1 << 32) - 1)]


class Quota(BaseModel):
    """Bytes of a tenant's blocks at most, with their headers."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    host: int | None = Field(None, ge=1 << 20, le=1 << 50, description="Size of its arena; null: tenants.host_bytes.")
    disk: int | None = Field(None, ge=0, le=1 << 60, description="On the node's disk; null: what fairness leaves it.")
    object: int | None = Field(
        None, ge=0, le=1 << 60, description="In the bucket, before this node adds to it; null: any."
    )


class Tenant(BaseModel):
    """What the book has of a tenant."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    name: str = Field(pattern=NAME)
    secret: str = Field("", repr=False)
    """Hexadecimal; empty for one that shares another's blocks."""
    token_sha256: str = Field(pattern=r"^[0-9a-f]{64}$", repr=False)
    uids: tuple[Uid, ...] = Field((), max_length=MOST_UIDS)
    shares: str = ""
    """The tenant whose blocks it shares, and with them secret, quota and arena; empty: it is on its own."""
    quota: Quota = Quota()
    created: float
    rotated: float
    """When the secret was made."""

    @model_validator(mode="after")
    def _check(self) -> Tenant:
        if not self.shares and not SMALLEST_SECRET <= len(self.secret_bytes()) <= LARGEST_SECRET:
            raise ValueError("secret has a wrong length")
        return self

    def secret_bytes(self) -> bytes:
        """Behind the block keys."""
        return bytes.fromhex(self.secret)


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)

    operator: str = Field(pattern=r"^[A-Za-z0-9_-]{43}$", repr=False)
    tenants: list[Tenant] = Field(default_factory=list, max_length=MOST_TENANTS)

    @model_validator(mode="after")
    def _check(self) -> _File:
        by_name = {tenant.name: tenant for tenant in self.tenants}
        if len(by_name) < len(self.tenants):
            raise ValueError("two tenants have one name")
        uids = [uid for tenant in self.tenants for uid in tenant.uids]
        if len(set(uids)) < len(uids):
            raise ValueError("two tenants have one uid")
        for tenant in self.tenants:
            if tenant.shares and (tenant.shares not in by_name or by_name[tenant.shares].shares):
                raise ValueError(f"{tenant.name} shares the blocks of what is no tenant on its own")
        return self


class Operator(Enum):
    """Whoever can read the book."""

    OPERATOR = "operator"


class TenantBook:
    """The tenants in a file. Changes are made one after another, by any process."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._read_at: tuple[int, int] | None = None
        self._file: _File | None = None
        self._by_name: dict[str, Tenant] = {}
        self._by_uid: dict[int, Tenant] = {}

    # --- reading: all of it raises ConfigError when the file cannot be used

    def tenants(self) -> list[Tenant]:
        """By name."""
        self._refresh()
        return [self._by_name[name] for name in sorted(self._by_name)]

    def get(self, name: str) -> Tenant | None:
        self._refresh()
        return self._by_name.get(name)

    def owner(self, tenant: Tenant) -> Tenant:
        """Whose blocks its clients use: its own, or those of the tenant that it shares with."""
        return self._by_name[tenant.shares] if tenant.shares else tenant

    def operator_token(self) -> str:
        """What an operator shows the node."""
        self._refresh()
        return "" if self._file is None else f"kvo_{self._file.operator}"

    def whose(self, uid: int, token: str) -> Tenant | Operator | None:
        """Who a client is: by its token, else by the user that it runs as. None: nobody that the book knows.

        A wrong token is nobody's, whatever the user. Takes as long whether a secret is wrong early or late.
        """
        self._refresh()
        if not token:
            return self._by_uid.get(uid)
        if self._file is not None and (match := _OPERATOR.fullmatch(token)):
            return Operator.OPERATOR if hmac.compare_digest(match[1], self._file.operator) else None
        match = _TOKEN.fullmatch(token)
        tenant = self._by_name.get(match[1]) if match else None
        if match is None or tenant is None or not hmac.compare_digest(tenant.token_sha256, _digest(match[2])):
            return None
        return tenant

    # --- changes: ConfigError for what cannot be done

    def ensure(self) -> None:
        """Make an empty book where there is none."""
        if not self.path.exists():
            with self._changing():
                pass

    def create(
        self, name: str, uids: tuple[int, ...] = (), quota: Quota | None = None, shares: str = "", secret: bytes = b""
    ) -> tuple[Tenant, str]:
        """A new tenant and its token, which is nowhere else. ``secret`` is that of the tenant's other nodes, if it has some."""
        if secret and not SMALLEST_SECRET <= len(secret) <= LARGEST_SECRET:
            problem = f"has {len(secret)} bytes, not {SMALLEST_SECRET} to {LARGEST_SECRET}"
            raise ConfigError("secret", "(not shown)", problem, "Make one with: openssl rand -hex 32")
        text, now = secrets.token_urlsafe(32), time.time()
        own = "" if shares else (secret or secrets.token_bytes(32)).hex()
        fields = {
            "name": name, "secret": own, "token_sha256": _digest(text), "uids": uids, "shares": shares,
            "quota": quota or Quota(), "created": now, "rotated": now,
        }  # fmt: skip
        with self._changing() as tenants:
            if name in tenants:
                raise ConfigError("name", name, "there is such a tenant already", "Choose another name.")
            if shares and (shares not in tenants or tenants[shares].shares):
                problem = "not a tenant with blocks of its own"
                raise ConfigError("shares", shares, problem, "Name one that shares nobody's.")
            self._check_uids(tenants, name, uids)
            tenants[name] = _tenant(fields)
        return tenants[name], f"kvt_{name}_{text}"

    def change(self, name: str, uids: tuple[int, ...] | None = None, quota: Quota | None = None) -> Tenant:
        """Other users or quotas; None: as they are."""
        with self._changing() as tenants:
            before = _known(tenants, name)
            if uids is not None:
                self._check_uids(tenants, name, uids)
            if quota is not None and before.shares:
                problem = f"it has none of its own: it shares the blocks of {before.shares}"
                raise ConfigError("quota", name, problem, f"Change the quota of {before.shares}.")
            update: dict[str, Any] = {} if uids is None else {"uids": uids}
            tenants[name] = _tenant(dict(before) | update | ({} if quota is None else {"quota": quota}))
        return tenants[name]

    def rotate_secret(self, name: str, secret: bytes = b"") -> Tenant:
        """Another secret: what the tenant stored has keys from now on that nobody asks for."""
        with self._changing() as tenants:
            before = _known(tenants, name)
            if before.shares:
                problem = f"it has no secret: it shares the blocks of {before.shares}"
                raise ConfigError("secret", name, problem, f"Rotate that of {before.shares}.")
            new = (secret or secrets.token_bytes(32)).hex()
            tenants[name] = _tenant(dict(before) | {"secret": new, "rotated": time.time()})
        return tenants[name]

    def rotate_token(self, name: str) -> str:
        """Another token, shown this once; the one before ends."""
        text = secrets.token_urlsafe(32)
        with self._changing() as tenants:
            tenants[name] = _tenant(dict(_known(tenants, name)) | {"token_sha256": _digest(text)})
        return f"kvt_{name}_{text}"

    def remove(self, name: str) -> None:
        """End a tenant; its blocks stay until they are purged or pushed out."""
        with self._changing() as tenants:
            _known(tenants, name)
            if sharing := sorted(tenant.name for tenant in tenants.values() if tenant.shares == name):
                raise ConfigError("name", name, f"{', '.join(sharing)} shares its blocks", "Remove those first.")
            del tenants[name]

    def _check_uids(self, tenants: dict[str, Tenant], name: str, uids: tuple[int, ...]) -> None:
        for other in tenants.values():
            if other.name != name and (both := set(uids) & set(other.uids)):
                raise ConfigError("uids", min(both), f"that user is of {other.name}", "A user has one tenant.")

    @contextmanager
    def _changing(self) -> Iterator[dict[str, Tenant]]:
        try:
            with self._locked():
                self._refresh()
                tenants = dict(self._by_name)
                yield tenants
                self._write(tenants)
                self._refresh()
        except OSError as error:
            problem = f"cannot be written: {error.strerror}"
            remedy = (
                "Change it where it is made, as by the Secret that it comes from, or give it a folder of the node's."
            )
            raise ConfigError("tenants.book", str(self.path), problem, remedy) from error

    @contextmanager
    def _locked(self) -> Iterator[None]:
        self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with open(os.open(self.path.with_suffix(".lock"), os.O_WRONLY | os.O_CREAT, 0o600), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _write(self, tenants: dict[str, Tenant]) -> None:
        operator = self._file.operator if self._file is not None else secrets.token_urlsafe(32)
        try:
            file = _File(operator=operator, tenants=list(tenants.values()))
        except ValidationError as error:
            raise ConfigError("tenants.book", str(self.path), _first(error), "Change it otherwise.") from None
        replace_private(self.path, file.model_dump_json(indent=1).encode())

    def _refresh(self) -> None:
        try:
            found = self.path.stat()
            if self._read_at == (found.st_mtime_ns, found.st_ino):
                return
            check_private(self.path, found, "tenants.book", MAX_FILE_BYTES)
            file = _File.model_validate_json(self.path.read_bytes())
        except FileNotFoundError:
            self._read_at, self._file, self._by_name, self._by_uid = None, None, {}, {}
            return
        except ValidationError as error:
            problem, remedy = f"not a tenant book: {_first(error)}", "Make tenants with kvstore tenants create."
            raise ConfigError("tenants.book", str(self.path), problem, remedy) from None
        except OSError as error:
            raise ConfigError("tenants.book", str(self.path), error.strerror or "cannot be read", "Mend it.") from error
        self._file, self._read_at = file, (found.st_mtime_ns, found.st_ino)
        self._by_name = {tenant.name: tenant for tenant in file.tenants}
        self._by_uid = {uid: tenant for tenant in file.tenants for uid in tenant.uids}


def _tenant(fields: dict[str, Any]) -> Tenant:
    """Raises ConfigError, without values: one of them is the secret."""
    try:
        return Tenant.model_validate(fields)
    except ValidationError as error:
        raise ConfigError("tenant", str(fields.get("name", "")), _first(error), "See docs/tenants.md.") from None


def _known(tenants: dict[str, Tenant], name: str) -> Tenant:
    if name not in tenants:
        raise ConfigError("name", name, "there is no such tenant", "See kvstore tenants list.")
    return tenants[name]


def _first(error: ValidationError) -> str:
    one = error.errors(include_url=False, include_input=False, include_context=False)[0]
    return f"{'.'.join(map(str, one['loc']))}: {one['msg']}".lstrip(": ")


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()
