"""Who changed what: one JSON line for each write, whether it was allowed or not.

Routes say with ``auth.writes`` that they are writes. Bodies are not logged, since they may hold prompts.
"""

from __future__ import annotations

from pathlib import Path

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kvstore.audit import AuditLog


class Audit:
    """Middleware."""

    def __init__(self, app: ASGIApp, path: Path) -> None:
        self._app = app
        self._log = AuditLog(path)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        written = False

        def write(status: int) -> None:
            nonlocal written
            if scope.get("state", {}).get("audited") and not written:
                written = True
                self._write(scope, status)

        async def watched(message: Message) -> None:
            if message["type"] == "http.response.start":
                write(message["status"])  # first: whoever has an answer finds it in the log
            await send(message)

        try:
            await self._app(scope, receive, watched)
        finally:
            write(500)

    def _write(self, scope: Scope, status: int) -> None:
        principal = scope["state"].get("principal")
        entry = {
            "who": principal.name if principal else None,
            "role": principal.role if principal else None,
            "from": scope["client"][0] if scope.get("client") else None,
            "method": scope["method"],
            "path": scope["path"][:1024],
            "status": status,
            "idempotency_key": Headers(scope=scope).get("idempotency-key"),
        }
        self._log.write(entry, principal is not None)
