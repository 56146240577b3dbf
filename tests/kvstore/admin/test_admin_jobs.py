"""Jobs: over HTTP with the scrub of a real node, and the registry by itself with jobs that do as they are told."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from api_site import BLOCKS, Site
from pydantic import BaseModel

from kvstore.admin import jobs as jobs_module
from kvstore.admin.jobs import JobKind, Jobs, Running
from kvstore.admin.models.jobs import JobState
from kvstore.admin.problems import Problem
from kvstore.errors import ConfigError, TierUnavailable
from kvstore.testing.node import wait_for


def test_a_scrub_reads_every_tier_and_tells_how_far_it_is(own_api: Site) -> None:
    started = own_api.http.post("/v1/jobs", json={"kind": "scrub", "options": {}})
    assert started.status_code == 202
    name = started.json()["id"]
    events = []
    with own_api.http.stream("GET", f"/v1/jobs/{name}/events") as stream:
        for line in stream.iter_lines():
            if line.startswith("data:"):
                events.append(json.loads(line.removeprefix("data:")))
    assert events[-1]["state"] == "done"
    assert {medium: tier["checked"] for medium, tier in events[-1]["result"]["tiers"].items()} == {
        "host": BLOCKS,
        "disk": BLOCKS,
    }
    assert events[-1]["progress"]["done"] == events[-1]["progress"]["total"] == 2 * BLOCKS
    assert own_api.get(f"/v1/jobs/{name}") == events[-1]
    assert [job["id"] for job in own_api.get("/v1/jobs", state="done")["items"]] == [name]
    assert own_api.get("/v1/jobs", state="running")["items"] == []
    assert own_api.http.post(f"/v1/jobs/{name}/cancel").status_code == 409


@pytest.mark.parametrize(
    ("body", "status"),
    [({"kind": "nonsense"}, 404), ({"kind": "scrub", "options": {"tiers": ["tape"]}}, 422), ({"kind": 1}, 422)],
)
def test_a_job_that_cannot_be_is_refused(shared_api: Site, body: dict[str, object], status: int) -> None:
    assert shared_api.http.post("/v1/jobs", json=body).status_code == status
    assert shared_api.http.get("/v1/jobs/none/events").status_code == 404


def test_jobs_are_paged_newest_first(own_api: Site) -> None:
    names = []
    for _ in range(3):
        name = own_api.post("/v1/jobs", {"kind": "scrub"})["id"]
        names.append(name)
        wait_for(lambda name=name: own_api.get(f"/v1/jobs/{name}")["state"] == "done")
    first = own_api.get("/v1/jobs", limit=2)
    rest = own_api.get("/v1/jobs", limit=2, cursor=first["cursor"])
    assert [job["id"] for job in first["items"] + rest["items"]] == names[::-1]
    assert rest["cursor"] == ""


class Steps(BaseModel):
    count: int = 3
    fail_at: int = -1


class Stepper:
    """A kind of job that goes a step at a time, when it is let."""

    def __init__(self) -> None:
        self.go = asyncio.Semaphore(0)
        self.done: list[int] = []
        self.kind = JobKind("steps", "Counts.", Steps, self._run)

    async def step(self) -> None:
        """Let it go one step, and wait until it has."""
        before = len(self.done)
        self.go.release()
        while len(self.done) == before:
            await asyncio.sleep(0.001)

    async def _run(self, job: Running, options: Steps) -> dict[str, Any]:
        for step in range(job.checkpoint.get("next", 0), options.count):
            await self.go.acquire()
            if step == options.fail_at:
                options.fail_at = -1
                raise TierUnavailable("the disk is away")
            self.done.append(step)
            job.report(step + 1, options.count, checkpoint={"next": step + 1})
            await asyncio.sleep(0)
        return {"steps": len(self.done)}


async def settled(jobs: Jobs, name: str) -> JobState:
    async for job in jobs.watch(name):
        last = job
    return last.state


async def test_a_cancelled_job_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    jobs, stepper = Jobs(tmp_path), Stepper()
    jobs.register(stepper.kind)
    name = jobs.create("steps", {}).id
    await stepper.step()
    assert (await jobs.cancel(name)).state is JobState.CANCELLED
    assert stepper.done == [0]
    stepper.go = asyncio.Semaphore(9)
    assert jobs.resume(name).attempts == 2
    assert await settled(jobs, name) is JobState.DONE
    assert stepper.done == [0, 1, 2]
    with pytest.raises(Problem, match="done"):
        jobs.resume(name)
    await jobs.close()


async def test_a_job_is_interrupted_by_the_end_of_the_api_and_resumed_by_the_next(tmp_path: Path) -> None:
    jobs, stepper = Jobs(tmp_path), Stepper()
    jobs.register(stepper.kind)
    name = jobs.create("steps", {"count": 4}).id
    await stepper.step()
    await jobs.close()
    after = Jobs(tmp_path)
    after.register(stepper.kind)
    assert after.get(name).state is JobState.INTERRUPTED
    stepper.go = asyncio.Semaphore(9)
    after.resume(name)
    assert await settled(after, name) is JobState.DONE
    assert stepper.done == [0, 1, 2, 3]
    await after.close()


async def test_a_job_that_was_killed_with_its_api_is_interrupted(tmp_path: Path) -> None:
    jobs, stepper = Jobs(tmp_path), Stepper()
    jobs.register(stepper.kind)
    name = jobs.create("steps", {}).id
    left = (tmp_path / f"{name}.json").read_text()
    await jobs.close()
    (tmp_path / f"{name}.json").write_text(left)
    assert json.loads(left)["job"]["state"] == "running"
    after = Jobs(tmp_path)
    assert after.get(name).state is JobState.INTERRUPTED
    await after.close()


async def test_a_failure_is_told_and_can_be_resumed(tmp_path: Path) -> None:
    jobs, stepper = Jobs(tmp_path), Stepper()
    jobs.register(stepper.kind)
    stepper.go = asyncio.Semaphore(9)
    name = jobs.create("steps", {"fail_at": 1}).id
    assert await settled(jobs, name) is JobState.FAILED
    assert jobs.get(name).problem == "the disk is away"
    jobs.resume(name)
    assert await settled(jobs, name) is JobState.FAILED  # its options still say so
    await jobs.close()


async def test_a_defect_fails_the_job_and_not_the_api(tmp_path: Path) -> None:
    async def broken(job: Running, options: Steps) -> dict[str, Any]:
        raise ZeroDivisionError

    jobs = Jobs(tmp_path)
    jobs.register(JobKind("broken", "Breaks.", Steps, broken))
    name = jobs.create("broken", {}).id
    assert await settled(jobs, name) is JobState.FAILED
    assert "defect" in jobs.get(name).problem
    await jobs.close()


async def test_one_of_a_kind_runs_at_a_time(tmp_path: Path) -> None:
    jobs, stepper = Jobs(tmp_path), Stepper()
    jobs.register(stepper.kind)
    jobs.create("steps", {})
    with pytest.raises(Problem, match="is running"):
        jobs.create("steps", {})
    await jobs.close()


async def test_history_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs_module, "MOST_KEPT", 3)
    jobs, stepper = Jobs(tmp_path), Stepper()
    jobs.register(stepper.kind)
    names = []
    for _ in range(5):
        names.append(jobs.create("steps", {"count": 0}).id)
        await settled(jobs, names[-1])
    assert [job.id for job in jobs.all()] == names[:0:-1]
    assert len(list(tmp_path.glob("*.json"))) == 4  # the oldest go when a new one starts
    await jobs.close()


async def test_a_folder_has_one_api_and_bad_files_do_no_harm(tmp_path: Path) -> None:
    (tmp_path / "0123456789ab-012345.json").write_text("{nonsense")
    (tmp_path / "other.json").write_text(json.dumps({"job": {}, "checkpoint": {}}))
    jobs = Jobs(tmp_path)
    assert jobs.all() == []
    with pytest.raises(ConfigError, match="another API"):
        Jobs(tmp_path)
    await jobs.close()
    await Jobs(tmp_path).close()
