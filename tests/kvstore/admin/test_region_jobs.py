"""Jobs of a region: any of its APIs shows and cancels what another one runs."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from kvstore.admin import regionjobs
from kvstore.admin.client import AdminClient
from kvstore.admin.jobs import JobKind, Running
from kvstore.admin.kinds import NoOptions
from kvstore.admin.models.jobs import Job, JobState
from kvstore.catalog import open_catalog
from kvstore.testing.admin import RunningApi
from kvstore.testing.node import wait_for
from kvstore.testing.redis import redis_server
from kvstore.testing.servers import ServerUnavailable


async def _wait(job: Running, options: NoOptions) -> dict[str, Any]:
    """Goes on until it is cancelled."""
    job.report(1, 3, "steps")
    await asyncio.Event().wait()
    return {}


async def _end(job: Running, options: NoOptions) -> dict[str, Any]:
    return {"done": True}


KINDS = [JobKind("wait", "Waits.", NoOptions, _wait), JobKind("end", "Ends.", NoOptions, _end)]


@dataclass
class Region:
    """A catalog, and APIs without nodes, as of the replicas of a regional service."""

    folder: Path
    catalog: str
    stack: ExitStack
    count: int = 0

    def api(self) -> RunningApi:
        self.count += 1
        settings = (f"object.url=file://{self.folder}/bucket", f"catalog.url={self.catalog}")
        running = RunningApi(self.folder / str(self.count), *settings, node=False)
        for kind in KINDS:
            running.site.jobs.register(kind)
        self.stack.callback(running.stop)
        return running

    def client(self, api: RunningApi) -> AdminClient:
        return self.stack.enter_context(AdminClient(api.url))


@pytest.fixture(params=["sqlite", "redis"])
def region(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Region]:
    monkeypatch.setattr(regionjobs, "ROUND_SECONDS", 0.05)
    with tempfile.TemporaryDirectory(prefix="kvj-") as name, ExitStack() as stack:
        url = f"sqlite://{name}/catalog.db"
        if request.param == "redis":
            try:
                url = stack.enter_context(redis_server(append_only=False)).url
            except ServerUnavailable as error:
                pytest.skip(str(error))
        yield Region(Path(name), url, stack)


def state(client: AdminClient, name: str) -> JobState | None:
    """As the list has it; None: it does not."""
    return next((job.state for job in client.jobs() if job.id == name), None)


def test_any_api_shows_and_cancels_what_another_one_runs(region: Region) -> None:
    one, two = region.api(), region.api()
    here, there = region.client(one), region.client(two)
    job = here.run_job("wait")
    wait_for(lambda: state(there, job.id) is JobState.RUNNING)
    shown = there.job(job.id)
    assert (shown.api, shown.kind, shown.progress.total) == (one.url, "wait", 3)
    assert here.job(job.id).api == ""
    assert there.cancel_job(job.id).state is JobState.CANCELLED
    assert here.job(job.id).state is JobState.CANCELLED
    wait_for(lambda: there.job(job.id).finished is not None)
    with httpx.Client(base_url=two.url) as http:
        assert http.post(f"/v1/jobs/{job.id}/cancel").status_code == 409
        answer = http.post(f"/v1/jobs/{job.id}/resume")
        assert answer.status_code == 409
        assert one.url in answer.text
    here.resume_job(job.id)
    wait_for(lambda: there.job(job.id).state is JobState.RUNNING)
    assert here.job(job.id).state is JobState.RUNNING, "an old wish to cancel it is over"


def test_events_of_a_job_that_runs_elsewhere_end_with_it(region: Region) -> None:
    one, two = region.api(), region.api()
    here, there = region.client(one), region.client(two)
    job = here.run_job("end")
    wait_for(lambda: state(there, job.id) is JobState.DONE)
    last = list(there.watch_job(job.id))[-1]
    assert (last.state, last.result, last.api) == (JobState.DONE, {"done": True}, one.url)


def test_a_job_whose_api_stops_is_interrupted_for_all(region: Region) -> None:
    one, two = region.api(), region.api()
    there = region.client(two)
    job = region.client(one).run_job("wait")
    wait_for(lambda: state(there, job.id) is JobState.RUNNING)
    one.stop()
    wait_for(lambda: state(there, job.id) is JobState.INTERRUPTED)


def test_what_is_no_job_is_passed_over_and_a_lost_catalog_told_again(region: Region) -> None:
    one, two = region.api(), region.api()
    here, there = region.client(one), region.client(two)
    job = here.run_job("end")

    async def damage() -> None:
        catalog = await open_catalog(region.catalog, f"file://{region.folder}/bucket")
        sound = Job.model_validate(here.job(job.id).model_dump()).model_copy(update={"api": "http://elsewhere"})
        for name, body in (("a", b""), ("b", b"{}"), ("c", sound.model_dump_json().encode())):
            await catalog.documents.put(f"{regionjobs.FOLDER}/{name}", body, 60)
        await catalog.documents.put(f"{regionjobs.FOLDER}/{job.id}", b"", 0)
        await catalog.reset()  # a reader cannot tell that from a lost one
        await catalog.close()

    wait_for(lambda: state(there, job.id) is JobState.DONE)
    asyncio.run(damage())
    wait_for(lambda: [each.id for each in there.jobs()] == [job.id])
