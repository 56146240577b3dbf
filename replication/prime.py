"""Primes a cache: prompts that nobody has computed yet are sent once to an OpenAI-compatible endpoint, one token each.

The engine behind it computes and stores their KV as for any request. It is optional work on an engine that may have users:
few requests at a time, as many a second as asked for, and an engine that says it is busy is left alone for a while.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import Enum

import httpx

from kvstore.errors import KVStoreError
from replication.prompts import Prompt
from replication.rate import RateLimit

TRIES = 5
FIRST_RETRY_SECONDS, LAST_RETRY_SECONDS = 0.5, 30.0
BUSY = (429, 502, 503, 504)
MAX_REPLY_BYTES = 1 << 20
CONNECT_SECONDS = 5.0
REQUEST_SECONDS = 600.0
"""A prefill of a million tokens takes minutes."""


class EndpointUnavailable(KVStoreError):
    """The endpoint cannot be used at all; the message says why."""


class Need(Enum):
    """Whether a prompt is worth sending."""

    SEND = "send"
    STORED = "stored"
    """Every block of it is stored already."""
    SHORT = "shorter_than_a_block"
    """Nothing of it can be stored."""


@dataclass
class PrimeReport:
    """What became of the prompts."""

    sent: int = 0
    skipped: Counter[Need] = field(default_factory=Counter)
    failed: Counter[str] = field(default_factory=Counter)
    """By reason."""
    tokens: int = 0
    """Of the prompts that were sent, as the endpoint counts them."""
    seconds: float = 0.0
    interrupted: bool = False


Progress = Callable[[PrimeReport], None]


class Primer:
    """Sends prompts to one endpoint. Use it as an asynchronous context manager, in one event loop."""

    def __init__(
        self,
        url: str,
        model: str = "",
        api_key: str = "",
        at_once: int = 4,
        per_second: float | None = None,
        progress: Progress = lambda report: None,
    ) -> None:
        """``url`` as ``http://host:8000`` or with ``/v1``; ``model``: as the endpoint calls it, empty: its first one."""
        base = url.rstrip("/")
        self.report = PrimeReport()
        self._model = model
        self._turns = asyncio.Semaphore(at_once)
        self._pace = RateLimit(per_second)
        self._progress = progress
        self._client = httpx.AsyncClient(
            base_url=base if base.endswith("/v1") else f"{base}/v1",
            headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
            timeout=httpx.Timeout(REQUEST_SECONDS, connect=CONNECT_SECONDS),
            limits=httpx.Limits(max_connections=at_once),
        )

    async def __aenter__(self) -> Primer:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._client.aclose()

    async def run(
        self, prompts: Iterable[Prompt], need: Callable[[Prompt], Need] = lambda prompt: Need.SEND
    ) -> PrimeReport:
        """Send those that need it, in order. Raises EndpointUnavailable when the endpoint has no model to ask."""
        started = time.monotonic()
        try:
            self._model = self._model or await self._first_model()
            async with asyncio.TaskGroup() as group:
                for prompt in prompts:
                    if (verdict := need(prompt)) is not Need.SEND:
                        self.report.skipped[verdict] += 1
                        continue
                    await self._turns.acquire()
                    await self._pace.take(1)
                    group.create_task(self._send(prompt))
        except asyncio.CancelledError:
            self.report.interrupted = True
        finally:
            self.report.seconds = time.monotonic() - started
        return self.report

    async def _send(self, prompt: Prompt) -> None:
        try:
            reason = await self._post(prompt)
        finally:
            self._turns.release()
        if reason is not None:
            self.report.failed[reason] += 1
        self._progress(self.report)

    async def _post(self, prompt: Prompt) -> str | None:
        """Why a prompt could not be computed; None: it was."""
        body = {"model": self._model, "prompt": prompt, "max_tokens": 1, "temperature": 0}
        delay = FIRST_RETRY_SECONDS
        reason = ""
        for attempt in range(TRIES):
            if attempt:
                await asyncio.sleep(delay * random.uniform(0.5, 1))
                delay = min(2 * delay, LAST_RETRY_SECONDS)
            try:
                status, reply = await self._request("POST", "completions", body)
            except (httpx.HTTPError, httpx.InvalidURL) as error:
                reason = type(error).__name__
                continue
            reason = f"status {status}"
            if status == 200:
                self.report.sent += 1
                self.report.tokens += _tokens(reply)
                return None
            if status not in BUSY:
                break
        return reason

    async def _first_model(self) -> str:
        try:
            status, reply = await self._request("GET", "models")
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise EndpointUnavailable(f"{self._client.base_url}: {error or type(error).__name__}") from error
        try:
            name = json.loads(reply)["data"][0]["id"]
        except (ValueError, KeyError, IndexError, TypeError):
            name = None
        if status != 200 or not isinstance(name, str):
            raise EndpointUnavailable(f"{self._client.base_url}models names no model (status {status})")
        return name

    async def _request(self, method: str, path: str, body: object = None) -> tuple[int, bytes]:
        """Status and the reply's first bytes."""
        reply = b""
        async with self._client.stream(method, path, json=body) as response:
            async for chunk in response.aiter_bytes():
                reply += chunk
                if len(reply) > MAX_REPLY_BYTES:
                    break
            return response.status_code, reply


def _tokens(reply: bytes) -> int:
    try:
        count = json.loads(reply)["usage"]["prompt_tokens"]
    except (ValueError, KeyError, TypeError):
        return 0
    return count if type(count) is int and count > 0 else 0
