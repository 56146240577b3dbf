"""Names of objects, relative to the prefix.

* ``blocks/v1/{namespace}/{first two digits of the key}/{key}``: a sealed envelope, nothing else
* ``namespaces/{namespace}.json``: the fields of a namespace
* ``quarantine/{namespace}/{key}-{microseconds}``: a block that failed verification
* ``hotness/{node}.msgpack``: what a node's engines ask for most (``kvstore.tiers.object.hotness``)
* ``tombstones/{id}.json``: what must never come back (``kvstore.tombstones``)
* ``receipts/{id}/{node}.json``: that a node has carried a tombstone out, when, and how many blocks went with it

Namespaces and keys are written as 32 hexadecimal digits.
"""

from __future__ import annotations

import re

from kvstore.identity import BlockKey

BLOCKS = "blocks/v1"
NAMESPACES = "namespaces"
QUARANTINE = "quarantine"
SCRATCH = "scratch"
HOTNESS = "hotness"
TOMBSTONES = "tombstones"
RECEIPTS = "receipts"

_BLOCK = re.compile(rf"{BLOCKS}/([0-9a-f]{{32}})/([0-9a-f]{{2}})/(\2[0-9a-f]{{30}})")
_NAMESPACE = re.compile(rf"{NAMESPACES}/([0-9a-f]{{32}})\.json")


def block_name(namespace: bytes, key: BlockKey) -> str:
    digits = key.hex()
    return f"{BLOCKS}/{namespace.hex()}/{digits[:2]}/{digits}"


def parse_block_name(name: str) -> tuple[bytes, BlockKey] | None:
    """Namespace and key, or None for an object that is no block."""
    match = _BLOCK.fullmatch(name)
    return (bytes.fromhex(match[1]), BlockKey(bytes.fromhex(match[3]))) if match else None


def namespace_name(namespace: bytes) -> str:
    return f"{NAMESPACES}/{namespace.hex()}.json"


def parse_namespace_name(name: str) -> bytes | None:
    match = _NAMESPACE.fullmatch(name)
    return bytes.fromhex(match[1]) if match else None


def quarantine_name(namespace: bytes, key: BlockKey, microseconds: int) -> str:
    return f"{QUARANTINE}/{namespace.hex()}/{key.hex()}-{microseconds}"


def hotness_name(node: str) -> str:
    """``node`` is a name of letters, digits, '.', '_' and '-'."""
    return f"{HOTNESS}/{node}.msgpack"


def tombstone_name(identity: str) -> str:
    """``identity`` as ``Tombstone.identity``."""
    return f"{TOMBSTONES}/{identity}.json"


def receipt_name(identity: str, node: str) -> str:
    """``identity`` as ``Tombstone.identity``; ``node`` as for ``hotness_name``."""
    return f"{RECEIPTS}/{identity}/{node}.json"
