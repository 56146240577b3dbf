"""``explain``: for each block of a prompt its key, where it is, what it is worth, and why it is found or missed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from kvstore.demand import Demand, prefill_seconds
from kvstore.explain import Verdict, Why, at_request, difference, event_document, held, missing
from kvstore.history import Event, History
from kvstore.identity import BlockKey
from kvstore.namespaces import KnownNamespace, NamespaceBook
from kvstore.node.arguments import Arguments
from kvstore.node.chains import Chain, Chains
from kvstore.store import Store

if TYPE_CHECKING:
    from kvstore.node.verbs import Caller, Verb

MAX_BLOCKS = 4096
"""Explained in one answer, from the head of the chain: what comes behind is of use only with these."""

MAX_ELSEWHERE = 64
"""Other namespaces and seeds that a prompt is looked for in."""

_WITHIN = 3600.0


def explain_verbs(store: Store, namespaces: NamespaceBook, demand: Demand, chains: Chains) -> Mapping[str, Verb]:
    """The verbs by name. Called in the node's event loop."""

    async def explain(caller: Caller, args: Arguments) -> Any:
        """Arguments as for ``Chains.named``; the answer is a document of plain values."""
        chain = await chains.named(args)
        elsewhere = await _elsewhere(store, namespaces, chains, chain)
        keys, known = chain.keys[:MAX_BLOCKS], chain.namespace
        tiers = [(tier.medium.value, tier.keys()) for tier in store.tiers]
        places = [[medium for medium, there in tiers if key in there] for key in keys]
        withheld = [
            not where and any(tier.stat(key) for tier in store.tiers) for key, where in zip(keys, places, strict=True)
        ]
        worth = _worth(demand, keys, known.fields.block_tokens if known else 0, known.block_bytes if known else None)
        history = store.history.copy()
        owners = chains.requests.owners()
        return await asyncio.to_thread(_document, chain, elsewhere, places, withheld, worth, history, owners)

    return {"explain": explain}


async def _elsewhere(
    store: Store, namespaces: NamespaceBook, chains: Chains, chain: Chain
) -> list[tuple[KnownNamespace, str | None, int]]:
    """Other namespaces and seeds that hold a prefix of the prompt: (namespace, the seed's adapter, tokens), most first."""
    if chain.tokens is None or chain.namespace is None:
        return []
    every: list[tuple[KnownNamespace, str | None, bytes]] = [(known, None, b"") for known in namespaces]
    for used in reversed(chains.requests.seeds):
        if (owner := namespaces.get(used.namespace)) is not None:
            every.append((owner, used.lora, used.seed))
    found = []
    for known, lora, seed in every[:MAX_ELSEWHERE]:
        if (known.digest, seed) == (chain.namespace.digest, chain.seed):
            continue
        keys = await chains.keys(chain.tokens, known, seed)
        blocks = sum(count for _, count in store.peek(keys))
        if blocks:
            found.append((known, lora, blocks * known.fields.block_tokens))
    return sorted(found, key=lambda item: -item[2])


def _document(
    chain: Chain,
    elsewhere: Sequence[tuple[KnownNamespace, str | None, int]],
    places: Sequence[Sequence[str]],
    withheld: Sequence[bool],
    worth: Sequence[Mapping[str, Any]],
    history: History,
    owners_of: Callable[[Iterable[bytes]], dict[bytes, str]],
) -> Any:
    """In a thread: thousands of blocks take some 100 ms."""
    keys, asked, known = chain.keys[: len(places)], chain.asked, chain.namespace
    per_block = known.fields.block_tokens if known else 0
    events = history.of(keys)
    owners = owners_of(event.newcomer for past in events for event in past if event.newcomer)
    verdicts = _verdicts(events, places, chain)
    for index, kept_back in enumerate(withheld):
        if kept_back and verdicts[index].why in (Why.NEVER_STORED, Why.LOAD_FAILED, Why.LOST):
            verdicts[index] = Verdict(Why.WITHHELD)
    if elsewhere and elsewhere[0][2] >= per_block:
        for index in range(min(elsewhere[0][2] // per_block, len(keys))):
            if verdicts[index].why is Why.NEVER_STORED:
                verdicts[index] = Verdict(Why.OTHER_NAMESPACE)
    usable = next((at for at, verdict in enumerate(verdicts) if verdict.why is not Why.HELD), len(keys))
    return {
        "request": asked.request if asked else None,
        "client": asked.client if asked else None,
        "asked_at": asked.at if asked else None,
        "found": [asked.start, asked.found] if asked else None,
        "namespace": known.digest if known else b"",
        "fields": known.fields.to_dict() if known else {},
        "block_tokens": per_block,
        "tokens": len(chain.tokens) if chain.tokens is not None else len(chain.keys) * per_block,
        "chain_blocks": len(chain.keys),
        "usable_blocks": usable,
        "history_since": history.since,
        "elsewhere": [
            {"namespace": other.digest, "tokens": tokens, "differs": difference(known.fields, other.fields, lora)}
            for other, lora, tokens in elsewhere
            if known
        ],
        "blocks": [
            {
                "index": index,
                "key": key,
                "where": places[index],
                "why": verdicts[index].why.value,
                "detail": verdicts[index].detail(owners),
                "causes": [event_document(event, owners) for event in verdicts[index].causes],
                "events": [event_document(event, owners) for event in events[index]],
                **worth[index],
            }
            for index, key in enumerate(keys)
        ],
    }


def _verdicts(events: Sequence[Sequence[Event]], places: Sequence[Sequence[str]], chain: Chain) -> list[Verdict]:
    asked = chain.asked
    if asked is None:
        return [held(past) if where else missing(past) for past, where in zip(events, places, strict=True)]
    return [at_request(past, asked.at, index < asked.start + asked.found) for index, past in enumerate(events)]


def _worth(demand: Demand, keys: Sequence[BlockKey], per_block: int, block_bytes: int | None) -> list[dict[str, Any]]:
    """What the node expects of each block; the score is that of the prefix that ends in it."""
    now = time.time()
    if not keys:
        return []
    rows = zip(
        demand.hotness.hits(keys, now).tolist(),
        demand.traffic.sightings(keys).tolist(),
        demand.traffic.chance(keys, now, _WITHIN).tolist(),
        demand.pins.ends(keys, now),
        strict=True,
    )
    return [
        {
            "hits": hits,
            "sightings": seen,
            "chance_within_hour": chance if seen else None,
            "pinned_until": until,
            "score": hits * prefill_seconds(depth * per_block) / (depth * block_bytes) if block_bytes else None,
        }
        for depth, (hits, seen, chance, until) in enumerate(rows, start=1)
    ]
