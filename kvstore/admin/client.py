"""The admin API in Python, with the API's own models."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

from kvstore.admin.calls import PAGE, Calls
from kvstore.admin.models.base import TierName
from kvstore.admin.models.blocks import (
    Block,
    BlockInfo,
    Deleted,
    Evicted,
    Pin,
    Pinned,
    PromptBlock,
    PromptBlocks,
    Unpinned,
    Verified,
)
from kvstore.admin.models.insight import BreakerReport, Tree
from kvstore.admin.models.jobs import Job, JobKindInfo, JobState
from kvstore.admin.models.policy import DryRun, Mode, Policy
from kvstore.admin.models.prompts import Explanation, HotPrompt, LookupAnswer, Prompt, RouterAnswer, RouterPeeked
from kvstore.admin.models.replication import Paused, PurgeProof, RegionHolding, ReplicationStatus, TopologyInfo
from kvstore.admin.models.status import (
    CatalogInfo,
    ClientStatus,
    Health,
    ModelInfo,
    NamespaceInfo,
    NodeInfo,
    NodeStatus,
    Readiness,
    SettingInfo,
    Snapshot,
    TierStatus,
    WarmthStatus,
    WhoAmI,
)
from kvstore.admin.models.tenants import (
    CreatedTenant,
    NewTenant,
    Removed,
    RotatedSecret,
    RotatedToken,
    TenantChange,
    TenantInfo,
    TenantPurge,
)


class AdminClient(Calls):
    """One method for each route; see ``Calls`` for what they raise."""

    # --- status

    def ready(self) -> Readiness:
        """Raises AdminRefused (503) while it is not."""
        return self._get(Readiness, "/readyz")

    def health(self) -> Health:
        return self._get(Health, "/healthz")

    def whoami(self) -> WhoAmI:
        """Whose token this is, and what it may do."""
        return self._get(WhoAmI, "/v1/whoami")

    def status(self) -> NodeStatus:
        return self._get(NodeStatus, "/v1/status")

    def tiers(self) -> list[TierStatus]:
        return self._get(list[TierStatus], "/v1/tiers")

    def tier(self, tier: TierName) -> TierStatus:
        return self._get(TierStatus, f"/v1/tiers/{tier.value}")

    def clients(self) -> list[ClientStatus]:
        return self._get(list[ClientStatus], "/v1/clients")

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

    def metrics(self) -> str:
        """In Prometheus' text format."""
        return self._answer("GET", "/metrics").text

    # --- prompts

    def lookup(self, prompt: Prompt) -> LookupAnswer:
        return self._post(LookupAnswer, "/v1/lookup", _body(prompt))

    def router_lookup(self, prompts: list[Prompt], timeout: float = 0.1) -> RouterAnswer:
        """``timeout``: seconds that nodes have to answer, at most 10; the others go without."""
        body = {"prompts": [_body(prompt) for prompt in prompts], "timeout_seconds": timeout}
        return self._post(RouterAnswer, "/v1/router/lookup", body)

    def router_peek(self, chains: list[bytes]) -> RouterPeeked:
        """The same of chains of joined keys, on this node alone."""
        return self._post(RouterPeeked, "/v1/router/peek", {"chains": [chain.hex() for chain in chains]})

    def explain(self, prompt: Prompt) -> Explanation:
        return self._post(Explanation, "/v1/explain", _body(prompt))

    def hot(self, namespace: str = "") -> Iterator[HotPrompt]:
        return self._pages(HotPrompt, "/v1/hot", namespace=namespace)

    def tree(self, prompt: Prompt) -> Tree:
        return self._post(Tree, "/v1/tree", _body(prompt))

    def breakers(self) -> BreakerReport:
        return self._get(BreakerReport, "/v1/breakers")

    # --- blocks

    def blocks(self, tier: TierName, namespace: str = "", prefix: str = "") -> Iterator[Block]:
        return self._pages(Block, "/v1/blocks", tier=tier.value, namespace=namespace, prefix=prefix)

    def blocks_of(self, prompt: Prompt) -> Iterator[PromptBlock]:
        """In chain order, those that no tier holds among them."""
        cursor = ""
        while True:
            body = {"prompt": _body(prompt), "limit": PAGE, "cursor": cursor}
            page = self._post(PromptBlocks, "/v1/blocks/query", body)
            yield from page.items
            if not (cursor := page.cursor):
                return

    def block(self, key: str) -> BlockInfo:
        return self._get(BlockInfo, f"/v1/blocks/{_part(key)}")

    def verify(self, key: str) -> Verified:
        return self._post(Verified, f"/v1/blocks/{_part(key)}/verify")

    def evict(self, tier: TierName, keys: list[str]) -> Evicted:
        return self._post(Evicted, "/v1/blocks/evict", {"tier": tier.value, "keys": keys})

    def evict_prompt(self, tier: TierName, prompt: Prompt) -> Evicted:
        return self._post(Evicted, "/v1/blocks/evict", {"tier": tier.value, "prompt": _body(prompt)})

    def delete(self, keys: list[str]) -> Deleted:
        return self._post(Deleted, "/v1/blocks/delete", {"keys": keys})

    def delete_block(self, key: str) -> Deleted:
        return self._read(Deleted, "DELETE", f"/v1/blocks/{_part(key)}")

    def delete_prompt(self, prompt: Prompt) -> Deleted:
        return self._post(Deleted, "/v1/blocks/delete", {"prompt": _body(prompt)})

    def delete_namespace(self, digest: str) -> Deleted:
        return self._read(Deleted, "DELETE", f"/v1/namespaces/{_part(digest)}/blocks")

    def pins(self) -> list[Pin]:
        return self._get(list[Pin], "/v1/pins")

    def pin(self, prompt: Prompt, seconds: float) -> Pinned:
        body = {"prompt": _body(prompt), "seconds": seconds}
        return self._post(Pinned, "/v1/pins", body)

    def unpin(self, key: str) -> Unpinned:
        return self._read(Unpinned, "DELETE", f"/v1/pins/{_part(key)}")

    # --- namespaces and policy

    def namespaces(self) -> Iterator[NamespaceInfo]:
        return self._pages(NamespaceInfo, "/v1/namespaces")

    def namespace(self, digest: str) -> NamespaceInfo:
        return self._get(NamespaceInfo, f"/v1/namespaces/{_part(digest)}")

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
        return self._get(Job, f"/v1/jobs/{_part(name)}")

    def run_job(self, kind: str, options: dict[str, Any] | None = None) -> Job:
        return self._post(Job, "/v1/jobs", {"kind": kind, "options": options or {}})

    def cancel_job(self, name: str) -> Job:
        return self._post(Job, f"/v1/jobs/{_part(name)}/cancel")

    def resume_job(self, name: str) -> Job:
        return self._post(Job, f"/v1/jobs/{_part(name)}/resume")

    def watch_job(self, name: str) -> Iterator[Job]:
        """At each change, until it has ended."""
        return self._stream(Job, f"/v1/jobs/{_part(name)}/events")

    # --- tenants

    def tenants(self) -> Iterator[TenantInfo]:
        """By name."""
        return self._pages(TenantInfo, "/v1/tenants")

    def tenant(self, name: str) -> TenantInfo:
        return self._get(TenantInfo, f"/v1/tenants/{_part(name)}")

    def create_tenant(self, wanted: NewTenant) -> CreatedTenant:
        """The answer has its token and its secret, this once."""
        return self._post(CreatedTenant, "/v1/tenants", wanted.model_dump(mode="json"))

    def change_tenant(self, name: str, change: TenantChange) -> TenantInfo:
        return self._read(TenantInfo, "PATCH", f"/v1/tenants/{_part(name)}", change.model_dump(exclude_unset=True))

    def remove_tenant(self, name: str) -> Removed:
        return self._read(Removed, "DELETE", f"/v1/tenants/{_part(name)}")

    def rotate_secret(self, name: str, secret: str = "") -> RotatedSecret:
        """``secret``: in hexadecimal, what another node made; empty: a new one."""
        return self._post(RotatedSecret, f"/v1/tenants/{_part(name)}/rotate-secret", {"secret": secret})

    def rotate_token(self, name: str) -> RotatedToken:
        return self._post(RotatedToken, f"/v1/tenants/{_part(name)}/rotate-token")

    def purge_tenant(self, name: str) -> TenantPurge:
        return self._post(TenantPurge, f"/v1/tenants/{_part(name)}/purge")

    def purge_proof(self, tombstone: str) -> PurgeProof:
        """Which nodes and regions have carried a purge out, and what is left."""
        return self._get(PurgeProof, f"/v1/purges/{_part(tombstone)}")

    # --- replication

    def replication(self) -> ReplicationStatus:
        return self._get(ReplicationStatus, "/v1/replication")

    def topology(self) -> TopologyInfo:
        return self._get(TopologyInfo, "/v1/replication/topology")

    def pause_replication(self, sources: list[str]) -> Paused:
        """Of all sources, if none is named."""
        return self._post(Paused, "/v1/replication/pause", {"sources": sources})

    def resume_replication(self, sources: list[str]) -> Paused:
        return self._post(Paused, "/v1/replication/resume", {"sources": sources})

    def holdings(self, chain: bytes) -> list[RegionHolding]:
        """What the regions have of a chain of joined keys."""
        return self._post(list[RegionHolding], "/v1/replication/holdings", {"keys": chain.hex()})


def _part(name: str) -> str:
    """One part of a path, whatever is in it."""
    return quote(name, safe="")


def _body(prompt: Prompt) -> dict[str, Any]:
    return prompt.model_dump(mode="json", exclude_defaults=True)
