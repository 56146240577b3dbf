"""Regions that all pull from all, minute by minute, on the product's learning, reports, manifests and plans."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from kvstore.demand import prefill_seconds
from kvstore.envelope import Header
from kvstore.identity import NO_PARENT, BlockKey
from kvstore.index import BlockIndex
from kvstore.policy.reuse import Traffic
from kvstore.tiers.object.hotness import HotnessSnapshot, merged
from replication.hotset import HotSet, hot_block, merge_hot_sets, raise_ancestors
from replication.manifest import HotBlock, Label, Manifest, read_trusted
from replication.planner import Limits, plan

BLOCK_BYTES = 8 << 20
BLOCK_TOKENS = 64
NAMESPACE = b"fleet".ljust(16, b".")
LABELS = {NAMESPACE: Label(NAMESPACE, "model", "tenant", BLOCK_TOKENS)}
REQUESTS = 60
"""Per region and minute."""
PROMPTS = 400
"""That all regions ask for, by Zipf's law; each region has its own favourites."""
NEW_PROMPTS = 20
"""Of these, replaced by new ones every minute."""
SHARED = 0.5
"""Of the requests ask for such a prompt; the others are conversations that no other region will see."""
WATCHED = 3
"""Destinations that are played; all are alike."""


@dataclass(frozen=True)
class Played:
    """What reached a destination, on average over those watched."""

    offered_megabytes: float
    """Per second: listed by others and lacking here, blocks listed anew each minute counted once."""
    copied_megabytes: float
    """Per second."""
    asked_megabytes: float
    """Per second: asked for here for the first time when others had listed it. All that reads on demand would bring if
    nothing were sent ahead."""
    share: float
    """Of the expected prefill seconds of what was offered."""
    lag: float
    """Seconds from when a block was first stored anywhere until it is here: median."""
    late: float
    """The worst tenth of that."""


class Region:
    """The nodes of one region as one: they see all of its requests."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.traffic, self.index = Traffic(1 << 16), BlockIndex()
        self.random = np.random.default_rng(number)
        self.talks: list[list[BlockKey]] = []
        self.blocks: dict[BlockKey, Header] = {}
        self.secret = Ed25519PrivateKey.generate()

    def minute(self, minute: int) -> None:
        for second in np.sort(self.random.uniform(0, 60, REQUESTS)).tolist():
            chain = self.shared(minute) if self.random.random() < SHARED else self.talk()
            self.serve(chain, minute * 60 + second)

    def shared(self, minute: int) -> list[BlockKey]:
        rank = (int(self.random.zipf(1.2)) + self.number * 7) % PROMPTS
        prompt = minute * NEW_PROMPTS + rank
        return [key_of(prompt, position) for position in range(5 + prompt * 31 % 36)]

    def talk(self) -> list[BlockKey]:
        if self.talks and self.random.random() < 0.6:
            talk = self.talks[-1 - int(self.random.integers(0, min(20, len(self.talks))))]
        else:
            talk = []
            self.talks.append(talk)
        talk += [BlockKey(self.random.bytes(16)) for _ in range(int(self.random.integers(2, 12)))]
        return talk

    def serve(self, chain: list[BlockKey], now: float) -> None:
        self.traffic.observe(chain, now)
        self.index.touch(chain, now)
        for position, key in enumerate(chain):
            if key not in self.blocks:
                above = chain[position - 1] if position else NO_PARENT
                self.blocks[key] = Header(
                    key=key, namespace=NAMESPACE, parent=above, index=position, tokens=BLOCK_TOKENS,
                    length=BLOCK_BYTES, crc=0, created=now,
                )  # fmt: skip
                self.index.add(self.blocks[key], 0, now)

    def published(self, now: float) -> Manifest:
        """The manifest as another region reads it."""
        report = HotnessSnapshot.learnt(self.traffic, self.index, now, prefill_seconds)
        scores = merged([HotnessSnapshot.unpack(report.pack())], now)
        blocks = [hot_block(header) for header in self.blocks.values()]
        raise_ancestors(blocks, scores)
        ranked = [replace(block, score=scores.get(block.key, 0.0)) for block in blocks]
        manifest = Manifest(region=f"r{self.number}", sequence=int(now), published=now, labels=LABELS, blocks=ranked)
        return read_trusted(manifest.sealed(self.secret))


class Fleet:
    def __init__(self, regions: int, link_bytes_per_second: float) -> None:
        self.regions = [Region(number) for number in range(regions)]
        self.link = link_bytes_per_second

    def play(self, minutes: int) -> Played:
        watched = self.regions[:WATCHED]
        held: list[set[BlockKey]] = [set() for _ in watched]
        offered: list[dict[BlockKey, float]] = [{} for _ in watched]
        copied: list[dict[BlockKey, float]] = [{} for _ in watched]
        listed: list[set[BlockKey]] = [set() for _ in watched]
        asked = 0
        lags: list[float] = []
        for minute in range(minutes):
            known = [len(region.blocks) for region in watched]
            for region in self.regions:
                region.minute(minute)
            for region, before, others in zip(watched, known, listed, strict=True):
                asked += sum(key in others for key in islice(region.blocks, before, None))
            now = (minute + 1) * 60.0
            manifests = [region.published(now) for region in self.regions]
            for place, region in enumerate(watched):
                held[place] |= region.blocks.keys()
                lists = [HotSet(m.blocks, m.labels) for m in manifests if m.region != f"r{region.number}"]
                hot = merge_hot_sets(lists, Everything())
                listed[place] = {block.key for block in hot.blocks}
                created = first_stored(lists)
                for block in hot.blocks:
                    if block.key not in held[place]:
                        best = max(block.score, offered[place].get(block.key, 0.0))
                        offered[place][block.key] = best
                chosen = plan(hot.blocks, hot.labels, held[place], Limits(copied_bytes=int(self.link * 60)))
                sent = 0
                for block in chosen.blocks:
                    sent += block.nbytes
                    lags.append(now + sent / self.link - created[block.key])
                    copied[place][block.key] = offered[place][block.key]
                held[place].update(block.key for block in chosen.blocks)
        seconds = minutes * 60 * len(watched)
        return Played(
            offered_megabytes=sum(map(len, offered)) * BLOCK_BYTES / 1e6 / seconds,
            copied_megabytes=sum(map(len, copied)) * BLOCK_BYTES / 1e6 / seconds,
            asked_megabytes=asked * BLOCK_BYTES / 1e6 / seconds,
            share=sum(sum(one.values()) for one in copied) / max(sum(sum(one.values()) for one in offered), 1e-9),
            lag=float(np.median(lags)),
            late=float(np.quantile(lags, 0.9)),
        )


class Everything:
    """Contains whatever is asked for."""

    def __contains__(self, key: object) -> bool:
        return True


def first_stored(lists: list[HotSet]) -> dict[BlockKey, float]:
    created: dict[BlockKey, float] = {}
    for block in blocks_of(lists):
        created[block.key] = min(block.created, created.get(block.key, block.created))
    return created


def blocks_of(lists: list[HotSet]) -> Iterator[HotBlock]:
    for one in lists:
        yield from one.blocks


def key_of(prompt: int, position: int) -> BlockKey:
    """Of a prompt that all regions know."""
    return BlockKey(np.random.default_rng((prompt, position)).bytes(16))
