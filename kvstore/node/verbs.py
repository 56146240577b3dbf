"""What a node does for each verb.

Arguments come from outside: each is checked for type and bound before it is used, and a bad one is answered with
ProtocolError. Keys and digests are raw bytes; media are the values of ``Medium``.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass, replace
from heapq import nsmallest
from typing import Any

import kvstore
from kvstore import tracing
from kvstore.demand import Demand
from kvstore.envelope import HEADER_BYTES, MAX_PAYLOAD_BYTES, envelope_bytes
from kvstore.errors import BlockCorrupt, BlockNotFound, ConfigError, ProtocolError
from kvstore.history import What
from kvstore.identity import DIGEST_BYTES, KEY_BYTES, BlockKey, Namespace
from kvstore.leases import Session
from kvstore.namespaces import KnownNamespace, NamespaceBook
from kvstore.node.adminverbs import admin_verbs
from kvstore.node.api import Lookup, Miss, NewBlock
from kvstore.node.arguments import Arguments, bytes_of, digest_of, integer_of, medium_of, seconds_of, text_of
from kvstore.node.chains import MAX_NAME, Chains
from kvstore.node.explainverbs import explain_verbs
from kvstore.node.pinverbs import pin_verbs
from kvstore.node.promptverbs import prompt_verbs
from kvstore.node.protocol import join_keys, split_keys
from kvstore.node.reportverbs import report_verbs
from kvstore.node.straightverbs import straight_verbs
from kvstore.planning import Planning
from kvstore.requests import MAX_ID_CHARS, Asked, RecentRequests
from kvstore.store import Store
from kvstore.tiers.base import Tier
from kvstore.tracing import MAX_CHARS
from kvstore.usage import Usage

MAX_PARTS = 1024
MAX_PAGE = 1000
"""Blocks a listing or a scrub takes per request."""

Verb = Callable[["Caller", Arguments], Any | Awaitable[Any]]


@dataclass(slots=True, eq=False)
class Caller:
    """A connected client."""

    name: str
    pid: int
    session: Session
    since: float
    namespace: KnownNamespace | None = None
    """The one it opened last: what its lookups are about."""


class Verbs:
    """The verbs by name, over one store. Called in the node's event loop."""

    def __init__(
        self,
        store: Store,
        namespaces: NamespaceBook,
        demand: Demand,
        planning: Planning,
        tenant: str,
        tenant_secret: bytes,
        epoch: int,
    ) -> None:
        self.callers: set[Caller] = set()
        self.draining = False
        self._store = store
        self._namespaces = namespaces
        self._demand = demand
        self._planning = planning
        self._tenant = tenant
        self._secret = tenant_secret
        self._epoch = epoch
        self._started = time.monotonic()
        self._requests = RecentRequests()
        self._usage = Usage(store.metrics.registry)
        chains = Chains(store, namespaces, self._requests, tenant_secret)
        self.table: dict[str, Verb] = {
            "lookup": self.lookup,
            "holds": self.holds,
            "acquire": self.acquire,
            "release": self.release,
            "reserve": self.reserve,
            "commit": self.commit,
            "abort": self.abort,
            "open_namespace": self.open_namespace,
            "status": self.status,
            "list": self.list,
            "inspect": self.inspect,
            "verify": self.verify,
            "delete": self.delete,
            "find": self.find,
            "drain": self.drain,
            "hot": self.hot,
            **admin_verbs(store, chains),
            **report_verbs(planning, demand),
            **explain_verbs(store, namespaces, demand, chains),
            **pin_verbs(store, demand.pins, chains),
            **prompt_verbs(self._requests),
            **straight_verbs(store),
        }

    # --- engines

    def lookup(self, caller: Caller, args: Arguments) -> Any:
        keys, start = split_keys(args.get("keys")), integer_of(args, "start", 0, 1 << 31)
        request = text_of(args, "request", MAX_ID_CHARS)
        with self._usage.lookup(_traceparent(args), request, max(len(keys) - start, 0)) as seen:
            found = self._store.lookup(keys, start)
            seen.found = found.blocks
            self._remember(
                caller, keys, found.blocks, args
            )  # before the plan: what is explained came after the question
            tokens = len(keys) - integer_of(args, "states", 0, len(keys))  # behind them stands what holds none
            of_tokens = found.first(tokens - start)
            plan = self._plan(caller, keys[:tokens], of_tokens, args)
        self._observe(caller, keys, caller.namespace)
        offered = of_tokens.blocks if plan is None else plan[0]
        self._count(caller, request, keys[:tokens], start, of_tokens, offered)
        runs = [(medium.value, count) for medium, count in found.runs]
        return [found.blocks, runs, found.seconds, plan]

    def holds(self, caller: Caller, args: Arguments) -> bytes:
        """One byte a key, whether it is held; for engines whose blocks are of use without those before them.

        With a ``namespace`` the keys count as a prompt of it.
        """
        keys = split_keys(args.get("keys"))
        held = self._store.holds(keys)
        if "namespace" in args:
            self._store.wanted(keys, held)
            known = self._namespaces.get(digest_of(args, "namespace"))
            self._observe(caller, keys, known)
            if known is not None and self._usage.first(caller, "", keys):
                size, runs = known.fields.block_tokens, self._store.peek(keys)
                self._usage.count_request(len(keys), runs, sum(held), size, 0.0)
                self._usage.count_observed(self._store.beyond(keys[sum(count for _, count in runs) :]), size)
        return bytes(held)

    async def acquire(self, caller: Caller, args: Arguments) -> Any:
        keys, timeout = split_keys(args.get("keys")), seconds_of(args, "timeout")
        with self._usage.load(_traceparent(args), keys) as load:
            load.delivery = delivery = await self._store.acquire(caller.session, keys, timeout)
        miss = delivery.miss.value if delivery.miss else None
        return [delivery.offsets, [medium.value for medium in delivery.media], miss]

    def release(self, caller: Caller, args: Arguments) -> None:
        self._store.release(caller.session, split_keys(args.get("keys")))

    def reserve(self, caller: Caller, args: Arguments) -> Any:
        keys, parents, indices = split_keys(args.get("keys")), split_keys(args.get("parents")), args.get("indices")
        if not isinstance(indices, list) or not len(keys) == len(parents) == len(indices):
            raise ProtocolError("keys, parents and indices must be of one length")
        if not all(type(index) is int and 0 <= index < 1 << 32 for index in indices):
            raise ProtocolError("indices must be unsigned 32-bit integers")
        parts = integer_of(args, "parts", 1, MAX_PARTS)
        namespace = self._namespaces.get(digest_of(args, "namespace"))
        if namespace is None or namespace.block_bytes is None:
            raise ProtocolError("open the namespace first")
        if self.draining:
            return [Miss.UNAVAILABLE.value] * len(keys)
        blocks = [NewBlock(*block) for block in zip(keys, parents, indices, strict=True)]
        answers = self._store.reserve(
            caller.session,
            namespace.digest,
            namespace.block_bytes,
            namespace.fields.block_tokens,
            blocks,
            part=integer_of(args, "part", 0, parts - 1),
            parts=parts,
        )
        return [answer.value if isinstance(answer, Miss) else answer for answer in answers]

    async def commit(self, caller: Caller, args: Arguments) -> Any:
        keys = split_keys(args.get("keys"))
        with tracing.span("node commit", _traceparent(args), blocks=len(keys)):
            reached = await self._store.commit(
                caller.session,
                keys,
                part=integer_of(args, "part", 0, MAX_PARTS),
                durable=medium_of(args, "durable"),
                timeout=seconds_of(args, "timeout"),
            )
        return join_keys(reached)

    def abort(self, caller: Caller, args: Arguments) -> None:
        self._store.abort(caller.session, split_keys(args.get("keys")))

    def open_namespace(self, caller: Caller, args: Arguments) -> Any:
        # The node says whose blocks these are: a client cannot choose its tenant.
        namespace = replace(Namespace.from_dict(args.get("fields")), tenant=self._tenant)
        block_bytes = integer_of(args, "block_bytes", 1, MAX_PAYLOAD_BYTES)
        largest = self._store.host.largest_block
        if envelope_bytes(block_bytes) > largest:
            raise ConfigError(
                "host.extent_bytes",
                largest,
                f"a block of {namespace.model} needs {envelope_bytes(block_bytes)} bytes with its header",
                "Raise host.extent_bytes, or lower the connector's block_tokens.",
            )
        caller.namespace = self._namespaces.open(namespace, block_bytes)
        return [namespace.digest, namespace.keyring(self._secret).secret]

    def _plan(self, caller: Caller, keys: list[BlockKey], found: Lookup, args: Arguments) -> Any:
        """``[blocks, reason, patience...]`` for who asks for a plan by saying how many requests wait."""
        if (known := caller.namespace) is None or known.block_bytes is None or "waiting" not in args:
            return None
        start, waiting = integer_of(args, "start", 0, 1 << 31), integer_of(args, "waiting", 0, 1 << 20)
        decision = self._planning.decide(known, keys, start, found.runs, waiting, caller)
        patience = decision.patience
        return [decision.blocks, decision.reason.value, patience.first, patience.per_block, patience.limit]

    def _remember(self, caller: Caller, keys: list[BlockKey], found: int, args: Arguments) -> None:
        """So that it can be explained why this request was not found, or not all of it."""
        name = text_of(args, "request", MAX_ID_CHARS)
        if name and caller.namespace is not None:
            digest, start = caller.namespace.digest, integer_of(args, "start", 0, 1 << 31)
            asked = Asked(name, caller.name, digest, join_keys(keys), start, found, time.time())
            self._requests.add(asked, bytes_of(args, "seed", DIGEST_BYTES), text_of(args, "lora", MAX_NAME))

    def _count(
        self, caller: Caller, request: str, keys: list[BlockKey], start: int, found: Lookup, offered: int
    ) -> None:
        known = caller.namespace
        if known is None or not self._usage.first(caller, request, keys):
            return
        size = known.fields.block_tokens
        spared = self._planning.prefill_seconds(known, start * size, offered * size)
        self._usage.count_request(max(len(keys) - start, 0), found.runs, offered, size, spared)
        self._usage.count_observed(self._store.beyond(keys[start + found.blocks :]), size)

    def _observe(self, caller: Caller, keys: list[BlockKey], known: KnownNamespace | None) -> None:
        if known is not None and known.block_bytes is not None:
            tokens, nbytes = known.fields.block_tokens, known.block_bytes
            asyncio.get_running_loop().call_soon(self._demand.observe, caller, keys, tokens, nbytes)

    # --- operators

    def status(self, caller: Caller, args: Arguments) -> Any:
        now = time.monotonic()
        return {
            "version": kvstore.__version__,
            "pid": os.getpid(),
            "epoch": self._epoch,
            "uptime_seconds": now - self._started,
            "draining": self.draining,
            "tiers": [{**asdict(stats), "medium": stats.medium.value} for stats in self._stats()],
            "queued_bytes": {medium.value: size for medium, size in self._store.queued_bytes.items()},
            "counters": self._store.metrics.snapshot(),
            "bad_blocks": [
                {"at": at, "key": key, "tier": medium and medium.value}
                for at, key, medium in reversed(self._store.history.bad)
            ],
            "clients": [
                {
                    "name": client.name,
                    "pid": client.pid,
                    "namespace": client.namespace and client.namespace.digest,
                    "connected_seconds": now - client.since,
                    "leases": sum(map(len, client.session.leases.values())),
                }
                for client in self.callers
            ],
            "namespaces": [
                {"digest": known.digest, "block_bytes": known.block_bytes, "fields": known.fields.to_dict()}
                for known in self._namespaces
            ],
        }

    async def list(self, caller: Caller, args: Arguments) -> Any:
        tier = self._tier(args)
        namespace = args.get("namespace")
        prefix = bytes_of(args, "prefix", KEY_BYTES)
        page, cursor = await _page(tier, args)
        stats = [stat for key in page if key.startswith(prefix) and (stat := tier.stat(key)) is not None]
        blocks = [asdict(stat) for stat in stats if namespace is None or stat.namespace == namespace]
        return {"blocks": blocks, "cursor": cursor}

    def inspect(self, caller: Caller, args: Arguments) -> Any:
        key = BlockKey(digest_of(args, "key"))
        holding = [(tier.medium.value, stat) for tier in self._store.tiers if (stat := tier.stat(key)) is not None]
        if not holding:
            return {"media": []}
        return {"media": [medium for medium, _ in holding], **asdict(holding[0][1])}

    async def verify(self, caller: Caller, args: Arguments) -> Any:
        """Read a page of blocks, or those named, with the tier's own ``get``, which drops and quarantines the bad ones."""
        tier = self._tier(args)
        named = args.get("keys")
        page, cursor = await _page(tier, args) if named is None else (split_keys(named)[:MAX_PAGE], b"")
        checked = nbytes = 0
        bad = []
        for key in page:
            if (stat := tier.stat(key)) is None:
                continue
            offset = self._store.host.allocate(envelope_bytes(stat.length))
            if offset is None:
                raise ProtocolError("the arena has no slot free to read into: try again when it is less busy")
            try:
                await tier.get(key, self._store.host.slot(offset))
            except BlockNotFound:
                continue
            except BlockCorrupt as error:
                bad.append({"key": key, "reason": str(error)})
                self._store.history.record(What.CORRUPT, [key], tier.medium)
            finally:
                self._store.host.discard(offset)
            checked += 1
            nbytes += stat.length + HEADER_BYTES
        return {"checked": checked, "bytes": nbytes, "bad": bad, "cursor": cursor}

    async def delete(self, caller: Caller, args: Arguments) -> Any:
        namespace = args.get("namespace")
        if namespace is None:
            keys = split_keys(args.get("keys"))
        else:
            every = {key for tier in self._store.tiers for key in tier.keys()}
            keys = [key for key in every if self._namespace_of(key) == namespace]
        deleted = await self._store.delete(keys)
        return {"deleted": {medium.value: count for medium, count in deleted.items()}}

    async def find(self, caller: Caller, args: Arguments) -> None:
        await self._store.find(split_keys(args.get("keys")))

    def hot(self, caller: Caller, args: Arguments) -> Any:
        """The hottest prompts, by the key of their deepest shared block."""
        prompts = []
        for chain in self._demand.top(integer_of(args, "limit", 1, MAX_PAGE)):
            stats = [
                (tier.medium.value, stat) for tier in self._store.tiers if (stat := tier.stat(chain.key)) is not None
            ]
            prompts.append(
                {
                    "key": chain.key,
                    "namespace": next((stat.namespace for _, stat in stats if stat.namespace), b""),
                    "tokens": chain.extent.tokens,
                    "bytes": chain.extent.bytes,
                    "hits": chain.hits,
                    "seconds_saved": chain.seconds_saved,
                    "last_used": chain.last_used,
                    "media": [medium for medium, _ in stats],
                }
            )
        return {"prompts": prompts}

    async def drain(self, caller: Caller, args: Arguments) -> Any:
        drained = await self._store.drain(seconds_of(args, "timeout"))
        return {"drained": drained, "queued_bytes": sum(self._store.queued_bytes.values())}

    def remembers(self, request: str) -> bool:
        """Whether a request of that id was asked about lately."""
        return self._requests.find(request) is not None

    def _stats(self) -> Any:
        return [tier.stats() for tier in self._store.tiers]

    def _tier(self, args: Arguments) -> Tier:
        medium = medium_of(args, "medium")
        for tier in self._store.tiers:
            if tier.medium is medium:
                return tier
        raise ProtocolError(f"this node has no {medium.value} tier")

    def _namespace_of(self, key: BlockKey) -> bytes | None:
        return next((stat.namespace for tier in self._store.tiers if (stat := tier.stat(key)) is not None), None)


def _traceparent(args: Arguments) -> str:
    return text_of(args, "traceparent", MAX_CHARS)


async def _page(tier: Tier, args: Arguments) -> tuple[list[BlockKey], bytes]:
    """Up to ``limit`` keys after ``cursor`` in ascending order, and the cursor of the next page (empty at the end).

    Chosen in a thread: among a million keys it takes longer than an engine waits for a lookup.
    """
    limit = integer_of(args, "limit", 1, MAX_PAGE)
    cursor = bytes_of(args, "cursor", KEY_BYTES)
    keys = list(tier.keys())
    page = await asyncio.to_thread(lambda: nsmallest(limit + 1, (key for key in keys if key > cursor)))
    return page[:limit], page[limit - 1] if len(page) > limit else b""
