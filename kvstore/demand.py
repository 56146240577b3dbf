"""What engines ask of this node: counted by prompt, learnt from, kept over restarts, told to the region; and its pins.

A lookup stands for a request. An engine that cannot admit a request yet asks again and again: within ``SAME_REQUEST_SECONDS``
a client's lookups of the same chain count once.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

import structlog

from kvstore.errors import TierError
from kvstore.files import replace_file
from kvstore.identity import BlockKey
from kvstore.policy.hotness import HotChain, Hotness
from kvstore.policy.pins import Pins
from kvstore.policy.reuse import Estimate, Traffic

log = structlog.get_logger(__name__)

SAME_REQUEST_SECONDS = 10.0
KEEP_EVERY_SECONDS = 60.0
REPORT_SECONDS = 15.0
"""How often the region is told: what a new cluster is warmed with is out of date so soon."""

_REMEMBERED_REQUESTS = 4096
_PREFILL_SECONDS_PER_TOKEN = 33e-6
_PREFILL_DOUBLES_AT = 64_000

T = TypeVar("T")
Publish = Callable[[], Awaitable[None]]


def prefill_seconds(tokens: int) -> float:
    """What computing a prefix costs: measured on an H100 with an 8B model, 30k tokens/s when short, half of it at 64k.

    Only ratios matter to a ranking, so it also serves for other models.
    """
    return tokens * _PREFILL_SECONDS_PER_TOKEN * (1 + tokens / _PREFILL_DOUBLES_AT)


class Demand:
    """Hot prompts of one node. Owned by its event loop."""

    def __init__(self, path: Path) -> None:
        """``path`` is the file that keeps the counts; ``traffic.msgpack`` and ``pins.msgpack`` beside it keep the rest."""
        self.publish: Publish | None = None
        """Tells the region, every ``REPORT_SECONDS``; may raise TierError."""
        now = time.time()
        self._path = path
        self._traffic_path, self._pins_path = path.with_name("traffic.msgpack"), path.with_name("pins.msgpack")
        self.hotness = _read(path, Hotness.unpack) or Hotness()
        self.traffic = _read(self._traffic_path, lambda data: Traffic.unpack(data, now)) or Traffic()
        pins = _read(self._pins_path, lambda data: Pins.unpack(data, now))
        self.pins = pins if pins is not None else Pins()
        self._more: list[tuple[Path, Callable[[], bytes]]] = []
        self._recent: dict[tuple[object, BlockKey], float] = {}
        self._learning: asyncio.Task[None] | None = None
        self._works = [asyncio.create_task(self._keep_regularly()), asyncio.create_task(self._report_regularly())]

    def also_keep(self, name: str, load: Callable[[bytes], object], pack: Callable[[], bytes]) -> None:
        """Keep something else that was learnt: ``load`` gets what ``pack`` gave before a restart, and raises ValueError for bytes
        that it cannot have given. Both are called in the event loop."""
        path = self._path.with_name(f"{name}.msgpack")
        _read(path, load)
        self._more.append((path, pack))

    def observe(self, client: object, keys: Sequence[BlockKey], block_tokens: int, block_bytes: int) -> None:
        """A client looks this chain up, from its head."""
        if not keys or self._seen_just_now(client, keys[-1]):
            return
        now = time.time()
        self.traffic.observe(keys, now)
        self.hotness.observe(keys, now, block_tokens, block_bytes)
        if self.traffic.due:
            self._learning = asyncio.create_task(self._learn(self.traffic.estimation()))

    def top(self, count: int) -> list[HotChain]:
        """The hottest prompts by score: decayed hits x prefill seconds saved / bytes."""
        return self.hotness.top(count, time.time(), prefill_seconds)

    async def close(self) -> None:
        """Keep what was counted, and tell it."""
        for work in self._works:
            work.cancel()
        if self._learning is not None:
            await asyncio.wait({self._learning})
        await self._keep()
        await self._report()

    def _seen_just_now(self, client: object, last: BlockKey) -> bool:
        now = time.monotonic()
        before = self._recent.pop((client, last), -SAME_REQUEST_SECONDS)
        self._recent[client, last] = now
        if len(self._recent) > _REMEMBERED_REQUESTS:
            del self._recent[next(iter(self._recent))]
        return now - before < SAME_REQUEST_SECONDS

    async def _learn(self, estimation: Callable[[], Estimate]) -> None:
        """Some 30 ms of arithmetic, for which no lookup waits."""
        self.traffic.adopt(await asyncio.to_thread(estimation))

    async def _keep_regularly(self) -> None:
        while True:
            await asyncio.sleep(KEEP_EVERY_SECONDS)
            await self._keep()

    async def _report_regularly(self) -> None:
        while True:
            await asyncio.sleep(REPORT_SECONDS)
            await self._report()

    async def _keep(self) -> None:
        hotness, pins = self.hotness.pack(), self.pins.pack()
        kept = [(self._path, lambda: hotness), (self._traffic_path, self.traffic.pack), (self._pins_path, lambda: pins)]
        kept += [(path, partial(bytes, pack())) for path, pack in self._more]
        for path, pack in kept:
            try:
                await asyncio.to_thread(_write, path, pack)
            except OSError as error:
                log.warning("what was learnt is not kept", file=str(path), error=str(error))

    async def _report(self) -> None:
        if self.publish is None:
            return
        try:
            await self.publish()
        except TierError as error:
            log.warning("hotness not published", error=str(error))


def _read(path: Path, unpack: Callable[[bytes], T]) -> T | None:
    """What the file keeps; None, to start anew, without a file or with one that cannot be read."""
    try:
        return unpack(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        log.warning("what was learnt starts anew", file=str(path), error=str(error))
        return None


def _write(path: Path, pack: Callable[[], bytes]) -> None:
    replace_file(path, pack())
