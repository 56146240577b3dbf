"""A small KV-aware router in front of vLLM servers that each have a kvstore node: an example to read and to change.

    python examples/router.py --port 9000 \\
        --engine http://127.0.0.1:8001=http://127.0.0.1:7071 --engine http://127.0.0.1:8002=http://127.0.0.1:7072

Each engine comes with the API of the node beside it. One API is asked what all nodes hold of a prompt (``/v1/router/lookup``;
the nodes name each other in ``api.peers``), and the request goes to the engine that will have its prompt ready first: what waits
there already, then the load of what its node holds, then prefill of the rest. When nothing is known it goes to the engine with
least to do. With ``--events`` it follows what nodes publish instead of asking. Needs llm-kvstore[admin], and [events] to follow.
Listens on loopback, and asks nobody who they are.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import msgpack
import numpy as np
import numpy.typing as npt
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from kvstore.identity import Namespace, chain_seed
from kvstore.node.protocol import split_keys
from kvstore.promptkeys import PromptKeys

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

logger = logging.getLogger("router")


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


Tokens = npt.NDArray[np.uint32]
Held = Callable[[str, Tokens, str], Awaitable[Mapping[str, Tiers]]]
"""What each node holds of a prompt, by the address of its API: of a model, token ids and a cache salt. Never raises."""


async def ask(http: httpx.AsyncClient, url: str, question: Any, headers: Mapping[str, str], patience: float) -> Any:
    """None when there is no good answer within ``patience`` seconds."""
    try:
        async with asyncio.timeout(patience):
            answer = await http.post(url, json=question, headers=dict(headers))
        return answer.json() if answer.is_success else None
    except (TimeoutError, ValueError, httpx.HTTPError):
        return None


class Asking:
    """Asks one API for all nodes, the next one if it does not answer."""

    def __init__(self, http: httpx.AsyncClient, apis: Sequence[str], patience: float, token: str = "") -> None:
        """``token``: for the APIs, if they ask for one."""
        self._http, self._apis, self._patience = http, apis, patience
        self._strangers: set[str] = set()
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}

    async def __call__(self, model: str, tokens: Tokens, salt: str) -> Mapping[str, Tiers]:
        prompt = {"namespace": model, "packed_tokens": tokens.tobytes().hex(), "cache_salt": salt}
        question = {"prompts": [prompt], "timeout_seconds": self._patience / 2}
        for api in self._apis:
            found = await ask(self._http, api + "/v1/router/lookup", question, self._headers, self._patience)
            if found and found["prompts"][0]["nodes"]:
                held = {node["url"]: node["tiers"] for node in found["prompts"][0]["nodes"]}
                for url in held.keys() - self._strangers - set(self._apis):
                    self._strangers.add(url)
                    logger.warning(
                        "a node calls itself %s, which is the API of no --engine (%s)", url, ", ".join(self._apis)
                    )
                return held
        return {}


class Following:
    """Follows the events of all nodes instead: asks nobody on a request's way, but does not know what loading costs."""

    def __init__(self, namespaces: Sequence[Namespace], secret: bytes) -> None:
        """``namespaces``: those of the models, as ``/v1/namespaces`` shows them. ``secret``: that of the nodes."""
        self._spaces = {space.model: (space.block_tokens, space.keyring(secret)) for space in namespaces}
        self._known = PromptKeys()
        self.blocks: dict[str, dict[bytes, set[str]]] = {}
        """By API and key: the tiers that hold the block."""

    async def follow(self, api: str, address: str) -> None:
        """Read one node's events until cancelled. ``api``: the address by which the node is known."""
        import zmq
        import zmq.asyncio

        socket = zmq.asyncio.Context.instance().socket(zmq.SUB)
        socket.connect(address)
        socket.subscribe(b"kv-events")
        held, expected = self.blocks.setdefault(api, {}), 0
        try:
            while True:
                _, number, payload = await socket.recv_multipart()
                if int.from_bytes(number, "big") != expected:
                    held.clear()  # what was missed may have been removals
                expected = int.from_bytes(number, "big") + 1
                for event in msgpack.unpackb(payload)[1]:
                    for key in event["block_hashes"]:
                        if event["type"] == "BlockStored":
                            held.setdefault(key, set()).add(event["ownership"])
                        elif key in held:
                            held[key].discard(event["ownership"])
                            if not held[key]:
                                del held[key]
        finally:
            socket.close(0)

    async def __call__(self, model: str, tokens: Tokens, salt: str) -> Mapping[str, Tiers]:
        if model not in self._spaces:
            return {}
        block_tokens, keyring = self._spaces[model]
        seed = chain_seed(cache_salt=salt)
        keys = split_keys(await asyncio.to_thread(self._known.keys, tokens, block_tokens, keyring, seed))
        found = {}
        for api, held in self.blocks.items():
            usable = next((at for at, key in enumerate(keys) if key not in held), len(keys))
            found[api] = [{"usable_tokens": usable * block_tokens, "seconds": 0.0}]
        return found


