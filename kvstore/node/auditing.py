"""Which requests on a node's socket change what operators look after, and a line in the audit log for each."""

from __future__ import annotations

import inspect
import os
from typing import TYPE_CHECKING, Any

from kvstore.audit import AuditLog
from kvstore.errors import KVStoreError
from kvstore.identity import KEY_BYTES
from kvstore.node.peers import ROOT

if TYPE_CHECKING:
    from kvstore.node.arguments import Arguments
    from kvstore.node.verbs import Caller, Verb

CHANGES = frozenset({"delete", "evict", "pin", "policy", "purge_tenant", "unpin"})
"""Verbs that change what operators look after. Verifying and draining lose nothing that is good."""
_ASKS = {"policy": "mode"}
"""Of those that also answer what is, the argument without which they change nothing."""
API = "admin API"
"""Says so in its greeting. It keeps a line of its own for each request, with who asked."""


def changes(verb: str, args: Arguments) -> bool:
    """Whether a request is for the audit log."""
    return verb in CHANGES and (verb not in _ASKS or _ASKS[verb] in args)


def audited(verb: str, handler: Verb, uid: int, audit: AuditLog) -> Verb:
    """The handler of one of ``CHANGES``, for a client that runs as ``uid``, with its line in the log."""
    trusted = uid in (os.geteuid(), ROOT)  # they could write the file as well

    async def ask(caller: Caller, args: Arguments) -> Any:
        problem = "broken off"
        try:
            result = handler(caller, args)
            answer = await result if inspect.isawaitable(result) else result
            problem = ""
            return answer
        except KVStoreError as error:
            problem = f"{type(error).__name__}: {error}"
            raise
        finally:
            if not (trusted and caller.name == API):
                audit.write(_entry(caller, uid, verb, args, problem), trusted)

    return ask


def _entry(caller: Caller, uid: int, verb: str, args: Arguments, problem: str) -> dict[str, object]:
    keys = args.get("keys")
    return {
        "who": f"user {uid}",
        "from": "socket",
        "client": caller.name,
        "pid": caller.pid,
        "verb": verb,
        "blocks": len(keys) // KEY_BYTES if isinstance(keys, bytes) else None,
        "tenant": next((str(args[each])[:64] for each in ("tenant", "name", "scope") if args.get(each)), None),
        "problem": problem[:256],
    }
