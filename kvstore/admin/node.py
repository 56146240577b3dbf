"""The node as the API sees it: a client of its socket, and answers that are kept for a moment."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from copy import copy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from kvstore.admin.cached import Cached
from kvstore.admin.models.insight import BreakerReport
from kvstore.admin.models.prompts import HotPrompt, Prompt
from kvstore.admin.models.status import NamespaceInfo, NodeStatus
from kvstore.admin.problems import Problem
from kvstore.identity import Keyring, TokenIds, chain_seed
from kvstore.node.client import AsyncClient, Client
from kvstore.promptkeys import PromptKeys
from kvstore.tenants.credentials import engine_token

STATUS_SECONDS = 0.25
"""How old a status may be: readers beyond four a second cost the node nothing."""
MOST_KEPT = 256
"""Answers, beside those to the questions that everybody asks."""
METRICS_SECONDS = 1.0
HOT_SECONDS = 1.0
BREAKERS_SECONDS = 30.0
"""To find where prompts part takes one of the node's threads half a second."""
HOT_PROMPTS = 1000
"""As many as the node tells at a time."""
CALL_SECONDS = 10.0
WORK_SECONDS = 600.0
"""For calls that read or delete many blocks."""

Tokenize = Callable[[str, str], Awaitable[Sequence[int]]]
"""Token ids of a model's text. Raises Problem (422)."""


@dataclass(frozen=True, slots=True)
class PromptChain:
    """The blocks of a prompt."""

    namespace: str
    """Digest, in hexadecimal."""
    block_tokens: int
    keys: bytes
    """Joined, 16 bytes a block."""