class Router:
    """Forwards requests. In one event loop."""

    def __init__(
        self, http: httpx.AsyncClient, engines: Sequence[Engine], speed: float, patience: float, held: Held
    ) -> None:
        """``speed``: of prefill, tokens per second. ``patience``: seconds that tokenizing may take. ``held``: what nodes hold."""
        self.engines = engines
        self._speed = speed
        self._patience = patience
        self._held = held
        self._http = http

    async def forward(self, request: Request) -> Response:
        """Send a completion to the best engine, and to the next best while none answers: it may safely be begun anew."""
        body = await request.body()
        headers = {name: value for name, value in request.headers.items() if name not in HOP_BY_HOP}
        for choice in await self.order(body, headers):
            engine = choice.engine
            wanted = self._http.build_request("POST", engine.url + request.url.path, content=body, headers=headers)
            engine.requests, engine.tokens = engine.requests + 1, engine.tokens + choice.compute
            try:
                answer = await self._http.send(wanted, stream=True)
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

    async def order(self, body: bytes, headers: Mapping[str, str]) -> list[Choice]:
        """The engines, best first. What is no request is for an engine to refuse."""
        try:
            wanted = json.loads(body)
            tokens = np.array(await self._tokenize(wanted, headers), dtype="<u4")
            model, salt = str(wanted.get("model", "")), str(wanted.get("cache_salt") or "")
        except (ValueError, AttributeError, OverflowError):
            tokens = np.zeros(0, dtype="<u4")
        held = await self._held(model, tokens, salt) if len(tokens) else {}
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
            found = await ask(self._http, engine.url + "/tokenize", question, keys, self._patience)
            if found:
                return list(found["tokens"])
        return []

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
    app = FastAPI(title="KV-aware router")
    for path in ("/v1/completions", "/v1/chat/completions"):
        app.add_api_route(path, router.forward, methods=["POST"])
    return app


def pair(text: str) -> tuple[str, str]:
    """Of two addresses, as ``http://127.0.0.1:8001=http://127.0.0.1:7071``."""
    first, _, second = text.partition("=")
    if not all(re.match(r"(http|https|tcp|ipc)://.", each) for each in (first, second)):
        raise argparse.ArgumentTypeError(f"{text!r} is not two addresses with = between them")
    return first.rstrip("/"), second.rstrip("/")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--engine", action="append", required=True, type=pair, metavar="ENGINE=API", help="may be repeated"
    )
    parser.add_argument("--port", type=int, default=9000)
    parser.add_argument("--prefill-tokens-per-second", type=float, default=20_000, help="of one engine, about")
    parser.add_argument("--patience", type=float, default=0.5, help="seconds for tokenizing and for the lookup, each")
    parser.add_argument("--token-file", type=Path, help="with a token for the nodes' APIs, if they ask for one")
    parser.add_argument(
        "--events", action="append", type=pair, metavar="API=ADDRESS", help="follow a node's events; for every node"
    )
    parser.add_argument("--secret-file", type=Path, help="with the nodes' identity.secret, to follow events")
    options = parser.parse_args()
    if options.events and options.secret_file is None:
        parser.error("--events needs --secret-file: without the secret nobody can tell which blocks a prompt has")
    token = options.token_file.read_text().strip() if options.token_file else ""
    engines = [Engine(*both) for both in options.engine]
    asyncio.run(serve(options, engines, token))


async def serve(options: argparse.Namespace, engines: Sequence[Engine], token: str) -> None:
    # Without limits: how many requests there are is for the engines to bound.
    http = httpx.AsyncClient(timeout=httpx.Timeout(None, connect=CONNECT_SECONDS), limits=httpx.Limits())
    async with http:
        held: Held = Asking(http, [engine.api for engine in engines], options.patience, token)
        following = []
        if options.events:
            held = Following(await namespaces(http, engines, token), options.secret_file.read_bytes().strip())
            following = [asyncio.create_task(held.follow(api, address)) for api, address in options.events]
        router = Router(http, engines, options.prefill_tokens_per_second, options.patience, held)
        server = uvicorn.Server(uvicorn.Config(create_app(router), port=options.port, log_level="warning"))
        await server.serve()
        for task in following:
            task.cancel()


async def namespaces(http: httpx.AsyncClient, engines: Sequence[Engine], token: str) -> list[Namespace]:
    """Of all models that engines have opened. Raises httpx.HTTPError."""
    found: dict[str, Namespace] = {}
    for engine in engines:
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        answer = (await http.get(engine.api + "/v1/namespaces", headers=headers)).raise_for_status()
        found |= {item["digest"]: Namespace.from_dict(item["fields"]) for item in answer.json()["items"]}
    return list(found.values())


if __name__ == "__main__":
    main()
