"""What makes two blocks the same block: namespaces, digest chains and keyed block keys.

A block's identity is built in three steps, so that every engine meets at the same block and nobody who can list a
bucket can test whether a prompt is in it:

1. ``chain_digests``: ``digest[i] = sha256(digest[i-1] || tokens of block i as little-endian u32)``. With no seed this is
   SGLang HiCache's page hash at page size = block_tokens (``sglang/srt/mem_cache``, ``get_hash_str``), so an engine that
   hands over hashes instead of tokens arrives at the same place.
2. ``Namespace.digest``: everything besides tokens that shapes a block's bytes.
3. ``BlockKey = BLAKE2b-128(digest, key=keyring)``, where the keyring is derived from the tenant's secret and the namespace.

Keys are 128 bits. Two prompts that collide by chance need about 2^64 blocks; finding a second prompt for a given key
needs 2^128 hashes and the tenant's secret. The digest chain underneath keeps its full 256 bits.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, NewType

import msgpack
import numpy as np
import numpy.typing as npt

from kvstore.errors import IdentityError

BlockKey = NewType("BlockKey", bytes)

KEY_BYTES = 16
DIGEST_BYTES = 32
NO_PARENT = BlockKey(bytes(KEY_BYTES))
"""The parent of a chain's first block."""

MAX_BLOCK_TOKENS = 32_768

FORMAT_VERSION = 1
"""Version of the canonical byte layout; part of every namespace, so that a new one never reads an old block."""

_MAX_NAMESPACE_BYTES = 16 << 10

TokenIds = npt.NDArray[np.uint32]


@dataclass(frozen=True, slots=True, kw_only=True)
class Namespace:
    """Everything besides the tokens that shapes a block's bytes. Unequal namespaces never share a block.

    ``layout`` names the order of the bytes: a canonical axis order (``kvstore.layout``) may be shared between engines and
    TP degrees; ``opaque:<engine>...`` bytes are only ever handed back to the same kind of engine.
    """

    model: str
    weights: str
    """Digest or revision of the weights: a fine-tune under the same name is another model."""
    dtype: str
    """Type of a KV element, quantisation included: ``bfloat16``, ``float8_e4m3``..."""
    layers: int
    kv_heads: int
    """KV heads of the whole model, not of one TP rank; 1 for MLA."""
    head_dim: int
    attention: str
    """``gqa``, ``mla``, ``sliding_window:<n>``..."""
    rope: str
    """Canonical text of the rope configuration; empty without rope."""
    block_tokens: int
    layout: str
    group: int = 0
    """KV cache group of a hybrid model; 0 for all others."""
    lora: str = ""
    """Digest of the adapter, empty without one."""
    tenant: str = "default"
    format: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        for field in ("layers", "kv_heads", "head_dim", "block_tokens"):
            if getattr(self, field) < 1:
                raise IdentityError(f"namespace field {field} is {getattr(self, field)}; it must be at least 1")
        if self.block_tokens > MAX_BLOCK_TOKENS:
            raise IdentityError(
                f"namespace field block_tokens is {self.block_tokens}; it must be at most {MAX_BLOCK_TOKENS}"
            )
        if not self.model or not self.tenant:
            raise IdentityError("namespace fields model and tenant must not be empty")

    @property
    def digest(self) -> bytes:
        """16 bytes that stand for all fields."""
        return hashlib.blake2b(self.pack(), digest_size=KEY_BYTES, person=b"kvstore.ns").digest()

    def pack(self) -> bytes:
        """Canonical msgpack of the fields in name order."""
        packed: bytes = msgpack.packb(sorted(asdict(self).items()))
        return packed

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: object) -> Namespace:
        """Check and take fields that came from outside. Raises IdentityError naming the field."""
        if not isinstance(values, dict):
            raise IdentityError("a namespace is a map of fields")
        known = {f.name: f.type for f in fields(cls)}
        if unknown := sorted(str(k) for k in values.keys() - known.keys()):
            raise IdentityError(f"unknown namespace field {unknown[0]!r}")
        for name, value in values.items():
            wanted = int if known[name] == "int" else str
            if type(value) is not wanted:
                raise IdentityError(f"namespace field {name} is {value!r}; it must be {wanted.__name__}")
        try:
            namespace = cls(**values)
        except TypeError as error:
            raise IdentityError(f"incomplete namespace: {error}") from None
        if len(namespace.pack()) > _MAX_NAMESPACE_BYTES:
            raise IdentityError(f"namespace is longer than {_MAX_NAMESPACE_BYTES} bytes")
        return namespace

    def difference(self, other: Namespace) -> dict[str, tuple[Any, Any]]:
        """Fields in which the two differ, as ``{field: (mine, theirs)}``."""
        mine, theirs = asdict(self), asdict(other)
        return {name: (mine[name], theirs[name]) for name in mine if mine[name] != theirs[name]}

    def keyring(self, tenant_secret: bytes) -> Keyring:
        """Derive the key that turns this namespace's digests into block keys."""
        return Keyring(
            hashlib.blake2b(self.digest, key=tenant_secret[:64], digest_size=32, person=b"kvstore.keyring").digest()
        )


class Keyring:
    """Turns chain digests into block keys. Holds a secret that is good for one namespace of one tenant only."""

    __slots__ = ("_keyed", "secret")

    def __init__(self, secret: bytes) -> None:
        self.secret = secret
        self._keyed = hashlib.blake2b(key=secret, digest_size=KEY_BYTES)

    def __repr__(self) -> str:
        return "Keyring(...)"

    def block_keys(self, digests: Iterable[bytes]) -> list[BlockKey]:
        """Key of each digest. Copying the keyed state is cheaper than keying anew."""
        copy = self._keyed.copy
        keys = []
        for digest in digests:
            hasher = copy()
            hasher.update(digest)
            keys.append(BlockKey(hasher.digest()))
        return keys


def chain_seed(**parts: str | None) -> bytes:
    """First parent of a chain that is not shared with everybody: a cache salt, a LoRA adapter, ...

    Empty when every part is None or empty: such chains start like SGLang's.
    """
    present = sorted((name, value) for name, value in parts.items() if value)
    if not present:
        return b""
    return hashlib.sha256(b"kvstore-chain-seed-v1" + msgpack.packb(present)).digest()


def chain_digests(
    tokens: TokenIds | Sequence[int],
    block_tokens: int,
    parent: bytes = b"",
    extra: dict[int, bytes] | None = None,
) -> list[bytes]:
    """Digest of every full block of ``tokens``; a partial last block has none.

    ``parent`` is the digest before the first token (a seed, or the digest of the block before when a chain is continued).
    ``extra`` maps a block's index in ``tokens`` to bytes that its digest must also cover (multimodal content whose tokens
    are placeholders).
    """
    if block_tokens < 1:
        raise IdentityError(f"block_tokens is {block_tokens}; it must be at least 1")
    data = np.ascontiguousarray(tokens, dtype="<u4").data.cast("B")
    size = 4 * block_tokens
    sha256 = hashlib.sha256
    digests = []
    digest = parent
    for index, start in enumerate(range(0, len(data) - size + 1, size)):
        hasher = sha256(digest)
        hasher.update(data[start : start + size])
        if extra and index in extra:
            hasher.update(extra[index])
        digest = hasher.digest()
        digests.append(digest)
    return digests