class NodeView:
    """One node. In one event loop; calls raise NodeUnavailable and DeadlineExceeded."""

    def __init__(self, socket: Path, tokenize: Tokenize, token: Callable[[], str] = engine_token) -> None:
        """``token`` gives what to show a node with several tenants."""
        self.socket = socket
        self._client = AsyncClient(Client(socket, name="admin API", token=token))
        self._tokenize = tokenize
        self._scope: dict[str, str] = {}
        self._parts: dict[str, NodeView] = {}
        self._forget_answers()

    def within(self, tenant: str) -> NodeView:
        """The part of the node that is a tenant's: nothing of another is in any answer, nor in what is kept of them."""
        part = self._parts.get(tenant)
        if part is None:
            part = self._parts[tenant] = copy(self)
            part._scope = {"scope": tenant}
            part._forget_answers()
        return part

    def _forget_answers(self) -> None:
        self._known = PromptKeys()
        self._keyrings: dict[tuple[str, str], Keyring | None] = {}
        self._kept: OrderedDict[tuple[object, ...], Cached[Any]] = OrderedDict()
        self.status = Cached(self._status, STATUS_SECONDS)
        self.metrics = Cached(partial(self._metrics, False), METRICS_SECONDS)
        self.openmetrics = Cached(partial(self._metrics, True), METRICS_SECONDS)
        self.hot = Cached(self._hot, HOT_SECONDS)
        self.breakers = Cached(self._breakers, BREAKERS_SECONDS)

    async def _call(self, verb: str, timeout: float, /, **arguments: Any) -> Any:
        return await self._client.call(verb, timeout, **arguments, **self._scope)

    async def read(self, verb: str, timeout: float = CALL_SECONDS, /, **arguments: Any) -> Any:
        """A verb that changes nothing (``kvstore/node/verbs.py``); the answer as plain msgpack types.

        The same question within ``STATUS_SECONDS`` gets the same answer.
        """
        if "tokens" in arguments:  # long, and seldom the same
            return await self._call(verb, timeout, **arguments)
        name = (verb, *sorted(arguments.items()))
        known = self._kept.get(name)
        if known is None:
            known = self._kept[name] = Cached(partial(self._call, verb, timeout, **arguments), STATUS_SECONDS)
            if len(self._kept) > MOST_KEPT:
                self._kept.popitem(last=False)
        return await known()

    async def change(self, verb: str, timeout: float = CALL_SECONDS, /, **arguments: Any) -> Any:
        """A verb that changes something; what is read afterwards shows it."""
        try:
            return await self._call(verb, timeout, **arguments)
        finally:
            self._kept.clear()
            self.status.forget()
            self.hot.forget()

    async def close(self) -> None:
        await self._client.__aexit__()

    async def namespace(self, wanted: str) -> NamespaceInfo:
        """The one namespace of that model, or whose digest begins so. Raises Problem (404, 409)."""
        known = (await self.status()).namespaces
        found = [space for space in known if space.model == wanted or space.digest.startswith(wanted.lower())]
        if len(found) == 1:
            return found[0]
        if not found:
            raise Problem(404, "no-such-namespace", f"the node knows no namespace {wanted!r}", "See /v1/namespaces.")
        digests = [space.digest for space in found]
        raise Problem(
            409, "ambiguous-namespace", f"{len(found)} namespaces match {wanted!r}", "Give a digest.", digests=digests
        )

    async def about(self, prompt: Prompt) -> dict[str, Any]:
        """The arguments that name a prompt to the node (``Chains.named``). Raises Problem (404, 409)."""
        named: dict[str, Any] = {}
        if prompt.request is not None:
            named["request"] = prompt.request
        elif prompt.key is not None:
            named["key"] = bytes.fromhex(prompt.key)
        else:
            space = await self.namespace(prompt.namespace)
            named["tokens"] = np.asarray(await self._token_ids(prompt, space), dtype="<u4").tobytes()
            named["namespace"] = bytes.fromhex(space.digest)
            named["cache_salt"], named["lora"] = prompt.cache_salt, prompt.lora
            named |= space.asked_of
        return named

    async def peek(self, prompt: Prompt) -> dict[str, Any]:
        """What each tier could serve of a prompt, as the verb tells it. Raises Problem (404, 409)."""
        chain = await self.chain(prompt)
        if chain is None:
            return dict(await self.read("peek", **await self.about(prompt)))
        found = await self.peek_keys(chain.keys)
        return {**found, "namespace": chain.namespace, "block_tokens": chain.block_tokens}

    async def peek_keys(self, keys: bytes, timeout: float = CALL_SECONDS) -> dict[str, Any]:
        """The same of a chain by its joined keys."""
        return dict(await self._call("peek", timeout, keys=keys))

    async def chain(self, prompt: Prompt) -> PromptChain | None:
        """The keys of a prompt named by tokens or text; None where this process may not derive them.

        Raises Problem (404, 409).
        """
        if prompt.request is not None or prompt.key is not None:
            return None
        space = await self.namespace(prompt.namespace)
        keyring = await self._keyring(space)
        if keyring is None:
            return None
        tokens = await self._token_ids(prompt, space)
        seed = chain_seed(cache_salt=prompt.cache_salt, lora=prompt.lora)
        # Here and not in the node, which has engines to serve. In a thread: a long prompt takes milliseconds.
        keys = await asyncio.to_thread(self._known.keys, tokens, space.block_tokens, keyring, seed)
        return PromptChain(space.digest, space.block_tokens, keys)

    async def _token_ids(self, prompt: Prompt, space: NamespaceInfo) -> TokenIds | Sequence[int]:
        """Of a prompt that is named by tokens or text. Raises Problem (422)."""
        given = prompt.token_ids
        return given if given is not None else await self._tokenize(space.model, prompt.text or "")

    async def _keyring(self, space: NamespaceInfo) -> Keyring | None:
        """That turns digests into keys; None for a namespace that no client has opened, or of another tenant."""
        if space.block_bytes is None:
            return None
        name = (await self.status()).epoch, space.digest  # a node that restarted may have another secret
        if name not in self._keyrings:
            digest, secret = await self._call(
                "open_namespace", CALL_SECONDS, fields=space.fields, block_bytes=space.block_bytes, **space.asked_of
            )
            self._keyrings = {known: ring for known, ring in self._keyrings.items() if known[0] == name[0]}
            self._keyrings[name] = Keyring(secret) if digest.hex() == space.digest else None
        return self._keyrings[name]

    async def _status(self) -> NodeStatus:
        return NodeStatus.model_validate(await self._call("status", CALL_SECONDS))

    async def _breakers(self) -> BreakerReport:
        return BreakerReport.model_validate(await self._call("breakers", WORK_SECONDS))

    async def _metrics(self, openmetrics: bool) -> bytes:
        text: bytes = await self._call("metrics", CALL_SECONDS, openmetrics=openmetrics)
        return text

    async def _hot(self) -> list[HotPrompt]:
        return [
            HotPrompt.model_validate(prompt)
            for prompt in (await self._call("hot", CALL_SECONDS, limit=HOT_PROMPTS))["prompts"]
        ]
