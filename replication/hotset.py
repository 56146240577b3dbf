"""What is hot in a bucket, found from the bucket alone, or quicker with its catalog.

Scores come from what nodes report to the catalog, or leave in the bucket (``hotness/``); a block is at least as hot as what
continues it. While no report names a block of the bucket, the blocks stored last count as the hottest: 1 for a block stored
now, half of it for each day since. Parents and times of creation come from the blocks' headers; those that the catalog knows,
or an earlier manifest listed, are not read again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Container, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import structlog

from kvstore.catalog.base import Entry
from kvstore.envelope import HEADER_BYTES, Header
from kvstore.errors import BlockCorrupt, BlockTooLarge, IdentityError
from kvstore.identity import NO_PARENT, BlockKey, Namespace
from kvstore.parsing import parse_json
from kvstore.tiers.object.hotness import merged
from kvstore.tiers.object.names import (
    NAMESPACES,
    block_name,
    namespace_name,
    parse_namespace_name,
)
from kvstore.tiers.object.objects import Found
from kvstore.tombstones import buried
from replication.contents import Contents
from replication.links import Links
from replication.manifest import (
    BLOCK_BYTES,
    MAX_MANIFEST_BYTES,
    HotBlock,
    Label,
    Manifest,
    ManifestRefused,
    read_trusted,
)
from replication.names import MANIFESTS, manifest_name

T = TypeVar("T")

log = structlog.get_logger(__name__)

MOST_BLOCKS = (MAX_MANIFEST_BYTES * 3 // 4) // BLOCK_BYTES
"""Of a hot set; the rest of a manifest is for namespaces and tombstones."""
RECENCY_HALF_LIFE = 86_400.0
MAX_SMALL_BYTES = 64 << 10
"""Bound of an object with text in it."""
READS_AT_ONCE = 1024
CLOCK_MARGIN_SECONDS = 300.0
"""Clocks of buckets and machines may differ by so much; within it, a block's own header decides."""


@dataclass(frozen=True, slots=True)
class HotSet:
    """Hot blocks, parents first, and the names of their namespaces."""

    blocks: Sequence[HotBlock]
    labels: Mapping[bytes, Label]


async def read_namespaces(bucket: Links) -> dict[bytes, Namespace]:
    """Namespaces that were written down, by digest. Raises TierUnavailable."""

    def parse(found: Found, body: bytes) -> Namespace:
        namespace = Namespace.from_dict(parse_json(body))
        if namespace.digest != parse_namespace_name(found.name):
            raise IdentityError("its digest is not its name")
        return namespace

    return {namespace.digest: namespace for namespace in await _read_all(bucket, NAMESPACES, MAX_SMALL_BYTES, parse)}


def label_of(namespace: Namespace) -> Label:
    return Label(namespace.digest, namespace.model, namespace.tenant, namespace.block_tokens)


async def kept_manifest(bucket: Links, region: str) -> Manifest | None:
    """The manifest of ``region`` that lies in a bucket of ours; None when there is none that can be read."""
    try:
        raw = await bucket.read(manifest_name(region), MAX_MANIFEST_BYTES)
        return None if raw is None else read_trusted(raw)
    except (ManifestRefused, BlockTooLarge) as error:
        log.warning("unreadable manifest", region=region, error=str(error))
        return None


async def kept_manifests(bucket: Links) -> list[Manifest]:
    """Those of this region and of all that it pulls from. Raises TierUnavailable."""
    found = await bucket.listing(MANIFESTS)
    return [m for one in found if (m := await kept_manifest(bucket, one.name.split("/")[1])) is not None]


