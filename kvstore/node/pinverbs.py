"""``pin``, ``unpin`` and ``pins``: chains to keep until a deadline."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from kvstore.errors import ProtocolError
from kvstore.identity import BlockKey
from kvstore.node.arguments import Arguments, digest_of
from kvstore.node.chains import Chains
from kvstore.policy.pins import LONGEST, Pins
from kvstore.store import Store

if TYPE_CHECKING:
    from kvstore.node.verbs import Caller, Verb


def pin_verbs(store: Store, pins: Pins, chains: Chains) -> Mapping[str, Verb]:
    """The verbs by name. Called in the node's event loop; all take a chain as ``Chains.named`` does."""

    async def pin(caller: Caller, args: Arguments) -> Any:
        """Keep a chain for ``seconds``. Counts as a use of it, so that no tier gives it up on an earlier ranking."""
        seconds = args.get("seconds")
        if not isinstance(seconds, int | float) or not 0 < seconds <= LONGEST:
            raise ProtocolError(f"seconds must be above 0 and at most {LONGEST:g}: a pin ends, and may be renewed")
        chain = await chains.named(args)
        now = time.time()
        pinned = pins.pin(chain.keys, now + seconds, now)
        for tier in store.tiers:
            tier.touch(chain.keys[:pinned])
        return {"pinned": pinned, "blocks": len(chain.keys), "held": _held(store, chain.keys), "until": now + seconds}

    async def unpin(caller: Caller, args: Arguments) -> Any:
        """A chain may be unpinned where no tier knows it: it was pinned on another node."""
        pinned = pins.ending_in(BlockKey(digest_of(args, "key"))) if "key" in args else []
        return {"unpinned": pins.unpin(pinned or (await chains.named(args)).keys, time.time())}

    async def list_pins(caller: Caller, args: Arguments) -> Any:
        """What is pinned, by deadline; ``key`` is the last block that was named with it."""
        listed = []
        for until, keys in sorted(pins.by_end(time.time()).items()):
            listed.append({"until": until, "blocks": len(keys), "key": keys[-1], "held": _held(store, keys)})
            await asyncio.sleep(0)
        return {"pins": listed}

    return {"pin": pin, "unpin": unpin, "pins": list_pins}


def _held(store: Store, keys: list[Any]) -> dict[str, int]:
    """How many of the blocks each tier holds."""
    return {tier.medium.value: sum(map(tier.keys().__contains__, keys)) for tier in store.tiers}
