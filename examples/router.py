"""A small KV-aware router in front of vLLM servers that each have a kvstore node: an example to read and to change.

    python examples/router.py --port 9000 \\
        --engine http://127.0.0.1:8001=http://127.0.0.1:7071 --engine http://127.0.0.1:8002=http://127.0.0.1:7072

Each engine comes with the API of the node beside it. One API is asked what all nodes hold of a prompt (``/v1/router/lookup``;
the nodes name each other in ``api.peers``), and the request goes to the engine that will have its prompt ready first: what waits
there already, then the load of what its node holds, then prefill of the rest. When nothing is known it goes to the engine with
least to do. Needs fastapi, httpx and uvicorn. Listens on loopback, and asks nobody who they are.
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

CONNECT_SECONDS = 2.0
HOP_BY_HOP = {"connection", "content-length", "host", "keep-alive", "te", "trailer", "transfer-encoding", "upgrade"}


@dataclass(slots=True)
class Engine:
    """One vLLM server and the API of its node."""

    url: str
    api: str
    requests: int = 0
    """Under way."""
    tokens: int = 0
    """Of their prompts, those to compute."""


@dataclass(frozen=True, slots=True)
class Choice:
    """An engine for a request, and the prompt tokens that it must compute."""

    engine: Engine
    compute: int


Tiers = Sequence[Mapping[str, Any]]


def choose(engines: Sequence[Engine], tokens: int, held: Mapping[str, Tiers], speed: float) -> list[Choice]:
    """Engines by how soon each would have a prompt of ``tokens`` ready, soonest first.

    ``held``: by the address of an API what ``/v1/router/lookup`` says of its tiers. ``speed``: prefill, in tokens per second.
    """

    def ready(engine: Engine) -> tuple[float, int, Choice]:
        ways = [(tokens / speed, tokens)]
        for tier in held.get(engine.api, ()):
            compute = max(tokens - tier["usable_tokens"], 1)  # the last token is always computed
            ways.append((tier["seconds"] + compute / speed, compute))
        seconds, compute = min(ways)
        return engine.tokens / speed + seconds, engine.requests, Choice(engine, compute)

    return [choice for *_, choice in sorted(map(ready, engines), key=lambda each: each[:2])]


class Router:
    """Forwards requests. In one event loop."""

    def __init__(self, engines: Sequence[Engine], speed: float, patience: float, token: str = "") -> None:
        """``speed``: of prefill, tokens per second. ``patience``: seconds that tokenizing and looking up may take, each, before
        a request goes on without. ``token``: for the nodes' APIs, if they ask for one."""
        self.engines = engines
        self._speed = speed
        self._patience = patience
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}
        # Without limits: how many requests there are is for the engines to bound.
        self.http = httpx.AsyncClient(timeout=httpx.Timeout(None, connect=CONNECT_SECONDS), limits=httpx.Limits())

    async def forward(self, request: Request) -> Response:
        """Send a completion to the best engine, and to the next best while none answers: it may safely be begun anew."""
        body = await request.body()
        headers = {name: value for name, value in request.headers.items() if name not in HOP_BY_HOP}
        for choice in await self.order(await request.json(), headers):
            engine = choice.engine
            wanted = self.http.build_request("POST", engine.url + request.url.path, content=body, headers=headers)
            engine.requests, engine.tokens = engine.requests + 1, engine.tokens + choice.compute
            try:
                answer = await self.http.send(wanted, stream=True)
            except BaseException as error:
                engine.requests, engine.tokens = engine.requests - 1, engine.tokens - choice.compute
                if isinstance(error, httpx.TransportError):
                    continue
                raise
            kept = {name: value for name, value in answer.headers.items() if name not in HOP_BY_HOP}
            return StreamingResponse(
                self._relay(answer, choice), answer.status_code, kept | {"x-routed-to": engine.url}
            )
        return JSONResponse({"error": {"message": "no engine can be reached", "type": "unavailable"}}, 503)

    async def order(self, body: Mapping[str, Any], headers: Mapping[str, str]) -> list[Choice]:
        """The engines, best first."""
        tokens = await self._tokenize(body, headers)
        held = await self._held(str(body.get("model", "")), tokens, str(body.get("cache_salt") or "")) if tokens else {}
        return choose(self.engines, len(tokens), held, self._speed)

    async def _tokenize(self, body: Mapping[str, Any], headers: Mapping[str, str]) -> list[int]:
        """The prompt's token ids as the engines make them, chat template included; none when that fails."""
        prompt = body.get("prompt")
        if isinstance(prompt, list):
            return prompt if all(isinstance(token, int) for token in prompt) else []
        names = "model", "prompt", "messages", "tools", "chat_template", "chat_template_kwargs", "add_special_tokens"
        question = {name: body[name] for name in names if body.get(name) is not None}
        keys = {"Authorization": headers["authorization"]} if "authorization" in headers else {}
        for engine in sorted(self.engines, key=lambda each: each.requests):
            found = await self._ask(engine.url + "/tokenize", question, keys)
            if found:
                return list(found["tokens"])
        return []

    async def _held(self, model: str, tokens: list[int], salt: str) -> dict[str, Tiers]:
        """What each node holds, by the address of its API; empty when nobody answers."""
        prompt = {"namespace": model, "tokens": tokens, "cache_salt": salt}
        question = {"prompts": [prompt], "timeout_seconds": self._patience / 2}
        for engine in sorted(self.engines, key=lambda each: each.requests):
            found = await self._ask(engine.api + "/v1/router/lookup", question, self._headers)
            if found and found["prompts"][0]["nodes"]:
                return {node["url"]: node["tiers"] for node in found["prompts"][0]["nodes"]}
        return {}

    async def _ask(self, url: str, question: Any, headers: Mapping[str, str]) -> Any:
        """None when there is no good answer in time."""
        try:
            async with asyncio.timeout(self._patience):
                answer = await self.http.post(url, json=question, headers=dict(headers))
            return answer.json() if answer.is_success else None
        except (TimeoutError, ValueError, httpx.HTTPError):
            return None

    async def _relay(self, answer: httpx.Response, choice: Choice) -> AsyncIterator[bytes]:
        waiting = True
        try:
            async for piece in answer.aiter_raw():
                if waiting:  # the prompt is computed
                    waiting = False
                    choice.engine.tokens -= choice.compute
                yield piece
        finally:
            choice.engine.requests -= 1
            choice.engine.tokens -= choice.compute if waiting else 0
            await answer.aclose()


def create_app(router: Router) -> FastAPI:
    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await router.http.aclose()

    app = FastAPI(title="KV-aware router", lifespan=lifespan)
    for path in ("/v1/completions", "/v1/chat/completions"):
        app.add_api_route(path, router.forward, methods=["POST"])
    return app


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", action="append", required=True, metavar="ENGINE=API", help="may be repeated")
    parser.add_argument("--port", type=int, default=9000)
    parser.add_argument("--prefill-tokens-per-second", type=float, default=20_000, help="of one engine, about")
    parser.add_argument("--patience", type=float, default=0.5, help="seconds for tokenizing and for the lookup, each")
    parser.add_argument("--token-file", type=Path, help="with a token for the nodes' APIs, if they ask for one")
    options = parser.parse_args()
    token = options.token_file.read_text().strip() if options.token_file else ""
    engines = [Engine(*pair.partition("=")[::2]) for pair in options.engine]
    router = Router(engines, options.prefill_tokens_per_second, options.patience, token)
    uvicorn.run(create_app(router), port=options.port, log_level="warning")


if __name__ == "__main__":
    main()
