"""Documents beside the blocks: which models their namespaces belong to, and what the nodes' engines ask for most."""

from __future__ import annotations

import asyncio
import json

import structlog

from kvstore.errors import BlockTooLarge, IdentityError
from kvstore.identity import Namespace
from kvstore.parsing import parse_json
from kvstore.tiers.object.hotness import HotnessSnapshot
from kvstore.tiers.object.names import NAMESPACES, hotness_name, namespace_name, parse_namespace_name
from kvstore.tiers.object.objects import Objects

log = structlog.get_logger(__name__)

MAX_NAMESPACES = 10_000
MAX_NAMESPACE_BYTES = 64 << 10


async def write_namespace(objects: Objects, namespace: Namespace) -> None:
    """Write a namespace's fields down as JSON. Raises TierUnavailable."""
    body = json.dumps(namespace.to_dict(), indent=1).encode()
    await objects.put(namespace_name(namespace.digest), body, create=False)


async def read_namespaces(objects: Objects) -> dict[bytes, Namespace]:
    """Namespaces that were written down, by digest; unreadable ones are left out. Raises TierUnavailable."""
    known: dict[bytes, Namespace] = {}
    async for page in objects.walk(NAMESPACES):
        for found in page:
            digest = parse_namespace_name(found.name)
            if digest is None or found.size > MAX_NAMESPACE_BYTES or len(known) >= MAX_NAMESPACES:
                continue
            if (namespace := await read_namespace(objects, digest)) is not None:
                known[digest] = namespace
    return known


async def read_namespace(objects: Objects, digest: bytes) -> Namespace | None:
    """The namespace of this digest; None when it was not written down, or cannot be read. Raises TierUnavailable."""
    name = namespace_name(digest)
    try:
        body = await objects.get(name, memoryview(bytearray(MAX_NAMESPACE_BYTES)), lambda _, text: bytes(text))
        if body is None:
            return None
        namespace = Namespace.from_dict(parse_json(body))
    except (ValueError, IdentityError, BlockTooLarge) as error:
        log.warning("unreadable namespace", name=name, error=str(error))
        return None
    return namespace if namespace.digest == digest else None


async def write_hotness(objects: Objects, node: str, snapshot: HotnessSnapshot) -> None:
    """Replace what a node said before. Raises TierUnavailable."""
    body = await asyncio.to_thread(snapshot.pack)  # tens of milliseconds
    await objects.put(hotness_name(node), body, create=False)
