"""Other nodes' APIs, asked side by side what they hold of chains of blocks.

Keys are the same on all nodes of a tenant, so a peer is sent keys, never tokens: 32 bytes of text a block, and nothing to hash.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from pathlib import Path

import httpx
from pydantic import ValidationError

from kvstore.admin.models.prompts import RouterPeeked, Unanswered
from kvstore.errors import CatalogUnavailable, ConfigError

REST_SECONDS = 1.0
"""A peer that did not answer is asked again at most this often, so that not every request of a router waits for it."""
LOOK_SECONDS = 2.0
"""How old the list of the region's nodes may be: they say that they live so often."""
MOST_PEERS = 1024
MAX_TOKEN_BYTES = 4096

Find = Callable[[], Awaitable[Sequence[str]]]
"""Addresses of the region's other nodes. Raises CatalogUnavailable."""


async def nobody() -> Sequence[str]:
    return ()


class Peers:
    """In one event loop."""

    def __init__(
        self,
        urls: Sequence[str] = (),
        token_file: Path | None = None,
        find: Find = nobody,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        """``urls``, as ``http://10.0.0.2:7070``, and those that ``find`` finds. ``tls``: whom to believe and what to show.

        Raises ConfigError when the token cannot be read.
        """
        self._named = tuple(dict.fromkeys(urls))
        self._find = find
        self._found: Sequence[str] = ()
        self._looking: asyncio.Task[None] | None = None
        self._looked_at = 0.0
        self._headers = {"Authorization": f"Bearer {_token(token_file)}"} if token_file else {}
        self._tls = tls
        self._http: httpx.AsyncClient | None = None
        self._resting: dict[str, tuple[float, str]] = {}
        """Until when, and why."""

    async def ask(self, chains: Sequence[bytes], timeout: float) -> list[tuple[str, RouterPeeked | Unanswered]]:
        """What each peer could serve of ``chains`` of joined keys, by its address. Returns within ``timeout`` seconds."""
        urls = await self._urls(timeout) if chains else ()
        if not urls:
            return []
        if self._http is None:
            self._http = httpx.AsyncClient(headers=self._headers, timeout=None, verify=self._tls or True)
        body = {"chains": [chain.hex() for chain in chains]}
        answers = await asyncio.gather(*(self._ask(self._http, url, body, timeout) for url in urls))
        return list(zip(urls, answers, strict=True))

    async def close(self) -> None:
        if self._looking is not None:
            self._looking.cancel()
            await asyncio.wait([self._looking])
        if self._http is not None:
            await self._http.aclose()

    async def _urls(self, timeout: float) -> Sequence[str]:
        """All that are known. Only the first call waits for the catalog, and for half of ``timeout`` at most."""
        first = self._looking is None
        if self._looking is None or (self._looking.done() and time.monotonic() - self._looked_at > LOOK_SECONDS):
            self._looking = asyncio.create_task(self._look())
        if first:
            await asyncio.wait([self._looking], timeout=timeout / 2)
        return tuple(dict.fromkeys((*self._named, *self._found)))

    async def _look(self) -> None:
        with suppress(CatalogUnavailable):  # those found last are still asked
            self._found = (await self._find())[:MOST_PEERS]
        self._looked_at = time.monotonic()

    async def _ask(
        self, http: httpx.AsyncClient, url: str, body: dict[str, list[str]], timeout: float
    ) -> RouterPeeked | Unanswered:
        until, problem = self._resting.get(url, (0.0, ""))
        if time.monotonic() < until:
            return Unanswered(url=url, problem=problem)
        try:
            async with asyncio.timeout(timeout):
                answer = await http.post(f"{url}/v1/router/peek", json=body)
            if answer.is_success:
                peeked = RouterPeeked.model_validate_json(answer.content)
                if len(peeked.chains) == len(body["chains"]):
                    return peeked
                problem = "its answer is not one"
            else:
                problem = f"it answered {answer.status_code}"
        except TimeoutError:
            problem = f"no answer in {timeout:g} s"
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            problem = str(error) or type(error).__name__
        except ValidationError:
            problem = "its answer is not one"
        self._resting[url] = time.monotonic() + REST_SECONDS, problem
        return Unanswered(url=url, problem=problem)


def _token(path: Path) -> str:
    remedy = "Write a token of a viewer into it, as kvstore token create prints it."
    try:
        with path.open() as file:
            token = file.read(MAX_TOKEN_BYTES).strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("api.peer_token", str(path), str(error), remedy) from error
    if not token or not token.isascii() or not token.isprintable():
        raise ConfigError("api.peer_token", str(path), "there is no token in it", remedy)
    return token