async def find_hot_set(contents: Contents, previous: Manifest | None, now: float, most: int = MOST_BLOCKS) -> HotSet:
    """The hottest blocks that can be used: whole chains, at most ``most`` blocks.

    The region's ``previous`` manifest spares reading the headers of blocks that are as they were. Raises TierUnavailable.
    """
    held = await contents.blocks()
    namespaces = await read_namespaces(contents.bucket)
    snapshots = await contents.reports()
    scores = {key: score for key, score in merged(snapshots, now).items() if key in held}
    if not scores:
        scores = {k: 0.5 ** (max(0.0, now - block.stored) / RECENCY_HALF_LIFE) for k, block in held.items()}
    hottest = sorted(scores, key=lambda key: -scores[key])[:most]
    found = _unchanged(previous, held) if previous else {}
    await _read_chains(contents.bucket, held, found, hottest)
    chosen: dict[BlockKey, HotBlock] = {}
    for key in hottest:
        path = _path(key, found, chosen)
        if path is not None and len(chosen) + len(path) <= most:
            chosen.update((block.key, block) for block in path)
    raise_ancestors(list(chosen.values()), scores)
    blocks = [replace(b, score=scores[b.key]) for b in chosen.values() if b.namespace in namespaces]
    used = {block.namespace for block in blocks}
    return HotSet(blocks, {digest: label_of(namespaces[digest]) for digest in used})


def raise_ancestors(blocks: Sequence[HotBlock], scores: MutableMapping[BlockKey, float]) -> None:
    """What is continued is at least as hot as what continues it. ``blocks``: parents first."""
    for block in reversed(blocks):
        if (score := scores.get(block.key, 0.0)) > scores.get(block.parent, 0.0):
            scores[block.parent] = score


async def usual_hot_set(contents: Contents, now: float) -> HotSet:
    """What a node here should be warm with: the manifests in the bucket, of this region and of those it pulls from.

    Without a manifest, what ``find_hot_set`` finds. Only blocks that the bucket has, and none that are dead. Raises
    TierUnavailable.
    """
    bucket = contents.bucket
    if manifests := await kept_manifests(bucket):
        held = await contents.blocks()
        hot = merge_hot_sets([HotSet(m.blocks, m.labels) for m in manifests], held.keys())
    else:
        hot = await find_hot_set(contents, None, now)
    dead = buried(hot.blocks, hot.labels, await contents.tombstones())
    return HotSet([block for block in hot.blocks if block.key not in dead], hot.labels)


def merge_hot_sets(sets: Iterable[HotSet], held: Container[BlockKey]) -> HotSet:
    """All blocks of the sets that are ``held``, parents first, each with its highest score."""
    blocks: dict[BlockKey, HotBlock] = {}
    labels: dict[bytes, Label] = {}
    for one in sets:
        labels.update(one.labels)
        for block in one.blocks:
            known = blocks.get(block.key)
            if block.key in held and (known is None or known.score < block.score):
                blocks[block.key] = block
    return HotSet(list(blocks.values()), labels)


async def read_headers(bucket: Links, blocks: Mapping[BlockKey, Entry]) -> dict[BlockKey, Header]:
    """Headers of listed blocks; of those that are gone or damaged, none. Raises TierUnavailable."""

    async def read(key: BlockKey, entry: Entry) -> Header | None:
        start = await bucket.start_of(block_name(entry.namespace, key), HEADER_BYTES)
        try:
            header = Header.unpack(start or b"")
        except BlockCorrupt:
            return None
        size = entry.envelope_bytes
        sound = header.key == key and header.namespace == entry.namespace and header.envelope_bytes == size
        return header if sound else None

    headers: dict[BlockKey, Header] = {}
    wanted = list(blocks.items())
    for start in range(0, len(wanted), READS_AT_ONCE):
        batch = wanted[start : start + READS_AT_ONCE]
        read_now = await asyncio.gather(*(read(key, entry) for key, entry in batch))
        headers.update((header.key, header) for header in read_now if header is not None)
    return headers


def hot_block(header: Header, score: float = 0.0) -> HotBlock:
    return HotBlock(header.key, header.parent, header.namespace, header.length, header.created, score)


