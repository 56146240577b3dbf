"""Jobs of the whole region: any of its APIs lists them, shows them and cancels them.

An API runs its own jobs (``kvstore.admin.jobs``) and tells the catalog how they are; a wish to cancel one that runs elsewhere is
a document too, which the API that runs it heeds within a second or two. Without a catalog, or while it is away, there are the
jobs of this API.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import suppress

import structlog
from pydantic import ValidationError

from kvstore.admin.cached import Cached
from kvstore.admin.catalog import CatalogView
from kvstore.admin.jobs import Jobs
from kvstore.admin.models.jobs import Job, JobState
from kvstore.admin.problems import Problem
from kvstore.catalog.documents import BEGINNING, MAX_DOCUMENT_BYTES, Documents
from kvstore.errors import CatalogUnavailable, KVStoreError
from kvstore.parsing import parse_json

log = structlog.get_logger(__name__)

FOLDER, CANCELS = "jobs", "job-cancels"
ROUND_SECONDS = 1.0
AGAIN_SECONDS = 10.0
RUNNING_LASTS = 30.0
"""A job of which nothing is heard for so long runs no more, or nobody can tell."""
ENDED_LASTS = 86_400.0
CANCEL_SECONDS = 15.0
"""How long whoever cancels waits for the API that runs the job."""


class RegionJobs:
    """The jobs of one API, and through the catalog those of the others. All in one event loop."""

    def __init__(self, jobs: Jobs, catalog: CatalogView | None, url: str) -> None:
        """``url`` is this API's, as others are told it."""
        self._jobs = jobs
        self._catalog = catalog
        self._url = url
        self._told: dict[str, tuple[Job, float]] = {}
        """What the catalog was told last, and when by the monotonic clock."""
        self._mark = BEGINNING
        self._others = Cached(self._read, ROUND_SECONDS)
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Tell and heed, until ``close``."""
        if self._catalog is not None:
            self._task = asyncio.create_task(self._keep_telling(self._catalog))

    async def close(self) -> None:
        """After the jobs were closed: tell what became of them."""
        if self._task is None or self._catalog is None:
            return
        self._task.cancel()
        await asyncio.wait([self._task])
        with suppress(KVStoreError):
            await self._tell(await self._catalog.documents())

    async def all(self) -> list[Job]:
        """Newest first."""
        own = self._jobs.all()
        others = await self._known()
        return sorted([*own, *others.values()], key=lambda job: job.id, reverse=True)

    async def get(self, name: str) -> Job:
        """Raises Problem (404)."""
        try:
            return self._jobs.get(name)
        except Problem:
            others = await self._known()
            if name not in others:
                raise
            return others[name]

    async def cancel(self, name: str) -> Job:
        """Stop one, wherever it runs, and wait for that. Raises Problem (404, 409, 503) and CatalogUnavailable."""
        job = await self.get(name)
        if not job.api or self._catalog is None:
            return await self._jobs.cancel(name)
        if job.state is not JobState.RUNNING:
            raise Problem(409, "not-running", f"the job is {job.state}")
        await (await self._catalog.documents()).put(f"{CANCELS}/{name}", b"", RUNNING_LASTS)
        deadline = time.monotonic() + CANCEL_SECONDS
        while time.monotonic() < deadline:
            await asyncio.sleep(ROUND_SECONDS / 4)
            self._others.forget()
            job = (await self._known()).get(name, job)
            if job.state is not JobState.RUNNING:
                return job
        raise Problem(503, "no-answer", f"{job.api}, which runs the job, has not answered yet", "See the job later.")

    async def watch(self, name: str) -> AsyncIterator[Job]:
        """The job now and at each change, until it has ended or nothing is heard of it. Raises Problem (404)."""
        job = await self.get(name)
        if not job.api:
            async for state in self._jobs.watch(name):
                yield state
            return
        yield job
        while job.state is JobState.RUNNING:
            await asyncio.sleep(ROUND_SECONDS)
            latest = (await self._known()).get(name)
            if latest is None:
                return
            if latest != job:
                job = latest
                yield job

    async def round(self, documents: Documents) -> None:
        """Heed who wants jobs cancelled, then tell what has changed. Raises CatalogUnavailable."""
        page = await documents.read(CANCELS, self._mark)
        if page.restarted:
            self._told.clear()
        self._mark = page.mark
        for document in page.documents:
            with suppress(Problem):  # of another API, or over
                await self._jobs.cancel(document.rest)
                await documents.put(document.name, b"", 0)
        await self._tell(documents)

    async def _keep_telling(self, catalog: CatalogView) -> None:
        while True:
            try:
                await self.round(await catalog.documents())
            except KVStoreError as error:
                log.info("jobs are not told to the region", error=str(error))
                await asyncio.sleep(AGAIN_SECONDS)
            await asyncio.sleep(ROUND_SECONDS)

    async def _tell(self, documents: Documents) -> None:
        now = time.time()
        for job in self._jobs.all():
            known, at = self._told.get(job.id, (None, 0.0))
            running = job.state is JobState.RUNNING
            if known is job and not (running and time.monotonic() - at > AGAIN_SECONDS):
                continue
            lasts = RUNNING_LASTS if running else (job.finished or now) + ENDED_LASTS - now
            if lasts > 0:
                await documents.put(f"{FOLDER}/{job.id}", self._pack(job), lasts)
            self._told[job.id] = job, time.monotonic()

    def _pack(self, job: Job) -> bytes:
        text = job.model_copy(update={"api": self._url}).model_dump_json().encode()
        if len(text) <= MAX_DOCUMENT_BYTES:
            return text
        return self._pack(job.model_copy(update={"result": None, "problem": job.problem or "its result is too long"}))

    async def _known(self) -> dict[str, Job]:
        """Jobs of other APIs; none while the catalog is away."""
        if self._catalog is None:
            return {}
        try:
            others = await self._others()
        except CatalogUnavailable:
            return {}
        own = {job.id for job in self._jobs.all()}
        return {name: job for name, job in others.items() if name not in own}

    async def _read(self) -> dict[str, Job]:
        assert self._catalog is not None
        documents = await self._catalog.documents()
        found: dict[str, Job] = {}
        for document in (await documents.read_all(FOLDER)).values():
            try:
                job = Job.model_validate(parse_json(document.body))
            except (ValueError, ValidationError) as error:
                log.warning("unreadable job", name=document.name, error=str(error))
                continue
            if job.id == document.rest and job.api:
                found[job.id] = job
        return found
