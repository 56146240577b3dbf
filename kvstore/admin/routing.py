"""What routers ask: of each prompt, which node could serve how much of it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from kvstore.admin.models.prompts import (
    LookupAnswer,
    NodeLookup,
    PeekedTier,
    Prompt,
    RoutedPrompt,
    RouterAnswer,
    RouterLookup,
    RouterPeeked,
    TierLookup,
    Unanswered,
)
from kvstore.admin.node import CALL_SECONDS, NodeView, PromptChain
from kvstore.admin.problems import Problem
from kvstore.admin.site import Site
from kvstore.errors import KVStoreError
from kvstore.identity import KEY_BYTES


async def of_node(node: NodeView, prompt: Prompt) -> LookupAnswer:
    """What one prompt would find on the node beside us. Raises Problem (404, 409) and what calls of the node raise."""
    found = await node.peek(prompt)
    return LookupAnswer.model_validate({**found, "tiers": _in_tokens(_tiers(found), found["block_tokens"])})


async def peek(node: NodeView, keys: bytes, timeout: float = CALL_SECONDS) -> list[PeekedTier]:
    """What the node beside us could serve of a chain of joined keys."""
    return _tiers(await node.peek_keys(keys, timeout))


async def lookup(site: Site, node: NodeView, wanted: RouterLookup) -> RouterAnswer:
    """Never raises for one prompt or one node: the answer says what is not known."""
    asked = await asyncio.gather(*(_asked(site, node, prompt) for prompt in wanted.prompts))
    chains = [chain.keys for chain in asked if isinstance(chain, PromptChain)]
    here, there = await asyncio.gather(
        _here(site, node, chains, wanted.timeout_seconds), site.peers.ask(chains, wanted.timeout_seconds)
    )
    answers = [*here, *there]
    told = [(url, answer) for url, answer in answers if isinstance(answer, RouterPeeked)]
    prompts, at = [], 0
    for chain in asked:
        if isinstance(chain, PromptChain):
            nodes = [
                NodeLookup(node=answer.node, url=url, tiers=_in_tokens(answer.chains[at], chain.block_tokens))
                for url, answer in told
            ]
            blocks = len(chain.keys) // KEY_BYTES
            prompts.append(RoutedPrompt(blocks=blocks, block_tokens=chain.block_tokens, nodes=nodes))
            at += 1
        else:
            prompts.append(chain)
    return RouterAnswer(prompts=prompts, unanswered=[answer for _, answer in answers if isinstance(answer, Unanswered)])


async def _asked(site: Site, node: NodeView, prompt: Prompt) -> PromptChain | RoutedPrompt:
    """The keys to ask all nodes for; or the answer, where only the node beside us can say which blocks are meant."""
    try:
        chain = await node.chain(prompt)
        if chain is not None:
            return chain
        found = await of_node(node, prompt)
    except (KVStoreError, Problem) as error:
        return RoutedPrompt(blocks=0, block_tokens=0, nodes=[], problem=str(error))
    nodes = [NodeLookup(node=site.name, url=site.url, tiers=found.tiers)]
    return RoutedPrompt(blocks=found.blocks, block_tokens=found.block_tokens, nodes=nodes)


async def _here(
    site: Site, node: NodeView, chains: Sequence[bytes], timeout: float
) -> list[tuple[str, RouterPeeked | Unanswered]]:
    if not chains:
        return []
    try:
        found = await asyncio.gather(*(peek(node, keys, timeout) for keys in chains))
    except KVStoreError as error:
        return [(site.url, Unanswered(url=site.url, problem=str(error)))]
    return [(site.url, RouterPeeked(node=site.name, chains=found))]


def _tiers(found: dict[str, Any]) -> list[PeekedTier]:
    """As the verb ``peek`` tells them."""
    return [
        PeekedTier(medium=medium, usable_blocks=blocks, seconds=seconds, held_blocks=held)
        for medium, blocks, seconds, held in found["tiers"]
    ]


def _in_tokens(tiers: Sequence[PeekedTier], block_tokens: int) -> list[TierLookup]:
    return [TierLookup(**tier.model_dump(), usable_tokens=tier.usable_blocks * block_tokens) for tier in tiers]
