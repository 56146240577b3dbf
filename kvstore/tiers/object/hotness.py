"""What a node tells its region of the prompts that are asked for most: one small object, overwritten now and then.

It names blocks; ancestors that it does not name are found through the blocks' headers, and are as hot as what continues them.
Scores decay with time, so snapshots of different age are brought to one moment before they are added up.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Self

import msgpack
import numpy as np
import numpy.typing as npt

from kvstore.errors import ProtocolError
from kvstore.identity import KEY_BYTES, BlockKey
from kvstore.index import BlockIndex, Rows
from kvstore.policy.hotness import Hotness
from kvstore.policy.reuse import Traffic

MAX_BLOCKS = 200_000
"""24 bytes each: 5 MB."""
MAX_SNAPSHOT_BYTES = MAX_BLOCKS * 24 + 4096

EXPECTED_WITHIN = 3600.0
"""Seconds to which rates of use are related."""
MOST_RANKED = 131_072
"""More would keep a node from its work for too long."""

_VERSION = 2


@dataclass(frozen=True, slots=True)
class HotnessSnapshot:
    """A node's hottest blocks at one time."""

    taken: float
    """Seconds since the epoch."""
    half_life: float
    """Seconds in which a score falls to half."""
    scores: Mapping[BlockKey, float]
    """Prefill seconds that a block is expected to save; never negative."""
    used: Mapping[BlockKey, float] = field(default_factory=dict)
    """When blocks among them were used last, as far as the node knows; whole seconds."""

    @classmethod
    def of(cls, hotness: Hotness, now: float, prefill_seconds: Callable[[int], float], most: int = 4096) -> Self:
        """The deepest blocks of the best ``most`` prefixes, as counted; ``prefill_seconds`` as for ``Hotness.top``."""
        chains = hotness.top(most, now, prefill_seconds)
        scores = {c.key: c.hits * c.seconds_saved / c.extent.blocks for c in chains}
        return cls(now, hotness.half_life, scores, {c.key: c.last_used for c in chains})

    @classmethod
    def learnt(
        cls,
        traffic: Traffic,
        index: BlockIndex,
        now: float,
        prefill_seconds: Callable[[int], float],
        counted: Self | None = None,
    ) -> Self:
        """The blocks of ``index`` by what is expected of them, in one go; see ``Ranking``."""
        ranking = Ranking(now, prefill_seconds)
        ranking.add(traffic, index, rankable(index))
        return cls.of_ranking(ranking, [] if counted is None else [counted])

    @classmethod
    def of_ranking(cls, ranking: Ranking, counted: Iterable[Self] = ()) -> Self:
        """Named are those that are hotter, or were used later, than what continues them: some tenth, which says the same as all.

        ``counted`` adds what is not ranked. Any thread.
        """
        keys, parts = ranking.keys(), ranking.columns()
        named = _beyond(parts.scores, parts.rows, parts.parents) | _beyond(parts.used, parts.rows, parts.parents)
        at = np.flatnonzero(named).tolist()
        scores = dict(zip((keys[i] for i in at), parts.scores[named].tolist(), strict=True))
        hits = np.flatnonzero(named & (parts.hits > 0))
        used = dict(zip((keys[i] for i in hits.tolist()), parts.used[hits].tolist(), strict=True))
        snapshot, ranked = cls(ranking.now, EXPECTED_WITHIN, scores, used), set(keys)
        for each in counted:
            others = {key: score for key, score in each.scores.items() if key not in ranked}
            snapshot = snapshot.with_more(replace(each, scores=others))
        return snapshot

    def with_more(self, other: Self) -> Self:
        """This, with blocks that only ``other`` names, and the later of both uses."""
        later = {key: max(used, self.used.get(key, 0.0)) for key, used in other.used.items()}
        return replace(self, scores={**other.scores, **self.scores}, used={**self.used, **later})

    def pack(self) -> bytes:
        """At most ``MAX_BLOCKS``; beyond, the coldest are left out."""
        hottest = sorted(self.scores.items(), key=lambda item: -item[1])[:MAX_BLOCKS]
        keys = b"".join(key for key, _ in hottest)
        scores = np.array([score for _, score in hottest], dtype="<f4").tobytes()
        used = np.array([self.used.get(key, 0.0) for key, _ in hottest]).clip(0, 0xFFFFFFFF).astype("<u4").tobytes()
        packed: bytes = msgpack.packb([_VERSION, self.taken, self.half_life, keys, scores, used])
        return packed

    @classmethod
    def unpack(cls, raw: bytes) -> HotnessSnapshot:
        """Read what another process wrote. Raises ProtocolError."""
        if len(raw) > MAX_SNAPSHOT_BYTES:
            raise ProtocolError(f"a snapshot of {len(raw)} bytes is beyond the bound of {MAX_SNAPSHOT_BYTES}")
        try:
            match msgpack.unpackb(raw):
                case [int(version), *_] if version != _VERSION:
                    raise ProtocolError(f"hotness snapshot of version {version}, not {_VERSION}")
                case [int(), float(taken), float(half_life), bytes(keys), bytes(scores), bytes(used)]:
                    values, times = np.frombuffer(scores, dtype="<f4"), np.frombuffer(used, dtype="<u4")
                case _:
                    raise ProtocolError("not a hotness snapshot")
        except (ValueError, TypeError, msgpack.UnpackException) as error:
            raise ProtocolError(f"not a hotness snapshot: {error}") from None
        sound = np.all(np.isfinite(values) & (values >= 0)) and math.isfinite(taken) and half_life > 0
        if not sound or len(keys) != KEY_BYTES * len(values) or len(times) != len(values):
            raise ProtocolError("a hotness snapshot with impossible values")
        cut = _cut(keys)
        uses = {key: float(at) for key, at in zip(cut, times.tolist(), strict=True) if at}
        return cls(taken, half_life, dict(zip(cut, values.tolist(), strict=True)), uses)


