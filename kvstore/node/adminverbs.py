"""Verbs that the admin API needs beside those of engines and commands. None of them counts as a use of a block."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np

from kvstore.errors import ProtocolError
from kvstore.node.arguments import Arguments, integer_of, medium_of
from kvstore.node.chains import Chain, Chains
from kvstore.node.protocol import join_keys, split_keys
from kvstore.policy.admission import ADMITTED, Mode, Target
from kvstore.store import Store, contained, runs_of
from kvstore.telemetry import exposition
from kvstore.tiers.base import Medium

MAX_COUNT = 1000
"""Blocks in one answer."""

if TYPE_CHECKING:
    from kvstore.node.verbs import Caller, Verb


def admin_verbs(store: Store, chains: Chains) -> Mapping[str, Verb]:
    """The verbs by name. Called in the node's event loop; those about a prompt take it as ``Chains.named`` does."""

    def metrics(caller: Caller, args: Arguments) -> bytes:
        """Every metric of the node, in Prometheus' text format, or with ``openmetrics`` in that one, with exemplars."""
        return exposition(store.metrics.registry, args.get("openmetrics") is True)

    def peek(caller: Caller, args: Arguments) -> Any:
        """For each tier ``[medium, blocks, seconds, held]``: the prefix of the prompt that it and the faster ones hold, how
        long that takes to get to the arena, and how many blocks of the prompt the tier holds, wherever they are in it.

        The prompt may also be given by the ``keys`` of its blocks, which costs the node least: it is answered at once,
        without a task.
        """
        if "keys" in args:
            return peeked(Chain(split_keys(args["keys"]), None))
        return peek_named(args)

    async def peek_named(args: Arguments) -> Any:
        return peeked(await chains.named(args))

    def peeked(chain: Chain) -> Any:
        held = [(tier.medium, contained(chain.keys, tier.keys())) for tier in store.tiers]
        usable = _usable(store, chain.keys, runs_of(held, len(chain.keys)))
        tiers = [
            [medium.value, *within, int(np.count_nonzero(here))]
            for (medium, here), within in zip(held, usable, strict=True)
        ]
        return {**_described(chain), "tiers": tiers}

    async def where(caller: Caller, args: Arguments) -> Any:
        """``count`` blocks of a prompt from ``start`` on: the key of each, and the media that hold it, fastest first."""
        chain = await chains.named(args)
        start, count = integer_of(args, "start", 0, 1 << 31), integer_of(args, "count", 1, MAX_COUNT)
        keys = chain.keys[start : start + count]
        held = [(tier.medium.value, tier.keys()) for tier in store.tiers]
        return {
            **_described(chain),
            "keys": join_keys(keys),
            "media": [[medium for medium, present in held if key in present] for key in keys],
        }

    async def evict(caller: Caller, args: Arguments) -> Any:
        """Drop blocks from one tier: ``keys``, or those of a prompt, its tail first. The others keep theirs."""
        medium = medium_of(args, "medium")
        keys = split_keys(args["keys"]) if "keys" in args else (await chains.named(args)).keys[::-1]
        for tier in store.tiers:
            if tier.medium is medium:
                return {"evicted": await store.drop(tier, keys)}
        raise ProtocolError(f"this node has no {medium.value} tier")

    def policy(caller: Caller, args: Arguments) -> Any:
        """Admission as it is now, and what its rule said since the start; with ``mode``, set that first.

        A mode that is set holds until the node stops.
        """
        admission = store.admission
        if admission is None:
            raise ProtocolError("this node has no admission policy")
        if (wanted := args.get("mode")) is not None:
            admission.mode = _mode(wanted)
        return {
            "mode": admission.mode.value,
            "eviction": store.host.policy.name,
            "thresholds": asdict(admission.thresholds),
            "decisions": [
                {"tier": target.value, "reason": reason.value, "blocks": count, "admits": reason in ADMITTED}
                for (target, reason), count in sorted(
                    admission.decisions.items(), key=lambda item: [part.value for part in item[0]]
                )
            ],
        }

    async def judge(caller: Caller, args: Arguments) -> Any:
        """What the rule of admission would say of a prompt's blocks, by slower tier: runs of ``[blocks, reason, admits]``."""
        admission = store.admission
        if admission is None:
            raise ProtocolError("this node has no admission policy")
        chain, now = await chains.named(args), time.time()
        verdicts = {
            tier.medium.value: admission.consider(
                Target(tier.medium.value), chain.keys, now, store.pressure(tier.medium)
            )
            for tier in store.written[1:]
        }
        return {
            **_described(chain),
            "tiers": {
                medium: [[len(list(run)), reason.value, reason in ADMITTED] for reason, run in groupby(reasons)]
                for medium, reasons in verdicts.items()
            },
        }

    return {"metrics": metrics, "peek": peek, "where": where, "evict": evict, "policy": policy, "judge": judge}


def _described(chain: Chain) -> dict[str, Any]:
    known = chain.namespace
    return {
        "namespace": known.digest if known else b"",
        "block_tokens": known.fields.block_tokens if known else 0,
        "blocks": len(chain.keys),
    }


def _usable(store: Store, keys: Sequence[Any], runs: Sequence[tuple[Medium, int]]) -> list[tuple[int, float]]:
    """Per tier of the store, fastest first: blocks of the prefix without the slower tiers, and seconds to bring them."""
    order = {tier.medium: place for place, tier in enumerate(store.tiers)}
    usable = []
    for place in range(len(order)):
        within = next((at for at, (medium, _) in enumerate(runs) if order[medium] > place), len(runs))
        blocks = sum(count for _, count in runs[:within])
        usable.append((blocks, store.estimate(keys[:blocks], runs[:within])))
    return usable


def _mode(value: object) -> Mode:
    try:
        return Mode(value)
    except ValueError:
        raise ProtocolError(f"mode must be one of {', '.join(mode.value for mode in Mode)}") from None
