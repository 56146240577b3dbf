"""What a client may ask of a node, and what it gets back.

A save is ``reserve`` → write the payload to the slots → ``commit``; a load is ``acquire`` → read the payload from the slots
→ ``release``. Leases and reservations belong to the connection: they fall when it closes. Until then a slot handed out is
never used for anything else, however long the client takes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Protocol

from kvstore.errors import DeadlineExceeded, KVStoreError
from kvstore.identity import BlockKey, Keyring, Namespace
from kvstore.node.arena import Arena
from kvstore.policy.planner import Patience, Reason
from kvstore.tiers.base import Medium

PROTOCOL_VERSION = 1


@dataclass(frozen=True, slots=True)
class Lookup:
    """The longest usable prefix."""

    blocks: int
    """How many consecutive blocks, from the first one asked for, some tier holds."""
    runs: tuple[tuple[Medium, int], ...] = ()
    """Where they are, as (medium, number of blocks) in chain order."""
    seconds: float = 0.0
    """Estimated time until all of them are in the arena; 0 for blocks that are there."""
    plan: Plan | None = None
    """What to load of them, if a plan was asked for."""

    def first(self, blocks: int) -> Lookup:
        """The same of the first ``blocks`` at most."""
        left, runs = blocks, []
        for medium, count in self.runs:
            if left > 0:
                runs.append((medium, min(count, left)))
            left -= count
        return replace(self, blocks=min(self.blocks, blocks), runs=tuple(runs))


@dataclass(frozen=True, slots=True)
class Plan:
    """How much of what was found an engine should load."""

    blocks: int
    """From the first one on; the engine computes what is behind them."""
    reason: Reason
    patience: Patience
    """How long the load may take before the engine computes what has not come."""


@dataclass(frozen=True, slots=True)
class Report:
    """What an engine tells of itself, so that loads can be planned and prompts be judged."""

    steps: Sequence[tuple[int, float, float]] = ()
    """Per engine step: tokens computed, pairs of tokens that attention looked at (``policy.prefill.attention``), seconds."""
    loads: Sequence[tuple[int, float]] = ()
    """Per load of blocks that were all in the arena: bytes, seconds."""
    answered: Sequence[tuple[Sequence[BlockKey], int]] = ()
    """Per finished request: its chain, tokens of the answer."""


@dataclass(frozen=True, slots=True)
class About:
    """What a node may remember of a request, so that its misses can be explained."""

    request: str
    """Its id; of a longer one the first 128 characters."""
    seed: bytes = b""
    """First parent of its chain, when that is not empty."""
    lora: str = ""
    """Digest of its LoRA adapter."""


@dataclass(frozen=True, slots=True)
class Description:
    """What a connector tells of a prompt when its operator asked for it. The node keeps it in memory only, for a while."""

    tokens: int
    """Of the prompt."""
    starts: bytes = b""
    """Pieces of its content (``kvstore.policy.content``): first token of each, little-endian u32."""
    hashes: bytes = b""
    """Keyed hash of each piece, little-endian u64."""
    head: tuple[int, ...] = ()
    """The first token ids, at most 256."""
    tail: tuple[int, ...] = ()
    """The last token ids, at most 256."""


class Miss(Enum):
    """Why a block was not delivered, or not taken."""

    NOT_STORED = "not_stored"
    CORRUPT = "corrupt"
    DEADLINE = "deadline"
    UNAVAILABLE = "unavailable"
    NO_ROOM = "no_room"
    PRESENT = "present"
    """Saves only: somebody stored or is storing it; there is nothing to do."""

    @classmethod
    def of(cls, error: KVStoreError) -> Miss:
        """How a call to the node that raised this counts."""
        return cls.DEADLINE if isinstance(error, DeadlineExceeded) else cls.UNAVAILABLE


@dataclass(frozen=True, slots=True)
class Acquired:
    """Leased slots of a prefix of the keys asked for."""

    arena: Arena
    offsets: tuple[int, ...]
    """Arena offset of each delivered block's payload, in the order asked for; may be shorter than what was asked."""
    media: tuple[Medium, ...]
    """Which tier each delivered block came from."""
    miss: Miss | None = None
    """Why delivery stopped, if it did."""


@dataclass(frozen=True, slots=True)
class NewBlock:
    """A block about to be saved."""

    key: BlockKey
    parent: BlockKey
    index: int
    """Position in its chain, from 0."""


@dataclass(frozen=True, slots=True)
class Reserved:
    """Where to write the blocks that are wanted."""

    arena: Arena
    offsets: tuple[int | None, ...]
    """Arena offset for each block's payload; None: do not write it, see ``misses``."""
    misses: dict[int, Miss]
    """By position, why a block is not to be written: PRESENT or NO_ROOM."""


class NodeClient(Protocol):
    """The synchronous client, thread-safe. Implemented by ``kvstore.Client``; ``kvstore.testing`` has an in-process one.

    Every call raises NodeUnavailable or DeadlineExceeded when the node is gone or late. After NodeUnavailable the next call
    reconnects (see ``client.RECONNECT_SECONDS``); a restarted node has another ``epoch`` and another arena, and all
    earlier offsets are void (the old mapping stays readable while an ``Arena`` refers to it, so a late copy does no harm).
    """

    @property
    def epoch(self) -> int:
        """Identity of the node's run; changes when it restarts. 0 before the first contact."""

    def open_namespace(self, namespace: Namespace, block_bytes: int) -> Keyring:
        """Register a namespace and its payload size; survives reconnects. Returns the keyring for its block keys."""

    def lookup(
        self,
        keys: Sequence[BlockKey],
        start: int = 0,
        timeout: float = 0.05,
        about: About | None = None,
        waiting: int | None = None,
        states: int = 0,
    ) -> Lookup:
        """Longest usable prefix of ``keys[start:]``. ``keys`` is the whole chain, so that all of it counts as used.

        ``waiting`` asks for a plan: how many requests of the engine wait to be computed, this one left out. ``states``: how many
        of the last keys hold no tokens of their own; the plan is about the others.
        """

    def holds(self, keys: Sequence[BlockKey], timeout: float = 0.05, namespace: Namespace | None = None) -> list[bool]:
        """Which blocks some tier holds, each by itself. With an opened namespace they count, in order, as a prompt of it."""

    def report(self, report: Report) -> None:
        """Tell the node how fast the engine is and how long its answers were. Waits for no answer, never raises."""

    def describe(self, about: About, description: Description, timeout: float = 1.0) -> None:
        """Tell what a prompt consists of; for reports only, so nobody should wait for it."""

    def acquire(self, keys: Sequence[BlockKey], timeout: float) -> Acquired:
        """Bring a prefix of ``keys`` to the arena and lease it. At the deadline, what has arrived is the answer."""

    def release(self, keys: Sequence[BlockKey]) -> None:
        """Return leases; one call for each acquire."""

    def reserve(
        self, namespace: Namespace, blocks: Sequence[NewBlock], part: int = 0, parts: int = 1, timeout: float = 1.0
    ) -> Reserved:
        """Ask for slots to write. With ``parts`` > 1, that many clients (TP ranks) write their share of the same slot."""

    def commit(
        self, keys: Sequence[BlockKey], part: int = 0, durable: Medium = Medium.HOST, timeout: float = 10.0
    ) -> tuple[BlockKey, ...]:
        """Publish reserved blocks, whole once every part has committed.

        Returns the keys that reached ``durable`` in time (with HOST: those published; they do not outlive the node).
        """

    def abort(self, keys: Sequence[BlockKey]) -> None:
        """Give reservations up."""

    def close(self) -> None:
        """Drop the connection, and with it every lease and reservation."""
