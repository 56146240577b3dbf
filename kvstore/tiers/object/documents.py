"""Documents beside the blocks: which models their namespaces belong to, and what the nodes' engines ask for most."""

from __future__ import annotations

import json

import structlog

from kvstore.errors import IdentityError
from kvstore.identity import Namespace
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
            body = await objects.get(found.name, memoryview(bytearray(found.size)), lambda _, text: bytes(text))
            try:
                namespace = Namespace.from_dict(json.loads(body or b""))
            except (ValueError, IdentityError) as error:
                log.warning("unreadable namespace", name=found.name, error=str(error))
                continue
            if namespace.digest == digest:
                known[digest] = namespace
    return known


async def write_hotness(objects: Objects, node: str, snapshot: HotnessSnapshot) -> None:
    """Replace what a node said before. Raises TierUnavailable."""
    await objects.put(hotness_name(node), snapshot.pack(), create=False)
