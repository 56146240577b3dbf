"""Long work."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Annotated

from fastapi import APIRouter, Depends, Path, Query
from fastapi.sse import EventSourceResponse, ServerSentEvent

from kvstore.admin.auth import Principal, Role, authorize, reads, require, writes
from kvstore.admin.models.jobs import Job, JobKindInfo, JobPage, JobState, NewJob
from kvstore.admin.paging import Cursor, Limit, page_of
from kvstore.admin.problems import Problem, documented
from kvstore.admin.site import CurrentSite

router = APIRouter(prefix="/v1", tags=["jobs"])

EVENT_SECONDS = 0.1
"""Between two events of a job at least."""


JobId = Annotated[str, Path(max_length=64, description="As the listing shows it.", examples=["01a201a56e9a-b9d337"])]


async def _job(job: JobId, site: CurrentSite) -> Job:
    return await site.all_jobs.get(job)


CurrentJob = Annotated[Job, Depends(_job)]
Operator = Annotated[Principal, authorize(Role.OPERATOR)]


@router.get("/job-kinds", dependencies=reads())
async def job_kinds(site: CurrentSite) -> list[JobKindInfo]:
    """What can be run as a job here."""
    return [
        JobKindInfo(
            name=kind.name, summary=kind.summary, role=kind.role.value, options=kind.options.model_json_schema()
        )
        for kind in site.jobs.kinds
    ]


@router.get("/jobs", dependencies=reads(), responses=documented(422))
async def list_jobs(
    site: CurrentSite,
    state: Annotated[JobState | None, Query(description="Only these.")] = None,
    limit: Limit = 50,
    cursor: Cursor = "",
) -> JobPage:
    """Jobs of all APIs of the region, newest first."""
    jobs = [job for job in await site.all_jobs.all() if state in (None, job.state)]
    items, after = page_of(jobs, lambda job: job.id, cursor, limit)
    return JobPage(items=items, cursor=after)


@router.post("/jobs", dependencies=writes(Role.OPERATOR), status_code=202, responses=documented(404, 409, 422))
async def create_job(wanted: NewJob, site: CurrentSite, who: Operator) -> Job:
    """Start a job. One of a kind runs at a time. Kinds that delete need an admin."""
    require(who, site.jobs.kind(wanted.kind).role)
    return site.jobs.create(wanted.kind, wanted.options)


@router.get("/jobs/{job}", dependencies=reads(), responses=documented(404))
async def show_job(job: CurrentJob) -> Job:
    """One job."""
    return job


@router.get("/jobs/{job}/events", dependencies=reads(), response_class=EventSourceResponse, responses=documented(404))
async def job_events(job: CurrentJob, site: CurrentSite) -> AsyncIterator[ServerSentEvent]:
    """The job as server-sent events of type `job`, one for each change, until it has ended."""
    async for state in site.all_jobs.watch(job.id):
        yield ServerSentEvent(event="job", data=state)
        await asyncio.sleep(EVENT_SECONDS)


@router.post("/jobs/{job}/cancel", dependencies=writes(Role.OPERATOR), responses=documented(404, 409, 503))
async def cancel_job(job: CurrentJob, site: CurrentSite) -> Job:
    """Stop a job, whichever API of the region runs it. What it has done stays done."""
    return await site.all_jobs.cancel(job.id)


@router.post(
    "/jobs/{job}/resume", dependencies=writes(Role.OPERATOR), status_code=202, responses=documented(404, 409, 422)
)
async def resume_job(job: CurrentJob, site: CurrentSite, who: Operator) -> Job:
    """Go on with a job of this API that was cancelled, interrupted or failed. Needs the role that starting it needs."""
    if job.api:
        raise Problem(409, "of-another-api", f"{job.api} runs the job", "Resume it there.")
    require(who, site.jobs.kind(job.kind).role)
    return site.jobs.resume(job.id)
