"""Which chain an operator means: a request's, a prompt's by its tokens, or the one that ends in a block."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import numpy as np

from kvstore.errors import BlockNotFound, IdentityError, ProtocolError
from kvstore.identity import NO_PARENT, BlockKey, TokenIds, chain_digests, chain_seed
from kvstore.namespaces import KnownNamespace, NamespaceBook
from kvstore.node.arguments import Arguments, bytes_of, digest_of, text_of
from kvstore.requests import MAX_ID_CHARS, Asked, RecentRequests
from kvstore.store import Store

MAX_TOKENS = 1 << 19
MAX_NAME = 512

STEPS_AT_ONCE = 256
"""Blocks of a chain that are walked between two pauses: about 1 ms of the event loop."""


@dataclass(frozen=True, slots=True)
class Chain:
    """Blocks from the head of a prompt on, and how they were named."""

    keys: list[BlockKey]
    namespace: KnownNamespace | None
    """None when it is not known here."""
    asked: Asked | None = None
    """The request, when it was named by its id."""
    tokens: TokenIds | None = None
    """The prompt, when it was named by its tokens."""
    seed: bytes = b""


class Chains:
    """Finds chains. Called in the node's event loop."""

    def __init__(self, store: Store, namespaces: NamespaceBook, requests: RecentRequests, secret: bytes) -> None:
        self.requests = requests
        self._store = store
        self._namespaces = namespaces
        self._secret = secret

    async def named(self, args: Arguments) -> Chain:
        """The chain that a request's arguments name: by ``request`` (an id or the start of one), by ``key``, or by ``tokens``
        (little-endian u32) with ``namespace`` and, where the engine used them, ``cache_salt`` and ``lora`` (the adapter's
        digest). Raises ProtocolError, BlockNotFound, IdentityError.
        """
        if "request" in args:
            name = text_of(args, "request", MAX_ID_CHARS)
            asked = self.requests.find(name)
            if asked is None:
                raise BlockNotFound(
                    f"request {name!r} is not among the {len(self.requests)} that this node remembers: give its prompt instead"
                )
            return Chain(asked.split(), self._namespaces.get(asked.namespace), asked)
        if "key" in args:
            return await self._ending_in(BlockKey(digest_of(args, "key")))
        data = bytes_of(args, "tokens", 4 * MAX_TOKENS)
        if not data or len(data) % 4:
            raise ProtocolError("name a chain by request, by key, or by tokens of 4 bytes each")
        tokens = np.frombuffer(data, dtype="<u4")
        known = self._namespaces.get(digest_of(args, "namespace"))
        if known is None:
            raise ProtocolError("namespace is not one that this node knows")
        seed = chain_seed(cache_salt=text_of(args, "cache_salt", MAX_NAME), lora=text_of(args, "lora", MAX_NAME))
        return Chain(await self.keys(tokens, known, seed), known, None, tokens, seed)

    async def keys(self, tokens: TokenIds, known: KnownNamespace, seed: bytes) -> list[BlockKey]:
        """Keys of a prompt's whole blocks in a namespace of this node's tenant. In a thread: long prompts take milliseconds."""

        def derive() -> list[BlockKey]:
            digests = chain_digests(tokens, known.fields.block_tokens, seed)
            return known.fields.keyring(self._secret).block_keys(digests)

        return await asyncio.to_thread(derive)

    async def _ending_in(self, key: BlockKey) -> Chain:
        chain, namespace = [key], b""
        while chain[-1] != NO_PARENT:
            if len(chain) % STEPS_AT_ONCE == 0:
                await asyncio.sleep(0)
            stats = (tier.stat(chain[-1]) for tier in self._store.tiers)
            known = next((stat for stat in stats if stat is not None and stat.tokens), None)
            if known is None:
                break  # only the end of the chain is here
            parent = known.parent or NO_PARENT
            if parent in chain[:1] or len(chain) > MAX_TOKENS:
                raise IdentityError(f"the blocks before {key.hex()} do not end in a prompt's beginning")
            namespace = known.namespace
            chain.append(parent)
        if len(chain) == 1 and not any(key in tier.keys() for tier in self._store.tiers):
            raise BlockNotFound(f"no tier of the node holds {key.hex()}")
        chain.reverse()
        return Chain(chain[1:] if chain[0] == NO_PARENT else chain, self._namespaces.get(namespace))
