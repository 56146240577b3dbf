"""The admin API in Python: a thin layer over httpx that gives the API's own models."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from typing import Any, Self, TypeVar

import httpx
from pydantic import TypeAdapter
from pydantic_core import to_json

from kvstore.admin.models.base import TierName
from kvstore.admin.models.blocks import Block, BlockInfo, Deleted, Evicted, Pin, Pinned, Unpinned, Verified
from kvstore.admin.models.jobs import Job, JobKindInfo, JobState
from kvstore.admin.models.policy import DryRun, Mode, Policy
from kvstore.admin.models.prompts import Explanation, HotPrompt, LookupAnswer, Prompt, RouterAnswer
from kvstore.admin.models.status import (
    CatalogInfo,
    ModelInfo,
    NamespaceInfo,
    NodeInfo,
    NodeStatus,
    Readiness,
    SettingInfo,
    Snapshot,
    WarmthStatus,
)
from kvstore.errors import AdminRefused, NodeUnavailable

T = TypeVar("T")

PAGE = 1000


class AdminClient:
    """Calls raise AdminRefused with the API's reason, and NodeUnavailable when no API answers. Thread-safe.

    Every write carries an Idempotency-Key of its own, so that what is sent twice on the way is done once.
    """

    def __init__(
        self, url: str, token: str = "", timeout: float = 30.0, transport: httpx.BaseTransport | None = None
    ) -> None:
        """``url`` as ``http://127.0.0.1:7070``; ``timeout`` in seconds, for each answer; work that takes longer is a job.

        Servers are verified against the system's authorities, or those of ``SSL_CERT_FILE``.
        """
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._http = httpx.Client(
            base_url=url, headers=headers, timeout=timeout, transport=transport or httpx.HTTPTransport(retries=1)
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    # --- status

    def ready(self) -> Readiness:
        """Raises AdminRefused (503) while it is not."""
        return self._get(Readiness, "/readyz")

    def status(self) -> NodeStatus:
        return self._get(NodeStatus, "/v1/status")

    def warmth(self) -> WarmthStatus:
        return self._get(WarmthStatus, "/v1/warmth")

    def nodes(self) -> list[NodeInfo]:
        return self._get(list[NodeInfo], "/v1/nodes")

    def catalog(self) -> CatalogInfo:
        return self._get(CatalogInfo, "/v1/catalog")

    def config(self) -> list[SettingInfo]:
        return self._get(list[SettingInfo], "/v1/config")

    def snapshot(self) -> Snapshot:
        return self._get(Snapshot, "/v1/snapshot")

    def events(self) -> Iterator[Snapshot]:
        """One each second, without end."""
        return self._stream(Snapshot, "/v1/events")

    # --- prompts

    def lookup(self, prompt: Prompt) -> LookupAnswer:
        return self._post(LookupAnswer, "/v1/lookup", _body(prompt))

    def router_lookup(self, prompts: list[Prompt]) -> RouterAnswer:
        body = {"prompts": [_body(prompt) for prompt in prompts]}
        return self._post(RouterAnswer, "/v1/router/lookup", body)

    def explain(self, prompt: Prompt) -> Explanation:
        return self._post(Explanation, "/v1/explain", _body(prompt))

    def hot(self, namespace: str = "") -> Iterator[HotPrompt]:
        return self._pages(HotPrompt, "/v1/hot", namespace=namespace)

    # --- blocks

    def blocks(self, tier: TierName, namespace: str = "", prefix: str = "") -> Iterator[Block]:
        return self._pages(Block, "/v1/blocks", tier=tier.value, namespace=namespace, prefix=prefix)

    def block(self, key: str) -> BlockInfo:
        return self._get(BlockInfo, f"/v1/blocks/{key}")

    def verify(self, key: str) -> Verified:
        return self._post(Verified, f"/v1/blocks/{key}/verify")

    def evict(self, tier: TierName, keys: list[str]) -> Evicted:
        return self._post(Evicted, "/v1/blocks/evict", {"tier": tier.value, "keys": keys})

    def delete(self, keys: list[str]) -> Deleted:
        return self._post(Deleted, "/v1/blocks/delete", {"keys": keys})

    def delete_prompt(self, prompt: Prompt) -> Deleted:
        return self._post(Deleted, "/v1/blocks/delete", {"prompt": _body(prompt)})

    def delete_namespace(self, digest: str) -> Deleted:
        return self._read(Deleted, "DELETE", f"/v1/namespaces/{digest}/blocks")

    def pins(self) -> list[Pin]:
        return self._get(list[Pin], "/v1/pins")

    def pin(self, prompt: Prompt, seconds: float) -> Pinned:
        body = {"prompt": _body(prompt), "seconds": seconds}
        return self._post(Pinned, "/v1/pins", body)

    def unpin(self, key: str) -> Unpinned:
        return self._read(Unpinned, "DELETE", f"/v1/pins/{key}")

    # --- namespaces and policy

    def namespaces(self) -> Iterator[NamespaceInfo]:
        return self._pages(NamespaceInfo, "/v1/namespaces")

    def models(self) -> list[ModelInfo]:
        return self._get(list[ModelInfo], "/v1/models")

    def policy(self) -> Policy:
        return self._get(Policy, "/v1/policy")

    def set_policy(self, mode: Mode) -> Policy:
        return self._read(Policy, "PATCH", "/v1/policy", {"mode": mode.value})

    def dry_run(self, prompt: Prompt) -> DryRun:
        return self._post(DryRun, "/v1/policy/dry-run", _body(prompt))

    # --- jobs

    def job_kinds(self) -> list[JobKindInfo]:
        return self._get(list[JobKindInfo], "/v1/job-kinds")

    def jobs(self, state: JobState | None = None) -> Iterator[Job]:
        """Newest first."""
        return self._pages(Job, "/v1/jobs", **({"state": state.value} if state else {}))

    def job(self, name: str) -> Job:
        return self._get(Job, f"/v1/jobs/{name}")

    def run_job(self, kind: str, options: dict[str, Any] | None = None) -> Job:
        return self._post(Job, "/v1/jobs", {"kind": kind, "options": options or {}})

    def cancel_job(self, name: str) -> Job:
        return self._post(Job, f"/v1/jobs/{name}/cancel")

    def resume_job(self, name: str) -> Job:
        return self._post(Job, f"/v1/jobs/{name}/resume")

    def watch_job(self, name: str) -> Iterator[Job]:
        """At each change, until it has ended."""
        return self._stream(Job, f"/v1/jobs/{name}/events")

    # --- any route, those of other packages too

    def call(self, method: str, path: str, body: object = None, **params: Any) -> Any:
        """The answer's JSON."""
        headers = {} if method == "GET" else {"Idempotency-Key": uuid.uuid4().hex}
        content = None
        if body is not None:
            content = to_json(body)  # of long prompts in a fifth of the time that the standard library takes
            headers["Content-Type"] = "application/json"
        try:
            answer = self._http.request(method, path, content=content, params=params, headers=headers)
        except httpx.TransportError as error:
            raise self._unavailable(error) from error
        _check(answer)
        return answer.json()

    def _get(self, kind: type[T], path: str) -> T:
        return self._read(kind, "GET", path)

    def _post(self, kind: type[T], path: str, body: object = None) -> T:
        return self._read(kind, "POST", path, body)

    def _read(self, kind: type[T], method: str, path: str, body: object = None) -> T:
        return TypeAdapter(kind).validate_python(self.call(method, path, body))

    def _pages(self, kind: type[T], path: str, **params: Any) -> Iterator[T]:
        items = TypeAdapter(list[kind])  # type: ignore[valid-type]
        cursor = ""
        while True:
            page = self.call("GET", path, **params, limit=PAGE, cursor=cursor)
            yield from items.validate_python(page["items"])
            cursor = page["cursor"]
            if not cursor:
                return

    def _stream(self, kind: type[T], path: str) -> Iterator[T]:
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


def _body(prompt: Prompt) -> dict[str, Any]:
    return prompt.model_dump(mode="json", exclude_defaults=True)
