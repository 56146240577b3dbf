"""LMCache's chunks as blocks: which namespace and which key.

An LMCache key is the text ``model@kv_rank@group@hash[@salt]``. It says nothing of dtype, revision or layout, so these come from
the options, and the size of the chunk is part of the namespace: a reader that expects another size can only miss.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from functools import partial
from typing import TypeVar

from connectors.exchange import Bytes, Exchange
from connectors.lmcache.options import Options
from kvstore import tracing
from kvstore.config import default_socket
from kvstore.errors import IdentityError, KVStoreError
from kvstore.identity import Namespace
from kvstore.node.client import Client
from kvstore.node.launch import launch

LAYOUT = "opaque:lmcache:"
"""Followed by the chunk's bytes."""
MAX_SIZES = 8
"""Chunk sizes of one model and group. More would mean sizes that vary, as with a compressing serde, which has no namespace."""
LEASED_SHARE = 0.25
"""Of the node's host memory that lookups may hold: the rest is for saves and other engines."""
ASK_SECONDS = 1.0
"""How often a node is asked which sizes it knows of a group that this process has not moved yet."""

Group = tuple[str, int]
"""Model name and LMCache's object group."""

T = TypeVar("T")
G = TypeVar("G", bound=Hashable)


def group_of(key: str) -> Group:
    """The part of a key that decides the namespace. Raises IdentityError."""
    parts = key.split("@")
    try:
        model, _, group = parts[0], int(parts[1], 16), int(parts[2], 16)
    except (IndexError, ValueError):
        raise IdentityError(f"{key!r} is not a key of LMCache (model@rank@group@hash)") from None
    return model, group


