"""Where prompts that share their text part early, and what it would bring to move what parts them behind what they share. Pure.

Prompts are compared by their pieces (``kvstore.policy.content``). Of each prompt the earlier one with most tokens in common is
found, wherever in both they stand. What the two share beyond the prefix that is common already could be loaded, too, if it
came first: the part that breaks the prefix is what lies between.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median

import numpy as np
import numpy.typing as npt

from kvstore.policy.content import Pieces

LEAST_TOKENS = 64
"""A pair of prompts that would gain less is not reported: less than one block of the default size."""

EXAMPLES = 3

NEAR = 2
"""Pieces. Where prompts part is known to so many."""

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt of recent traffic."""

    name: str
    pieces: Pieces
    context: bytes = b""
    """Prompts of unequal contexts (namespaces, adapters, salts) share nothing."""


@dataclass(frozen=True, slots=True)
class Example:
    """Two prompts that part at the breaker; token positions are those of the later and of the earlier one."""

    later: str
    earlier: str
    resumes: tuple[int, int]
    """Where the first text that they share again begins in each."""
    shareable: int


@dataclass(frozen=True, slots=True)
class Breaker:
    """A place where prompts part although they go on alike."""

    token: int
    """About where they part: the prefix in common, in whole pieces, of the median pair."""
    prompts: int
    tokens: int
    """Of these prompts, in all."""
    shareable: int
    """Tokens of them that the most alike earlier prompt has too, and that would be loaded if the breaking part came behind
    them. An upper bound where prompts are most alike to different ones: no single order serves them all."""
    breaking: int
    """Length of the part to move, in tokens: the median."""
    examples: tuple[Example, ...]


@dataclass(frozen=True, slots=True)
class Report:
    """Of ``tokens`` prompt tokens, ``by_prefix`` could be loaded as it is, ``anywhere`` were seen earlier at some position."""

    prompts: int
    tokens: int
    by_prefix: int
    anywhere: int
    breakers: tuple[Breaker, ...]
    """Most shareable tokens first."""


@dataclass(slots=True)
class _Group:
    tokens: int = 0
    shareable: int = 0
    common: list[int] = field(default_factory=list)
    breaking: list[int] = field(default_factory=list)
    examples: list[Example] = field(default_factory=list)


def find_breakers(prompts: Sequence[Prompt], least: int = LEAST_TOKENS) -> Report:
    """``prompts`` in the order in which they came. 512 prompts of 4,000 tokens take some 0.5 s."""
    groups: dict[int, _Group] = {}  # by the prefixes near the place where its prompts part
    by_prefix = anywhere = 0
    heads: set[int] = set()
    table = _Table(prompts)
    for number, prompt in enumerate(prompts):
        ids, lengths = table.ids(number), prompt.pieces.lengths
        prefixes = _prefixes(prompt.context, ids)
        known = next((at for at, prefix in enumerate(prefixes) if prefix not in heads), len(prefixes))
        heads.update(prefixes[known:])
        own = int(lengths[:known].sum())
        by_prefix += own
        anywhere += int(lengths[table.first[ids] < number].sum())
        closest, shared = table.closest(number, lengths)
        if closest is None or shared - own < least:
            continue
        common = _common(ids, table.ids(closest))
        group = _group_at(groups, [hash(prompt.context), *prefixes[:common]])
        resumes = _resumes(ids, table.ids(closest), common)
        at = int(prompt.pieces.starts[resumes[0]]), int(prompts[closest].pieces.starts[resumes[1]])
        group.tokens += prompt.pieces.tokens
        group.shareable += shared - own
        group.common.append(int(lengths[:common].sum()))
        group.breaking.append(at[0] - group.common[-1])
        group.examples.append(Example(prompt.name, prompts[closest].name, at, shared - own))
    breakers = [
        Breaker(
            token=int(median(group.common)),
            prompts=len(group.breaking),
            tokens=group.tokens,
            shareable=group.shareable,
            breaking=int(median(group.breaking)),
            examples=tuple(sorted(group.examples, key=lambda example: -example.shareable)[:EXAMPLES]),
        )
        for group in {id(group): group for group in groups.values()}.values()
    ]
    breakers.sort(key=lambda breaker: -breaker.shareable)
    total = sum(prompt.pieces.tokens for prompt in prompts)
    return Report(len(prompts), total, by_prefix, anywhere, tuple(breakers))


