"""Verbs that the admin API needs beside those of engines and commands. None of them counts as a use of a block."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from prometheus_client import generate_latest

from kvstore.errors import ProtocolError
from kvstore.node.arguments import Arguments, medium_of
from kvstore.node.protocol import split_keys
from kvstore.policy.admission import ADMITTED, Mode, Target
from kvstore.store import Store
from kvstore.tiers.base import Medium

if TYPE_CHECKING:
    from kvstore.node.verbs import Caller, Verb


def admin_verbs(store: Store) -> Mapping[str, Verb]:
    """The verbs by name. Called in the node's event loop."""

    def metrics(caller: Caller, args: Arguments) -> bytes:
        """Every metric of the node, in Prometheus' text format."""
        return generate_latest(store.metrics.registry)

    def peek(caller: Caller, args: Arguments) -> Any:
        """For each tier ``[medium, blocks, seconds, held]``: the prefix of ``keys`` that it and the faster ones hold, how long
        that takes to get to the arena, and how many of the keys the tier holds, wherever they are in the chain."""
        keys = split_keys(args.get("keys"))
        runs = store.peek(keys)
        return [
            [tier.medium.value, *usable, sum(map(tier.keys().__contains__, keys))]
            for tier, usable in zip(store.tiers, _usable(store, keys, runs), strict=True)
        ]

    def where(caller: Caller, args: Arguments) -> Any:
        """For each of ``keys`` the media that hold it, fastest first."""
        held = [(tier.medium.value, tier.keys()) for tier in store.tiers]
        return [[medium for medium, keys in held if key in keys] for key in split_keys(args.get("keys"))]

    async def evict(caller: Caller, args: Arguments) -> Any:
        """Drop ``keys`` from one tier; how many it held. The others keep theirs."""
        medium = medium_of(args, "medium")
        for tier in store.tiers:
            if tier.medium is medium:
                return {"evicted": await tier.delete(split_keys(args.get("keys")))}
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

    def judge(caller: Caller, args: Arguments) -> Any:
        """What admission would say of ``keys``, one chain from its head, for each slower tier: a list of reasons."""
        admission = store.admission
        if admission is None:
            raise ProtocolError("this node has no admission policy")
        keys = split_keys(args.get("keys"))
        return {
            medium.value: [
                [reason.value, reason in ADMITTED]
                for reason in admission.consider(Target(medium.value), keys, time.time(), store.pressure(medium))
            ]
            for medium in (Medium.DISK, Medium.OBJECT)
            if any(tier.medium is medium for tier in store.tiers)
        }

    return {"metrics": metrics, "peek": peek, "where": where, "evict": evict, "policy": policy, "judge": judge}


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