class Chunks:
    """Chunks by LMCache's key. Thread-safe, blocking; nothing raises, see ``Exchange``."""

    def __init__(self, options: Options) -> None:
        """Raises ConfigError when traces are asked for and OpenTelemetry is not installed."""
        tracing.start("kvstore-lmcache", options.otlp_endpoint, options.trace_sample_ratio)
        self._options = options
        self._socket = options.socket or str(default_socket())
        self._lock = threading.Lock()
        self._exchanges: dict[Group, dict[int, Exchange]] = {}
        self._asked: dict[Group, float] = {}
        self._client = Client(self._socket, name="lmcache")
        self._refused: Counter[str] = Counter()
        self._leases: dict[str, list[int]] = {}
        """Bytes of each lease, by key."""
        self._leased_bytes = 0
        self._doomed: set[str] = set()
        """Leased chunks that were deleted."""

    @property
    def misses(self) -> Counter[str]:
        """Chunks not delivered or not taken, by reason, since the start."""
        with self._lock:
            exchanges = [exchange for sizes in self._exchanges.values() for exchange in sizes.values()]
            return sum((exchange.misses for exchange in exchanges), Counter(self._refused))

    def expect(self, keys: Sequence[str], sizes: Mapping[int, int]) -> None:
        """Chunks of these object groups have so many bytes: told, who has moved none yet need not find it out."""
        for group in set(map(group_of, keys)):
            if size := sizes.get(group[1]):
                self._exchange(group, size)

    def contains(self, keys: Sequence[str]) -> list[bool]:
        with tracing.span("connector lookup", blocks=len(keys)) as span:
            found = self._of_known_size(keys, Exchange.contains)
            span.set(found=sum(found))
        return found

    def lease(self, keys: Sequence[str]) -> list[bool]:
        """Bring chunks to host memory and hold them there, the first ones, as far as ``LEASED_SHARE`` goes.

        Each True owes an ``unlease``.
        """
        sizes = [exchange.block_bytes for group in set(map(group_of, keys)) for exchange in self._known(group)]
        with self._lock:
            try:
                room = int(self._client.arena.nbytes * LEASED_SHARE) - self._leased_bytes
            except KVStoreError:
                room = 0
            tried = keys[: max(room, 0) // max(sizes, default=1)]
            claimed = len(tried) * max(sizes, default=0)
            self._leased_bytes += claimed
        leased = self._of_known_size(tried, Exchange.lease)
        with self._lock:
            for key, held in zip(tried, leased, strict=True):
                if held:
                    self._leases.setdefault(key, []).append(max(sizes))
                    claimed -= max(sizes)
            self._leased_bytes -= claimed
        return leased + [False] * (len(keys) - len(tried))

    def unlease(self, keys: Sequence[str]) -> None:
        """Return one lease of each key; keys without one are ignored."""
        held, doomed = [], []
        with self._lock:
            for key in keys:
                if sizes := self._leases.get(key):
                    held.append(key)
                    self._leased_bytes -= sizes.pop()
                    if not sizes:
                        del self._leases[key]
                        if key in self._doomed:
                            self._doomed.remove(key)
                            doomed.append(key)
        for group, places in _by(held, group_of):
            for exchange in self._known(group):
                exchange.unlease([_digest(held[place]) for place in places])
        self.delete(doomed)

    def holds(self, keys: Sequence[str]) -> list[bool]:
        """Like ``contains``, but does not count as a use."""
        return self._of_known_size(keys, Exchange.holds)

    def load(self, keys: Sequence[str], buffers: Sequence[Bytes]) -> list[bool]:
        with tracing.span("connector load", blocks=len(keys)) as span:
            loaded = self._of_buffer_size(keys, buffers, Exchange.load)
            span.set(loaded=sum(loaded))
        return loaded

    def save(self, keys: Sequence[str], buffers: Sequence[Bytes]) -> list[bool]:
        with tracing.span("connector save", blocks=len(keys)) as span:
            saved = self._of_buffer_size(keys, buffers, Exchange.save)
            span.set(saved=sum(saved))
        return saved

    def delete(self, keys: Sequence[str]) -> list[bool]:
        """Delete chunks of any size, leased ones with their last lease; True unless the node did not answer."""
        with self._lock:
            leased = {key for key in keys if key in self._leases}
            self._doomed |= leased
        done = [True] * len(keys)
        for group, places in _by(keys, group_of):
            places = [place for place in places if keys[place] not in leased]
            for exchange in self._known(group):
                if places and not exchange.delete([_digest(keys[place]) for place in places]):
                    for place in places:
                        done[place] = False
        return done

    def is_healthy(self) -> bool:
        """Whether the node answers."""
        try:
            self._client.holds([], ASK_SECONDS)
        except KVStoreError:
            return False
        return True

    def close(self) -> None:
        self._client.close()
        tracing.stop()

    def _of_known_size(self, keys: Sequence[str], ask: Callable[[Exchange, Sequence[bytes]], list[bool]]) -> list[bool]:
        found = [False] * len(keys)
        for group, places in _by(keys, group_of):
            for exchange in self._known(group):
                asked = [place for place in places if not found[place]]
                if not asked:
                    break
                answers = ask(exchange, [_digest(keys[place]) for place in asked])
                for place, answer in zip(asked, answers, strict=True):
                    found[place] = answer
        return found

    def _of_buffer_size(
        self,
        keys: Sequence[str],
        buffers: Sequence[Bytes],
        move: Callable[[Exchange, Sequence[bytes], Sequence[Bytes]], list[bool]],
    ) -> list[bool]:
        moved = [False] * len(keys)
        wanted = [(group_of(key), buffer.nbytes) for key, buffer in zip(keys, buffers, strict=True)]
        for (group, nbytes), places in _by(wanted, lambda pair: pair):
            exchange = self._exchange(group, nbytes)
            if exchange is None:
                self._refused["too_many_sizes"] += len(places)
                continue
            answers = move(exchange, [_digest(keys[place]) for place in places], [buffers[place] for place in places])
            for place, answer in zip(places, answers, strict=True):
                moved[place] = answer
        return moved

    def _exchange(self, group: Group, nbytes: int) -> Exchange | None:
        with self._lock:
            sizes = self._exchanges.setdefault(group, {})
            if nbytes not in sizes:
                if len(sizes) == MAX_SIZES:
                    return None
                sizes[nbytes] = Exchange(
                    self._client,
                    self._namespace(group, nbytes),
                    nbytes,
                    self._options.load_timeout_s,
                    partial(launch, self._socket) if self._options.autostart else None,
                )
            return sizes[nbytes]

    def _known(self, group: Group) -> list[Exchange]:
        """Exchanges for every size of a group; a fresh process asks the node what others have stored."""
        with self._lock:
            known = list(self._exchanges.get(group, {}).values())
            now = time.monotonic()
            if known or now - self._asked.get(group, -ASK_SECONDS) < ASK_SECONDS:
                return known
            self._asked[group] = now
        try:
            namespaces = self._client.call("status", ASK_SECONDS)["namespaces"]
        except KVStoreError:
            return []
        for listed in namespaces:
            fields = listed["fields"]
            size = str(fields["layout"]).removeprefix(LAYOUT)
            if size.isdecimal() and Namespace.from_dict({**fields, "tenant": "default"}) == self._namespace(
                group, int(size)
            ):
                self._exchange(group, int(size))
        with self._lock:
            return list(self._exchanges.get(group, {}).values())

    def _namespace(self, group: Group, nbytes: int) -> Namespace:
        return Namespace(
            model=group[0],
            weights=self._options.weights,
            dtype=self._options.dtype,
            layers=1,
            kv_heads=1,
            head_dim=1,
            attention="opaque",
            rope="",
            block_tokens=self._options.chunk_tokens,
            layout=f"{LAYOUT}{nbytes}",
            group=group[1],
        )


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def _by(items: Sequence[T], group: Callable[[T], G]) -> Iterable[tuple[G, list[int]]]:
    """Positions of the items by group, in order."""
    groups: dict[G, list[int]] = {}
    for place, item in enumerate(items):
        groups.setdefault(group(item), []).append(place)
    return groups.items()
