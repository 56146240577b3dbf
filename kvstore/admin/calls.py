"""HTTP to an admin API: requests, pages and streams, with problems as this package's errors."""

from __future__ import annotations

import ssl
import uuid
from collections.abc import Iterator
from typing import Any, Self, TypeVar

import httpx
from pydantic import TypeAdapter
from pydantic_core import to_json

from kvstore.errors import AdminRefused, DeadlineExceeded, NodeUnavailable

T = TypeVar("T")

PAGE = 1000
"""Items asked for at a time: as many as the API gives."""

ASKING = frozenset(
    {
        "/v1/blocks/query",
        "/v1/explain",
        "/v1/lookup",
        "/v1/policy/dry-run",
        "/v1/replication/holdings",
        "/v1/router/lookup",
        "/v1/router/peek",
        "/v1/tree",
    }
)
"""Routes that are posted to because the question is long, and that change nothing."""


class Calls:
    """Calls raise AdminRefused with the API's reason, NodeUnavailable when no API answers, and DeadlineExceeded when one that
    was reached takes too long. Thread-safe.

    Every write carries an Idempotency-Key of its own, so that what is sent twice on the way is done once.
    """

    def __init__(
        self,
        url: str,
        token: str = "",
        timeout: float = 30.0,
        transport: httpx.BaseTransport | None = None,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        """``url`` as ``http://127.0.0.1:7070``; ``timeout`` in seconds, for each answer; work that takes longer is a job.

        ``tls`` says whose certificates are believed and which one is shown, where the API asks for one; without it servers are
        verified against the system's authorities, or those of ``SSL_CERT_FILE``.
        """
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        transport = transport or httpx.HTTPTransport(retries=1, verify=tls or True)
        self._http = httpx.Client(base_url=url, headers=headers, timeout=timeout, transport=transport)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def call(self, method: str, path: str, body: object = None, **params: Any) -> Any:
        """Any route: the answer's JSON."""
        return self._answer(method, path, body, **params).json()

    def _answer(self, method: str, path: str, body: object = None, **params: Any) -> httpx.Response:
        headers = {} if method == "GET" or path in ASKING else {"Idempotency-Key": uuid.uuid4().hex}
        content = None
        if body is not None:
            content = to_json(body)  # of long prompts in a fifth of the time that the standard library takes
            headers["Content-Type"] = "application/json"
        try:
            answer = self._http.request(method, path, content=content, params=params, headers=headers)
        except httpx.ReadTimeout as error:
            problem = (
                f"no answer of the admin API at {self._http.base_url} in time; it may do all the same what was asked"
            )
            raise DeadlineExceeded(problem) from error
        except httpx.TransportError as error:
            raise self._unavailable(error) from error
        _check(answer)
        return answer

    def _get(self, kind: type[T], path: str) -> T:
        return self._read(kind, "GET", path)

    def _post(self, kind: type[T], path: str, body: object = None) -> T:
        return self._read(kind, "POST", path, body)

    def _read(self, kind: type[T], method: str, path: str, body: object = None) -> T:
        return TypeAdapter(kind).validate_python(self.call(method, path, body))

    def _pages(self, kind: type[T], path: str, **params: Any) -> Iterator[T]:
        """The items of all pages of a listing."""
        items = TypeAdapter(list[kind])  # type: ignore[valid-type]
        cursor = ""
        while True:
            page = self.call("GET", path, **params, limit=PAGE, cursor=cursor)
            yield from items.validate_python(page["items"])
            cursor = page["cursor"]
            if not cursor:
                return

    def _stream(self, kind: type[T], path: str) -> Iterator[T]:
        """The data of server-sent events."""
        adapter = TypeAdapter(kind)
        try:
            with self._http.stream("GET", path) as answer:
                if not answer.is_success:
                    answer.read()
                _check(answer)
                for line in answer.iter_lines():
                    if line.startswith("data:"):
                        yield adapter.validate_json(line.removeprefix("data:"))
        except httpx.TransportError as error:
            raise self._unavailable(error) from error

    def _unavailable(self, error: httpx.TransportError) -> NodeUnavailable:
        return NodeUnavailable(f"no admin API answers at {self._http.base_url}: {error or type(error).__name__}")


def _check(answer: httpx.Response) -> None:
    if answer.is_success:
        return
    try:
        problem = answer.json()
        detail, remedy = str(problem["detail"]), str(problem.get("remedy", ""))
    except (ValueError, KeyError, TypeError, AttributeError):
        detail, remedy = answer.text[:200] or answer.reason_phrase, ""
    raise AdminRefused(answer.status_code, detail, remedy)
