"""``locate`` and ``was_read``: blocks that a client on this machine reads from the disk tier's files by itself.

An engine whose pages are blocks as they are stored spares the copy from the arena so, and the arena the block. The node gives
away nothing: the files are this user's, and what a slot holds by now is for the reader to verify. What does not verify, and
what cannot be opened, is asked for with ``acquire``, which finds out why.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from kvstore.errors import ProtocolError
from kvstore.identity import BlockKey
from kvstore.node.arguments import Arguments, seconds_of
from kvstore.node.protocol import split_keys
from kvstore.store import Store
from kvstore.tiers.base import Medium, Slot, Tier

if TYPE_CHECKING:
    from kvstore.node.verbs import Caller, Verb

MOST_LOCATED = 1 << 16
"""Blocks remembered as read past the arena: more than an arena holds, so that it learns what it lacks."""

MOST_KEYS = 1024
"""In one request; engines ask for 128."""


def straight_verbs(store: Store) -> Mapping[str, Verb]:
    """The verbs by name. Called in the node's event loop."""
    located: dict[BlockKey, None] = {}

    def locate(caller: Caller, args: Arguments) -> Any:
        """For each key ``[file, offset, length]`` (see ``Slot``), the file as its place in ``files``, or None: acquire it.

        The second time that a block is wanted it is to be acquired, so that it is in memory for the third; and so is one that
        is in memory, or that the bucket lacks, which is offered what goes through the arena.
        """
        files: dict[str, int] = {}
        slots: list[list[int] | None] = []
        for key in _keys(args):
            slot = None if key in store.host.keys() or key in located else on_disk(key)
            if slot is None:
                slots.append(None)
                continue
            located[key] = None
            slots.append([files.setdefault(slot.path, len(files)), slot.offset, slot.length])
        while len(located) > MOST_LOCATED:
            del located[next(iter(located))]
        return {"files": list(files), "slots": slots}

    def was_read(caller: Caller, args: Arguments) -> None:
        """These blocks were read where ``locate`` said, all together in ``seconds``: the planner learns how fast the disk is."""
        keys, seconds = _keys(args), seconds_of(args, "seconds")
        lengths = [stat.length for tier in of(Medium.DISK) for key in keys if (stat := tier.stat(key)) is not None]
        if lengths and seconds:
            store.metrics.delivered.labels(Medium.DISK.value).inc(len(lengths))
            store.promoter.meters[Medium.DISK].observe(sum(lengths), seconds)

    def on_disk(key: BlockKey) -> Slot | None:
        if any(key not in bucket.keys() for bucket in of(Medium.OBJECT)):
            return None
        return next((slot for disk in of(Medium.DISK) if (slot := disk.locate(key)) is not None), None)

    def of(medium: Medium) -> list[Tier]:
        return [tier for tier in store.tiers if tier.medium is medium]

    return {"locate": locate, "was_read": was_read}


def _keys(args: Arguments) -> list[BlockKey]:
    keys = split_keys(args.get("keys"))
    if len(keys) > MOST_KEYS:
        raise ProtocolError(f"keys must be at most {MOST_KEYS}")
    return keys