async def describe(bucket: Links, blocks: Mapping[BlockKey, Entry]) -> dict[BlockKey, HotBlock]:
    """Parent and time of creation of blocks: as the catalog knows them, else from their headers; without a score.

    The catalog knows seconds, which is enough for tombstones: they end with one. Raises TierUnavailable.
    """
    unknown = {key: entry for key, entry in blocks.items() if not entry.tokens}
    known = {key: hot_block(entry.header) for key, entry in blocks.items() if entry.tokens}
    return known | {key: hot_block(header) for key, header in (await read_headers(bucket, unknown)).items()}


def parents_first(blocks: Mapping[BlockKey, HotBlock]) -> list[HotBlock]:
    """All blocks, each after its parent if that is among them."""
    ordered: dict[BlockKey, HotBlock] = {}
    for block in blocks.values():
        path: list[HotBlock] = []
        above: HotBlock | None = block
        while above is not None and above.key not in ordered and len(path) <= len(blocks):
            path.append(above)
            above = blocks.get(above.parent)
        ordered.update((one.key, one) for one in reversed(path))
    return list(ordered.values())


async def share_namespaces(source: Links, destination: Links, digests: Iterable[bytes]) -> None:
    """Write down in the destination what these namespaces are, so that its nodes can name them."""
    for digest in digests:
        name = namespace_name(digest)
        if await destination.head(name) is not None:
            continue
        body = await source.read(name, MAX_SMALL_BYTES)
        try:
            if body is not None and Namespace.from_dict(parse_json(body)).digest == digest:
                await destination.put(name, body, create=True)
        except (ValueError, IdentityError) as error:
            log.warning("unreadable namespace in the source", name=name, error=str(error))


def _unchanged(previous: Manifest, held: Mapping[BlockKey, Entry]) -> dict[BlockKey, HotBlock]:
    """Blocks that were not stored anew since the manifest was made, of which no more than that is known."""
    until = previous.published - CLOCK_MARGIN_SECONDS
    return {
        block.key: block
        for block in previous.blocks
        if (entry := held.get(block.key)) is not None
        and not entry.tokens
        and entry.stored < until
        and entry.envelope_bytes == block.nbytes
    }


async def _read_chains(
    bucket: Links, held: Mapping[BlockKey, Entry], found: dict[BlockKey, HotBlock], keys: Iterable[BlockKey]
) -> None:
    """Add to ``found`` the blocks named by ``keys`` and all their ancestors."""
    wanted = {key for key in keys if key not in found}
    seen = set(wanted)
    while wanted:
        described = await describe(bucket, {key: held[key] for key in wanted})
        found.update(described)
        parents = {block.parent for block in described.values()}
        wanted = {key for key in parents if key in held and key not in found and key not in seen}
        seen |= wanted


def _path(
    key: BlockKey, found: Mapping[BlockKey, HotBlock], chosen: Mapping[BlockKey, HotBlock]
) -> list[HotBlock] | None:
    """The blocks from the head of the chain, or from below a chosen one, to ``key``; None when one is missing."""
    path: list[HotBlock] = []
    while key != NO_PARENT and key not in chosen:
        block = found.get(key)
        if block is None or len(path) > len(found):
            return None
        path.append(block)
        key = block.parent
    return path[::-1]


async def _read_all(bucket: Links, folder: str, limit: int, parse: Callable[[Found, bytes], T]) -> list[T]:
    """Every object of a folder, parsed; what cannot be read is left out and logged."""

    async def read(found: Found) -> T | None:
        try:
            into = memoryview(bytearray(min(found.size, limit)))
            return await bucket.get(found.name, into, lambda found, body: parse(found, bytes(body)))
        except (ValueError, IdentityError, BlockTooLarge) as error:
            log.warning("unreadable object", name=found.name, error=str(error))
            return None

    results: list[T] = []
    listed = await bucket.listing(folder)
    for start in range(0, len(listed), READS_AT_ONCE):
        batch = await asyncio.gather(*map(read, listed[start : start + READS_AT_ONCE]))
        results += [one for one in batch if one is not None]
    return results
