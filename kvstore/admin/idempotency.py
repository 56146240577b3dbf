"""Writes that carry an ``Idempotency-Key`` are done once: sent again, they get the first answer again.

As in the IETF draft on the header: another request under the same key is refused (422), and so is the same one while the
first is under way (409). Answers are kept in memory for a day, the latest ``MOST`` of them; a server error is not kept.
"""

from __future__ import annotations

import hashlib
import time
from collections import OrderedDict
from dataclasses import dataclass, field

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kvstore.admin.guard import WRITES
from kvstore.admin.problems import Problem

MOST = 1024
KEEP_SECONDS = 24 * 3600.0
MAX_ANSWER_BYTES = 64 << 10
"""An answer beyond it is not kept, and its write is done anew. Together they stay under 64 MiB."""


@dataclass(slots=True)
class _Answer:
    fingerprint: bytes
    at: float
    status: int = 0
    """0 while the write is under way."""
    headers: list[tuple[bytes, bytes]] = field(default_factory=list)
    body: bytearray = field(default_factory=bytearray)


class Idempotency:
    """Middleware."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._answers: OrderedDict[bytes, _Answer] = OrderedDict()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        key = Headers(scope=scope).get("idempotency-key") if scope["type"] == "http" else None
        if key is None or scope["method"] not in WRITES:
            await self._app(scope, receive, send)
            return
        try:
            body = await Request(scope, receive).body()
        except ClientDisconnect:
            return
        except HTTPException as error:  # from Guard: too large
            await Problem(error.status_code, "body-too-large", str(error.detail)).response()(scope, receive, send)
            return
        who = Headers(scope=scope).get("authorization", "")
        name = _digest(who, key)
        fingerprint = _digest(scope["method"], scope["path"], scope["query_string"], body)
        self._forget()
        known = self._answers.get(name)
        if known is not None:
            await _again(known, fingerprint, scope, receive, send)
            return
        answer = self._answers[name] = _Answer(fingerprint, time.monotonic())
        try:
            await self._app(scope, _replayed(body, receive), _recorded(answer, send))
        finally:
            if not 200 <= answer.status < 500 or len(answer.body) > MAX_ANSWER_BYTES:
                del self._answers[name]

    def _forget(self) -> None:
        """The oldest, but not those under way."""
        now = time.monotonic()
        for name, answer in list(self._answers.items()):
            if answer.status and (len(self._answers) > MOST or now - answer.at > KEEP_SECONDS):
                del self._answers[name]
            elif len(self._answers) <= MOST:
                return


async def _again(known: _Answer, fingerprint: bytes, scope: Scope, receive: Receive, send: Send) -> None:
    if known.fingerprint != fingerprint:
        problem = Problem(422, "idempotency-key-reused", "the Idempotency-Key belongs to another request")
    elif not known.status:
        problem = Problem(409, "still-under-way", "the request with this Idempotency-Key is not done yet")
    else:
        headers = [*known.headers, (b"idempotency-replayed", b"true")]
        await send({"type": "http.response.start", "status": known.status, "headers": headers})
        await send({"type": "http.response.body", "body": bytes(known.body)})
        return
    await problem.response()(scope, receive, send)


def _replayed(body: bytes, receive: Receive) -> Receive:
    """The body that was read already, then what follows."""
    given = False

    async def again() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


def _recorded(answer: _Answer, send: Send) -> Send:
    status = 0

    async def record(message: Message) -> None:
        nonlocal status
        if message["type"] == "http.response.start":
            status = message["status"]
            answer.headers = list(message.get("headers", ()))
        elif message["type"] == "http.response.body":
            answer.body += message.get("body", b"")[: MAX_ANSWER_BYTES + 1 - len(answer.body)]
            if not message.get("more_body"):
                answer.status = status
        await send(message)

    return record


def _digest(*parts: str | bytes) -> bytes:
    hasher = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        hasher.update(len(data).to_bytes(8, "little") + data)
    return hasher.digest()
