"""What operators ask a node with several tenants. All other verbs tell operators of the node's own tenant, and of disk and bucket
as a whole; with ``tenant`` among the arguments they are asked of that tenant's pipeline."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from kvstore.errors import ProtocolError
from kvstore.node.arguments import Arguments, integer_of, text_of

if TYPE_CHECKING:
    from kvstore.node.verbs import Caller, Verb, Verbs
    from kvstore.tenants.pipelines import Tenants

MAX_NAME = 64

ASKED_OF_A_TENANT = (
    *("peek", "where", "judge", "explain", "open_namespace", "list", "inspect", "verify", "delete", "evict"),
    *("pin", "unpin", "pins", "policy", "planner", "breakers", "previews", "hot", "status"),
)
"""Those that leave nothing on the connection, whose session is of the node's own store."""


def tenant_verbs(tenants: Tenants, own: Verbs) -> Mapping[str, Verb]:
    """The verbs by name, for operators. Called in the node's event loop. ``own`` are those of the node's own tenant."""

    def asked_of(verb: str) -> Verb:
        """``verb`` of the node, or of the ``tenant`` that is named."""
        ours = own.table[verb]

        def ask(caller: Caller, args: Arguments) -> Any:
            pipeline = tenants.pipelines.get(text_of(args, "tenant", MAX_NAME))
            if pipeline is None:
                return ours(caller, args)
            return pipeline.verbs.table[verb](caller, {key: value for key, value in args.items() if key != "tenant"})

        return ask

    async def list_tenants(caller: Caller, args: Arguments) -> Any:
        """What each tenant holds of each tier, and how many clients it has here."""
        return {
            "tenants": [
                {
                    "name": name,
                    "clients": len(pipeline.verbs.callers),
                    "tiers": [
                        {**asdict(s), "medium": s.medium.value} for s in (t.stats() for t in pipeline.store.tiers)
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

    def hot(caller: Caller, args: Arguments) -> Any:
        """The hottest prompts of all tenants, or of the ``tenant`` that is named."""
        if text_of(args, "tenant", MAX_NAME):
            return asked_of_one(caller, args)
        found = ours_hot(caller, args)["prompts"]
        for pipeline in tenants.pipelines.values():
            found = found + pipeline.verbs.hot(caller, args)["prompts"]
        found.sort(key=lambda prompt: -prompt["seconds_saved"] / max(prompt["bytes"], 1))
        return {"prompts": found[: integer_of(args, "limit", 1, 1000)]}

    ours_hot, asked_of_one = own.hot, asked_of("hot")
    routed = {verb: asked_of(verb) for verb in ASKED_OF_A_TENANT}
    return {**routed, "hot": hot, "tenants": list_tenants, "follow_tenants": follow, "purge_tenant": purge}
