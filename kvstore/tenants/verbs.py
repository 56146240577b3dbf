"""What operators ask a node with several tenants.

The verbs of every node are asked of the tenant that is meant: the one that ``tenant`` names, else the one whose the block, the
request or the namespace is that they are about; else of the node's own tenant, which sees disk and bucket as a whole.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from kvstore.errors import ProtocolError
from kvstore.identity import KEY_BYTES, BlockKey
from kvstore.node.arguments import Arguments, integer_of, text_of
from kvstore.node.protocol import join_keys, split_keys
from kvstore.requests import MAX_ID_CHARS
from kvstore.store import Store
from kvstore.telemetry import exposition
from kvstore.tenants.whole import together

if TYPE_CHECKING:
    from kvstore.node.verbs import Caller, Verb, Verbs
    from kvstore.tenants.pipelines import Pipeline, Tenants

MAX_NAME = 64
MAX_HOT = 1000

ASKED_OF_ONE = (
    *("peek", "where", "judge", "explain", "open_namespace", "list", "inspect", "verify", "pin", "unpin"),
    *("policy", "planner", "breakers", "previews"),
)
"""Those that leave nothing on the connection, whose session is of the node's own store."""


def tenant_verbs(tenants: Tenants, own: Verbs) -> Mapping[str, Verb]:
    """The verbs by name, for operators. Called in the node's event loop. ``own`` are those of the node's own tenant."""
    ours = dict(own.table)

    def meant(args: Arguments) -> Pipeline | None:
        """The tenant's that a request is about; None: the node's own."""
        if name := text_of(args, "tenant", MAX_NAME):
            return tenants.pipelines.get(name)
        key = args.get("key", args.get("keys"))
        if isinstance(key, bytes) and len(key) >= KEY_BYTES:
            block = BlockKey(key[:KEY_BYTES])
            return next((each for each in tenants.pipelines.values() if _knows(each, block)), None)
        if request := text_of(args, "request", MAX_ID_CHARS):
            return next((each for each in tenants.pipelines.values() if each.verbs.remembers(request)), None)
        namespace = args.get("namespace")
        return tenants.of_namespace(namespace) if isinstance(namespace, bytes) else None

    def asked_of_one(verb: str) -> Verb:
        def ask(caller: Caller, args: Arguments) -> Any:
            pipeline = meant(args)
            table = ours if pipeline is None else pipeline.verbs.table
            return table[verb](caller, {name: value for name, value in args.items() if name != "tenant"})

        return ask

    async def each_its_own(verb: str, caller: Caller, args: Arguments) -> list[Any]:
        """The answers of those whose blocks the ``keys`` are; without keys, of the one that is meant."""
        if "keys" not in args or "tenant" in args:
            return [await asked_of_one(verb)(caller, args)]
        left = split_keys(args["keys"])
        answers = []
        for pipeline in list(tenants.pipelines.values()):
            mine = [key for key in left if _holds(pipeline.store, key)]
            if mine:
                answers.append(await pipeline.verbs.table[verb](caller, {**args, "keys": join_keys(mine)}))
                left = [key for key in left if key not in set(mine)]
        return [*answers, await ours[verb](caller, {**args, "keys": join_keys(left)})]

    async def delete(caller: Caller, args: Arguments) -> Any:
        deleted: Counter[str] = Counter()
        for answer in await each_its_own("delete", caller, args):
            deleted.update(answer["deleted"])
        return {"deleted": dict(deleted)}

    async def evict(caller: Caller, args: Arguments) -> Any:
        return {"evicted": sum(answer["evicted"] for answer in await each_its_own("evict", caller, args))}

    def hot(caller: Caller, args: Arguments) -> Any:
        """The hottest prompts of all tenants, or of the ``tenant`` that is named."""
        named = meant(args)
        asked = [own, *(each.verbs for each in tenants.pipelines.values())] if named is None else [named.verbs]
        found = [prompt for verbs in asked for prompt in verbs.hot(caller, args)["prompts"]]
        found.sort(key=lambda prompt: -prompt["hits"] * prompt["seconds_saved"] / max(prompt["bytes"], 1))
        return {"prompts": found[: integer_of(args, "limit", 1, MAX_HOT)]}

    def status(caller: Caller, args: Arguments) -> Any:
        """The node as a whole, or as the ``tenant`` that is named sees it."""
        if (named := meant(args)) is not None:
            return named.verbs.status(caller, args)
        return together(
            own.status(caller, args), [each.verbs.status(caller, args) for each in tenants.pipelines.values()]
        )

    def metrics(caller: Caller, args: Arguments) -> bytes:
        """Those of the whole node; a tenant's have its name as a label."""
        return exposition(tenants.metrics, args.get("openmetrics") is True)

    async def pins(caller: Caller, args: Arguments) -> Any:
        """What is pinned, by deadline, of all tenants, or of the ``tenant`` that is named."""
        named = meant(args)
        tables = (
            [ours, *(each.verbs.table for each in tenants.pipelines.values())] if named is None else [named.verbs.table]
        )
        found = [pin for table in tables for pin in (await table["pins"](caller, args))["pins"]]
        return {"pins": sorted(found, key=lambda pin: float(pin["until"]))}

    async def list_tenants(caller: Caller, args: Arguments) -> Any:
        """What each tenant holds of each tier, and how many clients it has here."""
        return {
            "tenants": [
                {
                    "name": name,
                    "clients": len(pipeline.verbs.callers),
                    "tiers": [
                        {**asdict(stats), "medium": stats.medium.value}
                        for stats in (tier.stats() for tier in pipeline.store.tiers)
                    ],
                }
                for name, pipeline in sorted(tenants.pipelines.items())
            ]
        }

    async def follow(caller: Caller, args: Arguments) -> Any:
        """Be as the tenant book is now; done when this is answered."""
        await tenants.follow()
        return await list_tenants(caller, args)

    async def purge(caller: Caller, args: Arguments) -> Any:
        """Delete all that a tenant has in memory and on disk here; what was there, and what is left."""
        name = text_of(args, "name", MAX_NAME)
        if not name:
            raise ProtocolError("name a tenant")
        return await tenants.purge(name)

    async def drain(caller: Caller, args: Arguments) -> Any:
        """Wait until what all tenants have saved is written down."""
        answers = [
            ours["drain"](caller, args),
            *(each.verbs.drain(caller, args) for each in tenants.pipelines.values()),
        ]
        done = await asyncio.gather(*answers)
        return {
            "drained": all(answer["drained"] for answer in done),
            "queued_bytes": sum(answer["queued_bytes"] for answer in done),
        }

    def within(verb: str, handler: Verb) -> Verb:
        """With a ``scope``, a tenant's name, the verb of that tenant's pipeline, which has nothing of any other."""

        def ask(caller: Caller, args: Arguments) -> Any:
            if "scope" not in args:
                return handler(caller, args)
            theirs = tenants.serving(text_of(args, "scope", MAX_NAME)).verbs.table.get(verb)
            if theirs is None:
                raise ProtocolError(f"{verb} is about the whole node")
            return theirs(caller, {name: value for name, value in args.items() if name not in ("scope", "tenant")})

        return ask

    whole: dict[str, Verb] = {
        **own.table,
        **{verb: asked_of_one(verb) for verb in ASKED_OF_ONE},
        "delete": delete,
        "evict": evict,
        "hot": hot,
        "metrics": metrics,
        "drain": drain,
        "pins": pins,
        "status": status,
        "tenants": list_tenants,
        "follow_tenants": follow,
        "purge_tenant": purge,
    }
    return {verb: within(verb, handler) for verb, handler in whole.items()}


def _knows(tenant: Pipeline, key: BlockKey) -> bool:
    """Whether a block is there, or wished to be."""
    return _holds(tenant.store, key) or any(tenant.demand.pins.hold([key], time.time()))


def _holds(store: Store, key: BlockKey) -> bool:
    return any(key in tier.keys() for tier in store.tiers)