class _Table:
    """Which prompts have which pieces: pieces as dense numbers, and for each the prompts in order."""

    def __init__(self, prompts: Sequence[Prompt]) -> None:
        contexts = {context: at for at, context in enumerate(dict.fromkeys(prompt.context for prompt in prompts))}
        counts = [len(prompt.pieces.hashes) for prompt in prompts]
        self._ends = np.cumsum([0, *counts])
        hashes = np.concatenate([np.zeros(0, dtype=np.uint64), *(prompt.pieces.hashes for prompt in prompts)])
        context = np.repeat(np.array([contexts[prompt.context] for prompt in prompts], dtype=np.uint64), counts)
        _, self._ids = np.unique(hashes ^ (context * np.uint64(0x9E3779B97F4A7C15)), return_inverse=True)
        pairs = np.unique(self._ids * max(len(prompts), 1) + np.repeat(np.arange(len(prompts)), counts))
        self._owners: Ints = pairs % max(len(prompts), 1)
        pieces = int(self._ids.max(initial=-1)) + 1
        self._from = np.searchsorted(pairs // max(len(prompts), 1), np.arange(pieces + 1))
        self.first: Ints = self._owners[self._from[:-1]]
        """The earliest prompt that has each piece."""

    def ids(self, prompt: int) -> Ints:
        return self._ids[self._ends[prompt] : self._ends[prompt + 1]]

    def closest(self, prompt: int, lengths: Ints) -> tuple[int | None, int]:
        """The earlier prompt that has most of a prompt's tokens (the latest among equals), and how many."""
        ids, place = np.unique(self.ids(prompt), return_inverse=True)
        weights = np.bincount(place, lengths)
        start, count = self._from[ids], self._from[ids + 1] - self._from[ids]
        owners = self._owners[np.repeat(start - np.cumsum(count) + count, count) + np.arange(count.sum())]
        weights, earlier = np.repeat(weights, count), owners < prompt
        shared = np.bincount(owners[earlier], weights[earlier])
        if not len(shared) or not shared.max():
            return None, 0
        best = int(np.flatnonzero(shared == shared.max())[-1])
        return best, int(shared[best])


def _prefixes(context: bytes, ids: Ints) -> list[int]:
    """A number for each prefix, by the pieces in it."""
    prefixes, number = [], hash(context)
    for piece in ids.tolist():
        number = hash((number, piece))
        prefixes.append(number)
    return prefixes


def _group_at(groups: dict[int, _Group], path: Sequence[int]) -> _Group:
    """The group of prompts that part at the end of this path of prefixes, or near it.

    Tokens behind the place decide where the last pieces before it are cut: up to ``NEAR`` of them differ from pair to pair.
    """
    near = path[-1 - NEAR :]
    group = next((groups[prefix] for prefix in reversed(near) if prefix in groups), None)
    if group is None:
        group = _Group()
        groups.update(dict.fromkeys(near, group))
    return group


def _common(one: Ints, other: Ints) -> int:
    """Pieces at the head that are the same in both."""
    shortest = min(len(one), len(other))
    differ = np.flatnonzero(one[:shortest] != other[:shortest])
    return int(differ[0]) if len(differ) else shortest


def _resumes(later: Ints, earlier: Ints, common: int) -> tuple[int, int]:
    """The first piece behind the common ones that the other has too (there is one), in each."""
    at = common + int(np.argmax(np.isin(later[common:], earlier)))
    return at, int(np.flatnonzero(earlier == later[at])[0])
