"""Jobs of a region for the admin API: warming its node, planning a replication, replicating anew."""

from __future__ import annotations

import asyncio
import threading
import time
from functools import partial
from typing import Any

from pydantic import Field

from kvstore.admin.jobs import JobKind, Running
from kvstore.admin.kinds import NoOptions
from kvstore.admin.models.base import Wanted
from kvstore.config import Config
from kvstore.config.schema import Bytes
from kvstore.errors import KVStoreError
from kvstore.node.client import Client
from kvstore.tenants.credentials import operator_token
from replication.copier import Outcome
from replication.cycle import Cycle, FlowReport
from replication.hotset import read_namespaces, usual_hot_set
from replication.lease import LeaseTaken, hold
from replication.manifest import HotBlock
from replication.rate import RateLimit
from replication.replicator import Replicator
from replication.site import Site
from replication.warmfile import WarmthFile
from replication.warmup import Warmer, WarmReport


class WarmOptions(Wanted):
    """How much to bring, and how fast."""

    budget: Bytes | None = Field(
        None, ge=0, description="Bytes to have on the node; else most of its disk.", examples=["100GiB"]
    )
    rate: Bytes | None = Field(
        None, ge=1, description="Bytes per second to take from the bucket at most.", examples=["200MiB"]
    )


def warm_kind(config: Config) -> JobKind:
    async def run(job: Running, options: WarmOptions) -> dict[str, Any]:
        async with Site(config).open_contents() as contents:
            hot = await usual_hot_set(contents, time.time())
            namespaces = await read_namespaces(contents.bucket)
        report, told, stop = WarmReport(), WarmthFile(config.node.directory), threading.Event()
        loop = asyncio.get_running_loop()

        def progress(report: WarmReport) -> None:
            if stop.is_set():
                raise KeyboardInterrupt  # what ends a Warmer
            told.progress(report)
            loop.call_soon_threadsafe(job.report, report.warm_bytes, report.planned_bytes, "bytes")

        def work() -> None:
            problem = "it broke off"
            try:
                with Client(config.node.socket, name="warm-up", token=partial(operator_token, config)) as client:
                    warmer = Warmer(client, config.identity.tenant, RateLimit(options.rate), progress, report)
                    warmer.run(hot, namespaces, options.budget)
                problem = ""
            except KVStoreError as error:
                problem = str(error)
                raise
            finally:
                told.end(report, problem)

        working = asyncio.create_task(asyncio.to_thread(work))
        try:
            await asyncio.shield(working)
        except asyncio.CancelledError:
            stop.set()
            await asyncio.wait([working])
            raise
        return {
            "share": report.ready,
            "blocks": dict(report.blocks),
            "bytes_from_bucket": report.nbytes,
            "seconds": report.seconds,
            "skipped": dict(report.skipped),
        }

    summary = "Fill this machine's node from its bucket, hottest prompts first."
    return JobKind("warm", summary, WarmOptions, run)


def plan_kind(site: Site) -> JobKind:
    async def run(job: Running, options: NoOptions) -> dict[str, Any]:
        async with _replicator(site) as replicator:
            return _document(await replicator.plan())

    summary = "Say what a replication would copy now, and what it would cost. Changes nothing."
    return JobKind("replication-plan", summary, NoOptions, run)


def resync_kind(site: Site) -> JobKind:
    async def run(job: Running, options: NoOptions) -> dict[str, Any]:
        from kvstore.assembly import rebuild_catalog

        listed: int | None = None
        async with site.open_catalog() as catalog:
            if catalog is not None:
                told = lambda blocks: job.report(blocks, unit="blocks", note="filling the catalog")  # noqa: E731
                listed = await rebuild_catalog(site.config, catalog, told)
        copied = 0

        def advance(report: FlowReport, block: HotBlock, outcome: Outcome) -> None:
            nonlocal copied
            copied += block.nbytes * (outcome is Outcome.COPIED)
            job.report(copied, unit="bytes", note=f"copying from {report.source}")

        async with _replicator(site) as replicator:
            if replicator.topology.mode != "enforce":
                return {"listed": listed, **_document(await replicator.plan())}
            try:
                async with hold(replicator.near, "replicator"):
                    cycle = await replicator.cycle(advance)
            except LeaseTaken as taken:
                return {"listed": listed, "left_to": str(taken)}
        return {"listed": listed, **_document(cycle)}

    summary = (
        "List the bucket anew and copy what it lacks, if the topology's mode is enforce and no service copies already."
    )
    return JobKind("resync", summary, NoOptions, run)


def _replicator(site: Site) -> Any:
    assert site.topology is not None
    return Replicator.open(site.topology, site.region, capacity=site.capacity)


def _document(cycle: Cycle) -> dict[str, Any]:
    return {
        "flows": [
            {
                "source": report.source,
                "flow": report.flow,
                "blocks": len(report.plan.blocks),
                "bytes": report.plan.nbytes,
                "cost": report.cost,
                "left_out": {reason.value: tally.blocks for reason, tally in report.plan.left_out.items()},
                "copied": {outcome.value: count for outcome, count in report.copied.outcomes.items()},
            }
            for report in cycle.flows
        ],
        "problems": cycle.problems,
        "lag_seconds": cycle.lag,
        "buried": cycle.buried,
    }