@dataclass(frozen=True, slots=True)
class _Columns:
    """Of some blocks, in one order."""

    rows: Rows
    parents: npt.NDArray[np.int32]
    """Rows of the blocks that they continue."""
    scores: npt.NDArray[np.float64]
    used: npt.NDArray[np.float64]
    hits: npt.NDArray[np.uint32]


class Ranking:
    """What is expected of an index's blocks, copied from it piece by piece: its event loop has better things to do.

    Sees what a count of hits cannot: that a conversation used once, a minute ago, will most likely go on. A block's score is
    uses within ``EXPECTED_WITHIN`` x the prefill seconds that it saves.
    """

    def __init__(self, now: float, prefill_seconds: Callable[[int], float]) -> None:
        self.now = now
        self._prefill_seconds = prefill_seconds
        self._keys: list[bytes] = []
        self._pieces: list[_Columns] = []

    def add(self, traffic: Traffic, index: BlockIndex, rows: Rows) -> None:
        """Copy what counts of these rows; those that are not used any more are left out. Some 0.4 us each."""
        rows = rows[index.location[rows] >= 0]
        keys, used, hits = index.key_bytes(rows), index.accessed[rows], index.hits[rows]
        rates = traffic.values(keys, hits, self.now - used)
        tokens = index.tokens[rows].astype(np.int64)
        before = index.depth[rows] * tokens
        saved = _each(before + tokens, self._prefill_seconds) - _each(before, self._prefill_seconds)
        self._keys.append(keys)
        self._pieces.append(_Columns(rows, index.parent_row[rows], rates * EXPECTED_WITHIN * saved, used, hits))

    def keys(self) -> list[BlockKey]:
        return _cut(b"".join(self._keys))

    def columns(self) -> _Columns:
        """Of all blocks, in the order of ``keys``."""
        names = [column.name for column in fields(_Columns)]
        return _Columns(*(np.concatenate([getattr(piece, name) for piece in self._pieces]) for name in names))


def rankable(index: BlockIndex) -> Rows:
    """Of the blocks whose place in a chain is known, the ``MOST_RANKED`` used last."""
    rows = index.used()
    rows = rows[index.tokens[rows] > 0]
    if len(rows) > MOST_RANKED:
        rows = rows[np.argpartition(-index.accessed[rows], MOST_RANKED)[:MOST_RANKED]]
    return rows


def _cut(keys: bytes) -> list[BlockKey]:
    return [BlockKey(keys[i : i + KEY_BYTES]) for i in range(0, len(keys), KEY_BYTES)]


def _each(tokens: npt.NDArray[np.int64], seconds: Callable[[int], float]) -> npt.NDArray[np.float64]:
    """``seconds`` of each number of tokens; few differ."""
    lengths, places = np.unique(tokens, return_inverse=True)
    return np.array([seconds(length) for length in lengths.tolist()], dtype=np.float64)[places]


def _beyond(values: npt.NDArray[np.float64], rows: Rows, parents: npt.NDArray[np.int32]) -> npt.NDArray[np.bool_]:
    """Which of some rows of an index have a higher value than each of these rows that continues them."""
    below = np.full(int(max(rows.max(initial=-1), parents.max(initial=-1))) + 1, -np.inf)
    inside = parents >= 0
    np.maximum.at(below, parents[inside], values[inside])
    return values > below[rows]


def merged(snapshots: Iterable[HotnessSnapshot], now: float) -> dict[BlockKey, float]:
    """Scores of all nodes together, as of ``now``."""
    total: dict[BlockKey, float] = {}
    for snapshot in snapshots:
        decay = 0.5 ** (max(0.0, now - snapshot.taken) / snapshot.half_life)
        for key, score in snapshot.scores.items():
            total[key] = total.get(key, 0.0) + score * decay
    return total
