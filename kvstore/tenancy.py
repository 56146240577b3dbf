"""One tenant's part of a bucket that several tenants share."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Iterable

from kvstore.envelope import Header
from kvstore.errors import BlockNotFound
from kvstore.identity import BlockKey, Namespace
from kvstore.namespaces import NamespaceBook
from kvstore.tiers.base import Tier
from kvstore.tiers.wrappers import Wrapped

ASK_AGAIN_SECONDS = 10.0
"""A namespace that nobody had written down is asked for again after so long."""
MAX_UNKNOWN = 10_000

ReadNamespace = Callable[[bytes], Awaitable[Namespace | None]]


class OneTenant(Wrapped):
    """Delivers and deletes the blocks of one tenant only, those of others being listed as they are: they count against the cap.

    Whose a block is, its namespace says; of one that this node has not met, the bucket is asked. A block of a namespace that
    is written down nowhere is nobody's.
    """

    def __init__(self, inner: Tier, tenant: str, namespaces: NamespaceBook, read: ReadNamespace) -> None:
        """``read`` gives a namespace of the bucket by its digest; it may raise TierUnavailable."""
        super().__init__(inner)
        self._tenant = tenant
        self._namespaces = namespaces
        self._read = read
        self._unknown: dict[bytes, float] = {}
        """By namespace: when to ask again."""

    async def get(self, key: BlockKey, into: memoryview) -> Header:
        await self._learn([key])
        if self._tenant_of(key) not in (self._tenant, None):
            raise BlockNotFound(key.hex())
        # A listing that names a namespace nobody knows may be wrong: reading mends it, and what is read is not delivered.
        header = await self.inner.get(key, into)
        if self._tenant_of(key) != self._tenant:
            raise BlockNotFound(key.hex())
        return header

    async def delete(self, keys: Iterable[BlockKey]) -> int:
        keys = list(keys)
        await self._learn(keys)
        return await self.inner.delete([key for key in keys if self._tenant_of(key) == self._tenant])

    def _tenant_of(self, key: BlockKey) -> str | None:
        """Whose a listed block is; None when that is written down nowhere."""
        stat = self.inner.stat(key)
        known = None if stat is None else self._namespaces.get(stat.namespace)
        return None if known is None else known.fields.tenant

    async def _learn(self, keys: Iterable[BlockKey]) -> None:
        """Ask for the namespaces of blocks that are not known yet."""
        stats = [stat for key in keys if (stat := self.inner.stat(key)) is not None]
        for digest in {stat.namespace for stat in stats}:
            now = time.monotonic()
            if self._namespaces.get(digest) is not None or self._unknown.get(digest, now) > now:
                continue
            if (namespace := await self._read(digest)) is not None:
                self._namespaces.learn(namespace)
            elif len(self._unknown) < MAX_UNKNOWN:
                self._unknown[digest] = now + ASK_AGAIN_SECONDS
