"""The namespaces a store knows, by digest, so that blocks can be shown with the model they belong to.

Kept as small JSON files in the node's directory; a block is never served because of them, only named.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import structlog

from kvstore.errors import IdentityError
from kvstore.files import replace_file
from kvstore.identity import Namespace
from kvstore.parsing import parse_json

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class KnownNamespace:
    """A namespace and the payload size of its blocks, once a client has said it."""

    fields: Namespace
    digest: bytes
    block_bytes: int | None = None


class NamespaceBook:
    """Namespaces by digest."""

    def __init__(self, directory: Path) -> None:
        """Read what earlier runs knew. Files that cannot be read are left alone and logged."""
        self.announce: Callable[[Namespace], None] | None = None
        """Called when a client opens a namespace, to tell others who share the store."""
        self._directory = directory
        self._known: dict[bytes, KnownNamespace] = {}
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        for path in directory.glob("*.json"):
            try:
                self.learn(Namespace.from_dict(parse_json(path.read_text())))
            except (OSError, ValueError, IdentityError) as error:
                log.warning("namespace not read", file=path.name, error=str(error))

    def __iter__(self) -> Iterator[KnownNamespace]:
        return iter(self._known.values())

    def get(self, digest: bytes) -> KnownNamespace | None:
        return self._known.get(digest)

    def learn(self, namespace: Namespace) -> None:
        """Remember a namespace that somebody else's blocks are in."""
        self._known.setdefault(namespace.digest, KnownNamespace(namespace, namespace.digest))

    def open(self, namespace: Namespace, block_bytes: int) -> KnownNamespace:
        """A client is about to use the namespace. Raises IdentityError when another block size is in use already."""
        known = self._known.get(namespace.digest)
        if known is not None and known.block_bytes not in (None, block_bytes):
            raise IdentityError(
                f"blocks of this namespace have {known.block_bytes} bytes, not {block_bytes}: "
                "the namespace lacks something that shapes the bytes"
            )
        self._known[namespace.digest] = KnownNamespace(namespace, namespace.digest, block_bytes)
        if self.announce is not None:
            self.announce(namespace)
        if known is None:
            self._write(namespace)
        return self._known[namespace.digest]

    def _write(self, namespace: Namespace) -> None:
        path = self._directory / f"{namespace.digest.hex()}.json"
        try:
            replace_file(path, json.dumps(namespace.to_dict()).encode())
        except OSError as error:  # it only gives blocks a name
            log.warning("namespace not written", file=path.name, error=str(error))
