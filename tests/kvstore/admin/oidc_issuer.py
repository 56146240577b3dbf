"""An OpenID Connect issuer that listens and signs."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

import jwt
import uvicorn
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey, generate_private_key
from fastapi import FastAPI

from kvstore.testing.background import Background
from kvstore.testing.servers import free_port

AUDIENCE = "kvstore"


class Issuer(Background):
    """An OpenID Connect issuer on loopback, as far as one that checks its tokens meets it."""

    def __init__(self) -> None:
        self._port = free_port()
        self.url = f"http://127.0.0.1:{self._port}"
        self.keys = {"first": generate_private_key(65537, 2048)}
        self.asked = 0
        super().__init__("issuer")

    @asynccontextmanager
    async def _serve(self) -> AsyncIterator[None]:
        app = FastAPI()

        @app.get("/.well-known/openid-configuration")
        def discovery() -> dict[str, str]:
            return {"issuer": self.url, "jwks_uri": f"{self.url}/keys"}

        @app.get("/keys")
        def keys() -> dict[str, Any]:
            self.asked += 1
            to_jwk = jwt.algorithms.RSAAlgorithm.to_jwk
            public = {name: json.loads(to_jwk(key.public_key())) for name, key in self.keys.items()}
            return {"keys": [{**key, "kid": name, "use": "sig"} for name, key in public.items()]}

        server = uvicorn.Server(uvicorn.Config(app, port=self._port, log_level="error", lifespan="off"))
        running = asyncio.create_task(server.serve())
        while not server.started:
            await asyncio.sleep(0.01)
        try:
            yield
        finally:
            server.should_exit = True
            await running

    def open(self) -> AbstractAsyncContextManager[None]:
        return self._serve()

    def token(self, key: RSAPrivateKey | None = None, kid: str = "first", **claims: object) -> str:
        now = time.time()
        whole = {
            "iss": self.url, "aud": AUDIENCE, "sub": "42", "iat": now, "exp": now + 600, "preferred_username": "ada",
            "roles": ["operator", "something else"],
        }  # fmt: skip
        return jwt.encode(
            {name: value for name, value in (whole | claims).items() if value is not None},
            key or self.keys[kid],
            "RS256",
            {"kid": kid},
        )
