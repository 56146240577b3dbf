"""What prompts consist of, where connectors were told to say so: ``describe``, ``breakers`` and ``previews``.

Kept in memory only, bounded in prompts and in pieces; nothing of it is logged or written anywhere.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from kvstore.errors import ProtocolError
from kvstore.identity import DIGEST_BYTES, BlockKey
from kvstore.node.arguments import Arguments, bytes_of, integer_of, text_of
from kvstore.node.protocol import split_keys
from kvstore.policy.breakers import Prompt, find_breakers
from kvstore.policy.content import Pieces
from kvstore.requests import MAX_ID_CHARS, Asked, RecentRequests

if TYPE_CHECKING:
    from kvstore.node.verbs import Caller, Verb

MOST_PROMPTS = 512
MOST_PIECES = 1 << 18
"""Of all prompts together: 3 MB."""
MAX_PIECES = 1 << 15
MAX_PROMPT_TOKENS = 1 << 24
MAX_PREVIEW = 256
MAX_PREVIEWED = 1000


@dataclass(frozen=True, slots=True)
class _Described:
    prompt: Prompt
    head: list[int]
    tail: list[int]


class _Sample:
    """The prompts that were described last."""

    def __init__(self) -> None:
        self._described: deque[_Described] = deque()
        self._pieces = 0

    def add(self, described: _Described) -> None:
        self._described.append(described)
        self._pieces += len(described.prompt.pieces.hashes)
        while len(self._described) > MOST_PROMPTS or self._pieces > MOST_PIECES:
            self._pieces -= len(self._described.popleft().prompt.pieces.hashes)

    def prompts(self) -> list[Prompt]:
        """Those whose content is known, in the order in which they came."""
        return [described.prompt for described in self._described if len(described.prompt.pieces.hashes)]

    def previewed(self) -> list[_Described]:
        """Those of which some text is known, latest first."""
        return [described for described in reversed(self._described) if described.head]


def prompt_verbs(requests: RecentRequests) -> Mapping[str, Verb]:
    """The verbs by name. Called in the node's event loop."""
    sample = _Sample()

    def describe(caller: Caller, args: Arguments) -> None:
        """A connector tells what a request's prompt consists of; fields as in ``kvstore.node.api.Description``."""
        name = text_of(args, "request", MAX_ID_CHARS)
        seed = bytes_of(args, "seed", DIGEST_BYTES)
        context = (caller.namespace.digest if caller.namespace else b"") + seed
        sample.add(_Described(Prompt(name, _pieces(args), context), _preview(args, "head"), _preview(args, "tail")))

    async def breakers(caller: Caller, args: Arguments) -> Any:
        """Where prompts of recent traffic part early: ``kvstore.policy.breakers.Report`` as a document."""
        return asdict(await asyncio.to_thread(find_breakers, sample.prompts()))

    async def previews(caller: Caller, args: Arguments) -> Any:
        """For each of ``keys`` the first token ids of a prompt with that block, and its last ones if the block is its last;
        None where no prompt with it was described."""
        keys = split_keys(args.get("keys"))[:MAX_PREVIEWED]
        known = [
            (asked, described)
            for described in sample.previewed()
            if (asked := requests.find(described.prompt.name)) is not None
        ]
        return await asyncio.to_thread(_previews, keys, known)

    return {"describe": describe, "breakers": breakers, "previews": previews}


def _previews(keys: Sequence[BlockKey], known: Sequence[tuple[Asked, _Described]]) -> list[list[list[int]] | None]:
    found: dict[BlockKey, list[list[int]]] = {}
    wanted = set(keys)
    for asked, described in known:
        chain = asked.split()
        for key in wanted.intersection(chain):
            tail = described.tail if key == chain[-1] else []
            if key not in found or (tail and not found[key][1]):
                found[key] = [described.head, tail]
    return [found.get(key) for key in keys]


def _pieces(args: Arguments) -> Pieces:
    starts = np.frombuffer(_whole(args, "starts", 4), dtype="<u4")
    hashes = np.frombuffer(_whole(args, "hashes", 8), dtype="<u8")
    tokens = integer_of(args, "tokens", 0, MAX_PROMPT_TOKENS)
    if len(starts) != len(hashes):
        raise ProtocolError("starts and hashes must be of one length")
    if len(starts) and (starts[0] != 0 or (np.diff(starts.astype(np.int64), append=tokens) <= 0).any()):
        raise ProtocolError("starts must ascend from 0 and be below tokens")
    return Pieces(starts, hashes, tokens)


def _whole(args: Arguments, name: str, size: int) -> bytes:
    data = bytes_of(args, name, MAX_PIECES * size)
    if len(data) % size:
        raise ProtocolError(f"{name} must be a byte string of {size} bytes a piece")
    return data


def _preview(args: Arguments, name: str) -> list[int]:
    ids = args.get(name, [])
    if not isinstance(ids, list) or len(ids) > MAX_PREVIEW or not all(type(n) is int and 0 <= n < 1 << 32 for n in ids):
        raise ProtocolError(f"{name} must be at most {MAX_PREVIEW} token ids")
    return ids
