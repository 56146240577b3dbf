"""The scheduler's side: which blocks to load and to save. Decides only; it moves no bytes.

All calls come from vLLM's scheduler thread. Nothing here raises because of the node: no answer is a miss.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from connectors.link import Link
from connectors.paging.base import ABSENT
from connectors.vllm.about import about, traceparent
from connectors.vllm.groups import NULL_PAGE
from connectors.vllm.in_step import Holder, Situation, fits
from connectors.vllm.keys import Chain, Geometry, multimodal_extra, request_seed
from connectors.vllm.metrics import Recorder
from connectors.vllm.plan import Load, Save, Slots, StateLoad, StepPlan, Told
from connectors.vllm.states import Handed, loadable
from connectors.vllm.timing import Timing
from kvstore import tracing
from kvstore.errors import KVStoreError
from kvstore.identity import NO_PARENT, BlockKey
from kvstore.node.api import About, Lookup, Miss, NewBlock, Plan
from kvstore.policy.planner import ENDLESS, Reason
from kvstore.tiers.base import Medium

_REMEMBERED = 1 << 17
"""Keys believed to be stored: 8 million tokens at the default block size, about 20 MB."""


@dataclass(slots=True)
class _Offer:
    """What a request was last told it could load."""

    start: int
    """Tokens that it had then."""
    tokens: int
    media: dict[Medium, int]
    """The offered tokens by where they are."""
    wanted: int
    """Blocks asked for."""
    found: int
    miss: Miss
    plan: Plan
    slots: Slots | None = None
    """Set: to be loaded within the step."""


@dataclass(slots=True)
class _State:
    """What we know of a request."""

    request: Any
    chain: Chain
    about: About
    offer: _Offer | None = None
    media: dict[Medium, int] = field(default_factory=dict)
    loaded_in: int = -1
    """How often the request had been preempted when it was last given something to load."""
    planned: int = 0
    """Blocks whose saving has been decided."""
    tables: list[list[int]] = field(default_factory=list)
    """Its pages, by page table."""


class Planner:
    """Plans loads and saves for one engine."""

    def __init__(
        self, link: Link, geometry: Geometry, recorder: Recorder, timing: Timing, lookup_timeout: float
    ) -> None:
        """``lookup_timeout`` in seconds: the scheduler waits for the answer, and with it every request."""
        self._link = link
        self._lookup_timeout = lookup_timeout
        self._timing = timing
        self._geometry = geometry
        self._recorder = recorder
        self._epoch = 0
        self._states: dict[str, _State] = {}
        self._waiting: set[str] = set()
        """Requests that have not been computed on yet and do not load."""
        self._computing: set[str] = set()
        """Requests that steps have computed on and may still be computing on."""
        self._holder = Holder(link, geometry.ranks)
        self._loads: list[Load] = []
        self._stored: OrderedDict[BlockKey, None] = OrderedDict()
        """Blocks that we saved or saw in the store lately: not worth offering again."""

    def add(self, request: Any) -> None:
        """A new request; one whose KV its tokens do not name is left alone."""
        seed = request_seed(request)
        if seed is not None:
            tokens = self._geometry.block_tokens
            chain = Chain(tokens, seed, multimodal_extra(request, tokens))
            self._states[request.request_id] = _State(request, chain, about(request, seed))
            self._waiting.add(request.request_id)

    def finish(self, request: Any) -> None:
        """The request is over; the node hears how long its answer was."""
        self._waiting.discard(request.request_id)
        self._computing.discard(request.request_id)
        self._holder.drop(request.request_id)
        state = self._states.pop(request.request_id, None)
        if state is not None and request.num_output_tokens:
            prompt = request.num_prompt_tokens // self._geometry.block_tokens
            self._link.report_answer(state.chain.keys[:prompt], request.num_output_tokens)

    def offer(self, request: Any, computed: int) -> int:
        """How many tokens beyond ``computed`` (a page boundary) the store can give. May cover the whole prompt.

        May be asked any number of times before the request is admitted, so it only remembers the last answer, and holds what that
        answer would load within the step. A request is given something to load once, and again after each preemption: a load that
        failed is not tried in a loop.
        """
        self._holder.drop(request.request_id)
        self._computing.discard(request.request_id)  # it waits, also when it was preempted
        state = self._states.get(request.request_id)
        if state is None or getattr(request, "skip_reading_prefix_cache", False):
            return 0
        state.offer = None
        size = self._geometry.block_tokens
        # The last token of a prompt that is loaded whole is computed again: for it a window or a state would be too new.
        limit = (request.num_tokens - self._geometry.whole) // size
        first = computed // size
        if limit * size - computed < size or state.loaded_in == request.num_preemptions:
            return 0  # a part of a block is computed in the step that the prompt's last token needs anyway
        found, miss = self._lookup(state, first, limit)
        plan = found.plan or Plan(found.blocks, Reason.OFF, ENDLESS)
        tokens = max((first + plan.blocks) * size - computed, 0) if plan.blocks else 0
        media: dict[Medium, int] = {}
        for medium, blocks in found.first(plan.blocks).runs:
            media[medium] = media.get(medium, 0) + blocks * size
        if tokens:
            media[found.runs[0][0]] -= computed - first * size
        media = {medium: count for medium, count in media.items() if count}
        state.offer = _Offer(computed, tokens, media, limit - first, found.blocks, miss, plan)
        self._try_in_step(state, state.offer)
        return state.offer.tokens

    def in_step(self, request: Any) -> bool:
        """Whether what was last offered to the request is loaded within the step."""
        state = self._states.get(request.request_id)
        return state is not None and state.offer is not None and state.offer.slots is not None

    def _try_in_step(self, state: _State, offer: _Offer) -> None:
        """Offer as much as a step can load that computes at least one token, if it may, and hold that."""
        geometry, request = self._geometry, state.request
        whole = (request.num_tokens - 1) // geometry.page_tokens * geometry.page_tokens
        tokens = min(offer.tokens, whole - offer.start)
        if tokens <= 0:
            return
        first, stop = offer.start // geometry.block_tokens, -(-(offer.start + tokens) // geometry.block_tokens)
        loading = sum(len(load.keys) for load in self._loads if load.slots)
        situation = Situation(
            len(self._computing),
            self._timing.load_seconds((loading + stop - first) * geometry.block_bytes),
            self._holder.ready,
            geometry.whole or len(geometry.tables.windows) > 1,
        )
        if fits(offer.media, situation):
            offer.slots = self._holder.hold(request.request_id, state.chain.keys[first:stop], traceparent(request))
            if offer.slots is not None:
                offer.tokens, offer.media = tokens, {Medium.HOST: tokens}

    def admit(self, request: Any, tables: Sequence[Sequence[int]], tokens: int) -> None:
        """The request got its pages, and is to load ``tokens`` of those offered (maybe fewer)."""
        state = self._states.get(request.request_id)
        if state is None or state.offer is None:
            return
        offer, state.offer = state.offer, None
        self._recorder.count("tokens_offered", offer.tokens)
        self._recorder.count("blocks_missed", offer.wanted - offer.found, offer.miss.value)
        self._recorder.count("blocks_recomputed", offer.found - offer.plan.blocks, offer.plan.reason.value)
        state.media = offer.media
        if tokens <= 0:
            return
        geometry = self._geometry
        stop = offer.start + min(tokens, offer.tokens)
        blocks = range(offer.start // geometry.block_tokens, -(-stop // geometry.block_tokens))
        pages = range(offer.start // geometry.page_tokens, -(-stop // geometry.page_tokens))
        keys = tuple(state.chain.keys[index] for index in blocks)
        state.loaded_in = request.num_preemptions
        self._waiting.discard(request.request_id)
        self._loads.append(
            Load(
                request.request_id,
                keys,
                geometry.tables.row(tables, pages),
                pages.start - blocks.start * geometry.pages_per_block,
                offer.plan.patience,
                traceparent(request),
                offer.slots and offer.slots.first(len(blocks)),
                self._state_behind(state, stop, tables),
            )
        )
        self._recorder.count("loads", label="in_step" if offer.slots else "async")
        if offer.slots is not None:
            self._holder.admit(request.request_id)
        else:
            self._timing.loading(request.request_id, len(blocks) * geometry.block_bytes, offer.media)
        self._remember(keys)
        state.planned = max(state.planned, blocks.stop)

    def media(self, request_id: str) -> dict[Medium, int]:
        """Where the tokens that the request loads come from."""
        state = self._states.get(request_id)
        return state.media if state else {}

    def step(
        self,
        output: Any,
        tables_of: Callable[[str], Sequence[Sequence[int]]] | None,
        handed: Mapping[str, Sequence[Handed]] = MappingProxyType({}),
    ) -> StepPlan:
        """The plan of an engine step. ``tables_of`` gives a scheduled request's pages; None: take them from ``output``.

        ``handed``: states of recurrent layers that the step leaves on pages of their own, by request.
        """
        loads, self._loads = self._loads, []
        self._holder.step()
        if (epoch := self._link.client.epoch) != self._epoch:  # another run of the node: who knows what it holds
            self._epoch = epoch
            self._stored.clear()
        plan = StepPlan(loads, idle=not output.num_scheduled_tokens)
        chunks = []
        overwritten = {page for load in loads for page in (*load.pages, *(load.state.pages if load.state else ()))}
        overwritten.update(copy.dst_block_id for copy in getattr(output, "kv_cache_block_copies", None) or ())
        for request_id, computed, fresh, replace in _scheduled(output):
            overwritten.update(*fresh)
            self._waiting.discard(request_id)
            chunks.append((computed, output.num_scheduled_tokens.get(request_id, 0)))
            state = self._states.get(request_id)
            if state is None:
                continue
            if tables_of is None:
                _extend_tables(state.tables, fresh, replace)
            scheduled = computed + output.num_scheduled_tokens.get(request_id, 0)
            plan.saves += self._saves(state, computed, scheduled, tables_of)
            plan.states += self._state_saves(state, handed.get(request_id, ()))
        plan.overwritten = frozenset(overwritten - {NULL_PAGE, ABSENT})
        self._computing.update(output.num_scheduled_tokens)
        self._timing.scheduled(chunks, any(load.slots for load in loads))
        return plan

    def heard(self, told: Told) -> None:
        """What the workers told with a step's results."""
        self._holder.heard(told)
        self._forget(told.dropped)
        for request_id in told.failed:  # vLLM may lose track of what it computes for it: nothing of that is saved
            self._states.pop(request_id, None)

    def _saves(
        self,
        state: _State,
        computed: int,
        scheduled: int,
        tables_of: Callable[[str], Sequence[Sequence[int]]] | None,
    ) -> list[Save]:
        """Blocks that are full once ``scheduled`` tokens are computed, and that the store may not have.

        Tokens that are only drafts do not count: they are not part of ``all_token_ids``.
        """
        geometry = self._geometry
        full = min(scheduled, state.request.num_tokens) // geometry.block_tokens
        if computed // geometry.block_tokens < state.planned:  # computed again: preempted, or its load failed
            state.planned = computed // geometry.block_tokens
            self._forget(state.chain.keys[state.planned :])
        if full <= state.planned or not self._extend(state, full):
            return []
        wanted = [index for index in range(state.planned, full) if state.chain.keys[index] not in self._stored]
        state.planned = full
        if not wanted:
            return []
        tables = tables_of(state.request.request_id) if tables_of else state.tables
        per_block = geometry.pages_per_block
        saves = []
        for index in wanted:
            pages = geometry.tables.row(tables, range(index * per_block, (index + 1) * per_block))
            if ABSENT in pages:  # found in vLLM's own cache, which keeps no more than the last window of it
                self._recorder.count("blocks_not_saved", label="out_of_window")
            else:
                saves.append(Save(state.chain.block(index), pages, traceparent(state.request)))
        self._remember(save.block.key for save in saves)
        return saves

    def _state_saves(self, state: _State, handed: Sequence[Handed]) -> list[Save]:
        """States that the store may not have, of those that the step leaves behind full blocks of a request."""
        states = self._geometry.states
        if states is None or not handed or (keyring := self._link.state_keyring) is None:
            return []
        saves = []
        for tokens, pages in states.complete(handed).items():
            count = tokens // self._geometry.block_tokens
            if tokens > state.request.num_tokens or not self._extend(state, count):
                continue  # the last of these tokens has not been heard of yet
            (key,) = state.chain.states(range(count - 1, count), keyring)
            if key not in self._stored:
                block = NewBlock(key, state.chain.keys[count - 1], count)
                saves.append(Save(block, pages, traceparent(state.request)))
        self._remember(save.block.key for save in saves)
        return saves

    def _state_behind(self, state: _State, tokens: int, tables: Sequence[Sequence[int]]) -> StateLoad | None:
        """What a load of a request's first ``tokens`` tokens needs besides their blocks."""
        states = self._geometry.states
        if states is None:
            return None
        count, rest = divmod(tokens, self._geometry.block_tokens)
        if rest or (keyring := self._link.state_keyring) is None:  # no state is of so many tokens: the load fails
            return StateLoad(NO_PARENT, ())
        (key,) = state.chain.states(range(count - 1, count), keyring)
        self._remember([key])
        return StateLoad(key, states.pages(tables, tokens))

    def _lookup(self, state: _State, first: int, limit: int) -> tuple[Lookup, Miss]:
        if not self._extend(state, limit):
            return Lookup(0), Miss.UNAVAILABLE
        try:
            name, trace = state.request.request_id, traceparent(state.request)
            with tracing.span("connector lookup", trace, request=name, blocks=limit - first) as span:
                found = self._find(state, first, limit)
                span.set(found=found.blocks)
            return found, Miss.NOT_STORED
        except KVStoreError as error:
            self._link.lost()
            return Lookup(0), Miss.of(error)

    def _find(self, state: _State, first: int, limit: int) -> Lookup:
        """Ask the node for the blocks from ``first`` to ``limit``, or up to the last one that has a state."""
        client, patience, keys = self._link.client, self._lookup_timeout, state.chain.keys
        behind = len(self._waiting - {state.request.request_id})
        if self._geometry.states is None or (keyring := self._link.state_keyring) is None:
            found = client.lookup(keys[:limit], first, patience, state.about, behind)
            self._forget(keys[first + found.blocks : limit])
            return found
        states = state.chain.states(range(first, limit), keyring)
        held = client.holds(states, patience)
        asked = max((index + 1 for index, here in enumerate(held) if here), default=limit - first)
        found = client.lookup([*keys[: first + asked], states[asked - 1]], first, patience, state.about, behind, 1)
        self._forget(keys[first + found.blocks : first + asked])
        self._forget(key for key, here in zip(states, held, strict=True) if not here)
        return loadable(found, asked, held)

    def _extend(self, state: _State, count: int) -> bool:
        """Make keys for the first ``count`` blocks; False while no node answers."""
        keyring = self._link.keyring
        if keyring is None:
            return False
        state.chain.extend(state.request.all_token_ids, count, keyring)
        return True

    def _remember(self, keys: Iterable[BlockKey]) -> None:
        for key in keys:
            self._stored[key] = None
            self._stored.move_to_end(key)
        while len(self._stored) > _REMEMBERED:
            self._stored.popitem(last=False)

    def _forget(self, keys: Iterable[BlockKey]) -> None:
        for key in keys:
            self._stored.pop(key, None)


def _extend_tables(tables: list[list[int]], fresh: Sequence[Sequence[int]], replace: bool) -> None:
    """Append new pages to a request's page tables, or start these anew."""
    if replace:
        tables[:] = [list(pages) for pages in fresh]
    else:
        for table, pages in zip(tables, fresh, strict=False):  # none in a step without new pages
            table.extend(pages)


def _scheduled(output: Any) -> Iterable[tuple[str, int, Sequence[Sequence[int]], bool]]:
    """Per scheduled request: id, tokens computed so far, pages new in this step by table, whether these replace all earlier."""
    for new in output.scheduled_new_reqs:
        yield new.req_id, new.num_computed_tokens, new.block_ids, True
    cached = output.scheduled_cached_reqs
    for request_id, computed, block_ids in zip(
        cached.req_ids, cached.num_computed_tokens, cached.new_block_ids, strict=True
    ):
        yield request_id, computed, block_ids or (), request_id in cached.resumed_req_ids
