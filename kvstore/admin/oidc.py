"""Tokens of an OpenID Connect issuer: JWTs that it has signed, for this API, with a role among their claims, and where the
configuration names a claim for it, a tenant.

Keys come from the issuer's JWKS, found by its discovery document. They are kept for minutes, and asked for again when a token
names one that is not known, though seldom: nobody can make this API ask the issuer at will.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

import httpx
import jwt
import structlog
from jwt import PyJWK, PyJWKClient
from jwt.exceptions import PyJWKClientError, PyJWTError

from kvstore.admin.auth import Principal, Role
from kvstore.admin.problems import Problem
from kvstore.config.schema import ApiSection
from kvstore.tenants.book import NAME

log = structlog.get_logger(__name__)

ALGORITHMS = ["RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA"]
"""Signatures that only the issuer can make: no shared secrets, and never none."""
LEEWAY_SECONDS = 30.0
KEYS_SECONDS = 300.0
REFRESH_SECONDS = 30.0
"""Between two times that an unknown key makes us ask the issuer."""
RETRY_SECONDS = 2.0
"""After which an issuer that gave no keys is asked again."""
TIMEOUT_SECONDS = 5.0
MAX_TOKEN_BYTES = 16 << 10
MAX_NAME = 128
ALL_TENANTS = "*"
"""What the tenant's claim says of those who look after all of them. No tenant can have this name."""


class OidcTokens:
    """Who a token of the issuer is from. Called in the API's event loop."""

    def __init__(self, api: ApiSection) -> None:
        """Asks nobody yet: an issuer that is away must not keep the API from starting."""
        self._issuer = api.oidc_issuer
        self._audience = api.oidc_audience
        self._claim = api.oidc_role_claim
        self._tenant_claim = api.oidc_tenant_claim
        self._roles = role_names(api.oidc_roles)
        self._keys: list[PyJWK] = []
        self._turn = asyncio.Lock()
        self._asked_at = self._surprised_at = float("-inf")
        self._problem = ""
        """Why the issuer gave no keys when it was asked last; those of before are used on."""

    async def __call__(self, text: str) -> Principal | None:
        """None when the token is not valid here, has no role, or lacks the tenant that it must name.

        Raises Problem (503) when the issuer gives no keys.
        """
        if len(text) > MAX_TOKEN_BYTES or text.count(".") != 2:
            return None
        try:
            key = await self._key(str(jwt.get_unverified_header(text).get("kid", "")))
            if key is None:
                return None
            claims = jwt.decode(
                text,
                key,
                algorithms=ALGORITHMS,
                audience=self._audience,
                issuer=self._issuer,
                leeway=LEEWAY_SECONDS,
                options={"require": ["exp", "iat", "iss", "aud", "sub"]},
            )
        except PyJWTError:
            return None
        role = role_of(claims, self._claim, self._roles)
        tenant = tenant_of(claims, self._tenant_claim) if self._tenant_claim else ""
        return None if role is None or tenant is None else Principal(_name(claims), role, tenant)

    async def _key(self, identity: str) -> PyJWK | None:
        async with self._turn:
            found, now = _named(self._keys, identity), time.monotonic()
            surprised = found is None and not self._problem and now - self._surprised_at > REFRESH_SECONDS
            retry = found is None and self._problem and now - self._asked_at > RETRY_SECONDS
            if surprised or retry or now - self._asked_at > KEYS_SECONDS:
                if self._keys and surprised:
                    self._surprised_at = now
                await self._ask()
                found = _named(self._keys, identity)
            if found is None and self._problem:
                raise Problem(503, "issuer-unavailable", f"{self._issuer} does not give its keys", "Try again.")
            return found

    async def _ask(self) -> None:
        self._asked_at, self._problem = time.monotonic(), ""
        try:
            self._keys = await asyncio.to_thread(_fetch, self._issuer)
        except (PyJWKClientError, httpx.HTTPError) as error:
            self._problem = str(error) or type(error).__name__
            log.warning("the token issuer gives no keys", issuer=self._issuer, error=self._problem)


def role_names(pairs: Sequence[str]) -> Mapping[str, Role]:
    """What values of the claim mean, from ``value=role`` pairs; without any, roles go by their own names.

    Raises ValueError.
    """
    if not pairs:
        return {role.value: role for role in Role}
    split = [pair.rpartition("=") for pair in pairs]
    return {value: Role(role) for value, _, role in split}


def role_of(claims: Mapping[str, Any], path: str, roles: Mapping[str, Role]) -> Role | None:
    """The greatest that the claim gives; ``path`` has dots where claims are nested. None: it gives none."""
    given = {roles[one] for one in _said(claims, path) if isinstance(one, str) and one in roles}
    return max(given, key=list(Role).index, default=None)


def tenant_of(claims: Mapping[str, Any], path: str) -> str | None:
    """The one that the claim limits its bearer to; empty where it says ``ALL_TENANTS``.

    None when it names none, several, or what cannot be one: a claim that is left out must not open every tenant.
    """
    said = _said(claims, path)
    name = said[0] if len(said) == 1 else None
    if name == ALL_TENANTS:
        return ""
    return name if isinstance(name, str) and re.fullmatch(NAME, name) else None


def _said(claims: Mapping[str, Any], path: str) -> list[Any]:
    """The values of a claim."""
    value: Any = claims
    for part in [path] if path in claims else path.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value if isinstance(value, list) else [value]


def _name(claims: Mapping[str, Any]) -> str:
    """For the audit log: what people call them, if the issuer says, and the subject, which is theirs for ever."""
    known = claims.get("preferred_username") or claims.get("email")
    return (f"{known} ({claims['sub']})" if isinstance(known, str) else str(claims["sub"]))[:MAX_NAME]


def _fetch(issuer: str) -> list[PyJWK]:
    """The issuer's keys. Raises PyJWKClientError, httpx.HTTPError."""
    answer = httpx.get(f"{issuer.rstrip('/')}/.well-known/openid-configuration", timeout=TIMEOUT_SECONDS)
    answer.raise_for_status()
    try:
        uri = str(answer.json()["jwks_uri"])
    except (ValueError, KeyError, TypeError):
        raise httpx.DecodingError("its discovery document names no jwks_uri") from None
    if urlsplit(uri).scheme != urlsplit(issuer).scheme:  # a file, or keys that anybody on the way could change
        raise httpx.DecodingError("its jwks_uri is not of the issuer's scheme")
    return PyJWKClient(uri, timeout=TIMEOUT_SECONDS).get_signing_keys()


def _named(keys: Sequence[PyJWK], identity: str) -> PyJWK | None:
    """The key of that id; a token may leave the id out where there is one key."""
    if not identity:
        return keys[0] if len(keys) == 1 else None
    return next((key for key in keys if key.key_id == identity), None)
