"""The namespaces of one tenant, as a part of those that its node knows."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from kvstore.identity import Namespace
from kvstore.namespaces import KnownNamespace, NamespaceBook


class OwnNamespaces(NamespaceBook):
    """The node's book, for a tenant: others' namespaces are not in it, and whatever it opens is the tenant's."""

    def __init__(self, every: NamespaceBook, tenant: str, adopt: Callable[[Namespace], None]) -> None:
        """``every`` is the node's, which keeps the files; ``adopt`` is told of a namespace before a client uses it."""
        self.announce = None
        self._every = every
        self._tenant = tenant
        self._adopt = adopt

    def __iter__(self) -> Iterator[KnownNamespace]:
        return (known for known in self._every if known.fields.tenant == self._tenant)

    def get(self, digest: bytes) -> KnownNamespace | None:
        known = self._every.get(digest)
        return known if known is not None and known.fields.tenant == self._tenant else None

    def learn(self, namespace: Namespace) -> None:
        self._every.learn(namespace)

    def open(self, namespace: Namespace, block_bytes: int) -> KnownNamespace:
        known = self._every.open(namespace, block_bytes)
        self._adopt(namespace)
        return known
