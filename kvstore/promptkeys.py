"""Block keys of prompts that begin like a prompt seen lately: what is known is compared, only what is new is hashed.

A conversation sends its whole history each turn. Comparing 128k tokens with remembered ones runs at memory speed, some 30 us;
hashing them anew takes milliseconds. Prompts are kept in a radix tree over blocks, as engines keep their pages
(SGLang's ``RadixCache``): a run of blocks without a fork is one array. Tokens are compared, never hashes of them, so the keys are
those of ``chain_digests`` and ``Keyring.block_keys`` whatever was remembered.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

from kvstore.identity import DIGEST_BYTES, KEY_BYTES, Keyring, TokenIds, chain_digests

RUN_BYTES = 1024
"""A run's objects beside its arrays, about."""

_Root = tuple[bytes, int, bytes]
"""Secret, tokens of a block, seed: prompts of different ones share nothing."""


class _Run:
    """Blocks that follow each other without a fork. A root has none."""

    __slots__ = ("children", "digests", "keys", "parent", "tokens")

    def __init__(self, parent: _Run | None, tokens: TokenIds, digests: bytes, keys: bytes) -> None:
        self.parent = parent
        self.tokens = tokens
        self.digests = digests
        self.keys = keys
        self.children: dict[bytes, _Run] = {}
        """By the tokens of their first block."""

    @property
    def nbytes(self) -> int:
        return self.tokens.nbytes + len(self.digests) + len(self.keys) + RUN_BYTES


class PromptKeys:
    """Remembers prompts of any number of namespaces in a bounded number of bytes. Thread-safe: one prompt at a time."""

    def __init__(self, max_bytes: int = 64 << 20) -> None:
        """``max_bytes``: about what is kept, 5 bytes a token with blocks of 64; the prompts used longest ago go first."""
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._roots: dict[_Root, _Run] = {}
        self._recent: OrderedDict[_Run, _Root] = OrderedDict()
        """Longest unused first. A run comes after all that hang on it, so the first one is always a leaf."""
        self.nbytes = 0
        """Of what is remembered."""

    def keys(self, tokens: TokenIds | Sequence[int], block_tokens: int, keyring: Keyring, seed: bytes = b"") -> bytes:
        """Keys of every full block of ``tokens``, joined (``join_keys``): 16 bytes a block. Remembers the prompt.

        ``seed`` is the digest before the first token (``chain_seed``). Raises IdentityError as ``chain_digests`` does.
        """
        given = np.ascontiguousarray(tokens, dtype="<u4")
        if block_tokens < 1 or len(given) < block_tokens:
            return b"".join(keyring.block_keys(chain_digests(given, block_tokens, seed)))
        given = given[: len(given) // block_tokens * block_tokens]
        root = keyring.secret, block_tokens, seed
        with self._lock:
            path, known = self._walk(root, given)
            keys = b"".join(run.keys for run in path)[: known // block_tokens * KEY_BYTES]
            if known < len(given):
                path, digest = self._fork(path, known, block_tokens)
                digests = chain_digests(given[known:], block_tokens, digest or seed)
                fresh = b"".join(keyring.block_keys(digests))
                leaf = _Run(path[-1], given[known:].copy(), b"".join(digests), fresh)
                path[-1].children[given[known : known + block_tokens].tobytes()] = leaf
                self._add(leaf, root)
                path.append(leaf)
                keys += fresh
            for run in reversed(path):
                self._recent.move_to_end(run)
            while self.nbytes > self._max_bytes:
                self._forget()
        return keys

    def _walk(self, root: _Root, given: TokenIds) -> tuple[list[_Run], int]:
        """From the root to the run in which ``given`` ends or parts; how many of its tokens are known, whole blocks."""
        run = self._roots.get(root)
        if run is None:
            run = self._roots[root] = _Run(None, given[:0], b"", b"")
            self._add(run, root)
        path, known, block_tokens = [run], 0, root[1]
        while (child := run.children.get(given[known : known + block_tokens].tobytes())) is not None:
            shared = _shared(child.tokens, given[known:]) // block_tokens * block_tokens
            path.append(child)
            known += shared
            run = child
            if shared < len(child.tokens):
                break
        return path, known

    def _fork(self, path: list[_Run], known: int, block_tokens: int) -> tuple[list[_Run], bytes]:
        """Cut the last run of ``path`` where the prompt leaves it, so that another can hang there; the digest before that."""
        *before, run = path
        within = known - sum(len(each.tokens) for each in before)
        if run.parent is None or within == len(run.tokens):
            return path, run.digests[-DIGEST_BYTES:]
        blocks = within // block_tokens
        digests, keys = run.digests[: blocks * DIGEST_BYTES], run.keys[: blocks * KEY_BYTES]
        upper = _Run(run.parent, run.tokens[:within].copy(), digests, keys)
        run.parent.children[run.tokens[:block_tokens].tobytes()] = upper
        run.parent = upper
        run.tokens = run.tokens[within:].copy()
        run.digests, run.keys = run.digests[len(digests) :], run.keys[len(keys) :]
        upper.children[run.tokens[:block_tokens].tobytes()] = run
        self._recent[upper] = self._recent[run]
        self.nbytes += RUN_BYTES
        return [*before, upper], digests[-DIGEST_BYTES:]

    def _add(self, run: _Run, root: _Root) -> None:
        self._recent[run] = root
        self.nbytes += run.nbytes

    def _forget(self) -> None:
        run, root = self._recent.popitem(last=False)
        self.nbytes -= run.nbytes
        if run.parent is None:
            del self._roots[root]
        else:
            del run.parent.children[run.tokens[: root[1]].tobytes()]


def _shared(one: TokenIds, other: TokenIds) -> int:
    """Tokens at the beginning that are equal. Neither is empty."""
    least = min(len(one), len(other))
    differs = one[:least] != other[:least]
    first = int(differs.argmax())
    return first if differs[first] else least
