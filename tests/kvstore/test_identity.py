"""Namespaces, digest chains and block keys."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.errors import IdentityError
from kvstore.identity import DIGEST_BYTES, KEY_BYTES, Namespace, chain_digests, chain_seed

NAMESPACE = Namespace(
    model="toy", weights="1", dtype="float32", layers=2, kv_heads=2, head_dim=8, attention="gqa", rope="",
    block_tokens=16, layout="opaque:test",
)  # fmt: skip
TOKENS = st.lists(st.integers(0, 2**32 - 1), max_size=100)


@given(TOKENS, st.integers(1, 20))
def test_digests_are_those_of_hashlib(tokens: list[int], block_tokens: int) -> None:
    expected, digest = [], b""
    for start in range(0, len(tokens) // block_tokens * block_tokens, block_tokens):
        block = b"".join(t.to_bytes(4, "little") for t in tokens[start : start + block_tokens])
        digest = hashlib.sha256(digest + block).digest()
        expected.append(digest)
    assert chain_digests(tokens, block_tokens) == expected
    assert chain_digests(np.array(tokens, dtype=np.uint32), block_tokens) == expected


@given(TOKENS, st.integers(1, 8), st.integers(0, 12))
def test_a_chain_can_be_continued(tokens: list[int], block_tokens: int, blocks: int) -> None:
    whole = chain_digests(tokens, block_tokens)
    head = whole[:blocks]
    rest = chain_digests(tokens[len(head) * block_tokens :], block_tokens, parent=head[-1] if head else b"")
    assert head + rest == whole


@given(st.lists(st.integers(0, 9), min_size=8, max_size=40), st.integers(0, 39))
def test_a_token_changes_its_block_and_all_after_it(tokens: list[int], position: int) -> None:
    position %= len(tokens)
    changed = [*tokens]
    changed[position] += 10
    before, after = chain_digests(tokens, 4), chain_digests(changed, 4)
    first = position // 4
    assert before[:first] == after[:first]
    assert not set(before[first:]) & set(after[first:])


def test_extra_content_and_seeds_start_other_chains() -> None:
    tokens = list(range(64))
    plain = chain_digests(tokens, 16)
    image = chain_digests(tokens, 16, extra={1: b"image"})
    assert plain[0] == image[0]
    assert not set(plain[1:]) & set(image[1:])
    assert chain_seed(salt=None, lora="") == b""
    assert len({chain_seed(salt="a"), chain_seed(lora="a"), chain_seed(salt="a", lora="b"), chain_seed(salt="ab")}) == 4
    assert not set(chain_digests(tokens, 16, parent=chain_seed(salt="a"))) & set(plain)


def test_keys_depend_on_secret_namespace_and_digest() -> None:
    digests = chain_digests(list(range(64)), 16)
    keys = {
        key
        for namespace in (NAMESPACE, replace(NAMESPACE, dtype="bfloat16"), replace(NAMESPACE, tenant="other"))
        for secret in (b"one", b"two")
        for key in namespace.keyring(secret).block_keys(digests)
    }
    assert len(keys) == 3 * 2 * len(digests)
    assert {len(key) for key in keys} == {KEY_BYTES}
    assert {len(digest) for digest in digests} == {DIGEST_BYTES}
    assert NAMESPACE.keyring(b"one").block_keys(digests) == NAMESPACE.keyring(b"one").block_keys(digests)


def test_a_keyring_does_not_show_its_secret() -> None:
    keyring = NAMESPACE.keyring(b"tenant secret")
    assert keyring.secret.hex() not in repr(keyring)
    assert repr(keyring.secret) not in repr(keyring)


def test_every_field_of_a_namespace_counts() -> None:
    digests = {NAMESPACE.digest}
    for name, value in NAMESPACE.to_dict().items():
        other = replace(NAMESPACE, **{name: value + 1 if isinstance(value, int) else value + "x"})
        assert NAMESPACE.difference(other) == {name: (value, getattr(other, name))}
        digests.add(other.digest)
    assert len(digests) == 1 + len(NAMESPACE.to_dict())
    assert Namespace.from_dict(NAMESPACE.to_dict()) == NAMESPACE


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": 0}, "layers"),
        ({"block_tokens": 1 << 20}, "block_tokens"),
        ({"model": ""}, "model"),
        ({"model": 7}, "model"),
        ({"layers": True}, "layers"),
        ({"color": "red"}, "color"),
        ({"rope": "x" * 20_000}, "longer"),
    ],
)
def test_an_impossible_namespace_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(IdentityError, match=message):
        Namespace.from_dict({**NAMESPACE.to_dict(), **change})


def test_an_incomplete_namespace_is_refused() -> None:
    with pytest.raises(IdentityError, match="incomplete"):
        Namespace.from_dict({"model": "toy"})
    with pytest.raises(IdentityError):
        Namespace.from_dict("toy")
