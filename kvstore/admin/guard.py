"""What is refused before any route is asked.

A page in a browser on this machine can send requests to a loopback address. So a request must name a host that is ours (a
foreign name that resolves to 127.0.0.1 is not), and a write that comes from a page must come from one of ours.
"""

from __future__ import annotations

from collections.abc import Set as AbstractSet
from urllib.parse import urlsplit

from fastapi import HTTPException
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kvstore.admin.problems import Problem

MAX_BODY_BYTES = 16 << 20
"""Token ids of some dozen long prompts in JSON."""

LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})
WRITES = frozenset({"POST", "PUT", "PATCH", "DELETE"})


class Guard:
    """Middleware. ``hosts`` are the names that this server goes by; None: any."""

    def __init__(self, app: ASGIApp, hosts: AbstractSet[str] | None) -> None:
        self._app = app
        self._hosts = hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        problem = self._judge(scope["method"], Headers(scope=scope))
        if problem is not None:
            await problem.response()(scope, receive, send)
            return
        await self._app(scope, _bounded(receive), send)

    def _judge(self, method: str, headers: Headers) -> Problem | None:
        host = headers.get("host", "")
        if self._hosts is not None and _hostname(f"//{host}") not in self._hosts:
            return Problem(
                421, "foreign-host", "this server does not go by that name", "Ask for it by the address it listens on."
            )
        origin = headers.get("origin")
        if method in WRITES and origin is not None and urlsplit(origin).netloc != host:
            return Problem(403, "foreign-origin", "a page of another site may not change anything here")
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > MAX_BODY_BYTES:
            return Problem(413, "body-too-large", f"a body may have {MAX_BODY_BYTES} bytes", "Send it in parts.")
        return None


def _hostname(url: str) -> str | None:
    try:
        return urlsplit(url).hostname
    except ValueError:
        return None


def _bounded(receive: Receive) -> Receive:
    """For bodies that do not say their length."""
    read = 0

    async def counted() -> Message:
        nonlocal read
        message = await receive()
        read += len(message.get("body", b""))
        if read > MAX_BODY_BYTES:
            raise HTTPException(413, f"a body may have {MAX_BODY_BYTES} bytes")
        return message

    return counted
