"""Long work: started by a request, followed, cancelled, taken up again.

A job is one small JSON file in the jobs folder, replaced whole. A job that was running when the API ended is ``interrupted``:
resumed, it goes on from its last checkpoint. One job of a kind runs at a time.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import re
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import structlog
from pydantic import BaseModel, ValidationError

from kvstore.admin.auth import Role
from kvstore.admin.models.jobs import Job, JobProgress, JobState
from kvstore.admin.problems import Problem
from kvstore.errors import ConfigError, KVStoreError
from kvstore.files import replace_file
from kvstore.parsing import parse_json

log = structlog.get_logger(__name__)

MOST_KEPT = 200
"""Jobs that have ended, the latest; older ones are forgotten."""
SAVE_SECONDS = 1.0
"""How often progress is written down: after a crash a job goes on from there."""
MAX_FILE_BYTES = 4 << 20

_ID = re.compile(r"[0-9a-f]{12}-[0-9a-f]{6}")


@dataclass(frozen=True, slots=True)
class JobKind:
    """What can be run as a job."""

    name: str
    summary: str
    """One line for people."""
    options: type[BaseModel]
    """Checks what the request asks for."""
    run: Callable[[Running, Any], Awaitable[dict[str, Any]]]
    """Does it, with an instance of ``options``; what it returns is the job's result, in plain JSON types.

    Cancelled, it stops soon and leaves things in order. A KVStoreError it raises fails the job with its message.
    """
    role: Role = Role.OPERATOR
    """What starting or resuming it needs."""


class Running:
    """A job's own view of itself, for the function that does the work."""

    def __init__(self, entry: _Entry, save: Callable[[_Entry, bool], None]) -> None:
        self._entry = entry
        self._save = save

    @property
    def checkpoint(self) -> dict[str, Any]:
        """What an earlier run noted last; empty at first."""
        return self._entry.checkpoint

    def report(
        self,
        done: float,
        total: float | None = None,
        unit: str = "",
        note: str = "",
        checkpoint: dict[str, Any] | None = None,
    ) -> None:
        """Say how far it is. ``checkpoint``, in plain JSON types, is where a later run would go on. In the event loop."""
        progress = JobProgress(done=done, total=total, unit=unit, note=note)
        if checkpoint is not None:
            self._entry.checkpoint = checkpoint
        self._entry.change(progress=progress)
        self._save(self._entry, False)


@dataclass(eq=False)
class _Entry:
    job: Job
    checkpoint: dict[str, Any] = field(default_factory=dict)
    task: asyncio.Task[None] | None = None
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    saved_at: float = 0.0

    def change(self, **fields: Any) -> None:
        self.job = self.job.model_copy(update=fields)
        self.changed.set()
        self.changed = asyncio.Event()


class Jobs:
    """The jobs of one API. All in one event loop, but the constructor."""

    def __init__(self, directory: Path) -> None:
        """Read what earlier runs left in ``directory``. Raises ConfigError when another API uses it."""
        self._directory = directory
        self._kinds: dict[str, JobKind] = {}
        self._entries: dict[str, _Entry] = {}
        self._closing = False
        self._latest = 0
        try:
            directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._lock = (directory / "lock").open("a")
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            problem = "another API runs there" if isinstance(error, BlockingIOError) else error.strerror or str(error)
            raise ConfigError(
                "node.directory", str(directory), problem, "Stop that API, or choose another folder."
            ) from None
        for path in sorted(directory.glob("*.json")):
            if (entry := _read(path)) is not None:
                self._entries[entry.job.id] = entry
                if entry.job.state is JobState.RUNNING:
                    entry.change(state=JobState.INTERRUPTED, finished=time.time())
                    self._save(entry)

    # --- kinds

    def register(self, kind: JobKind) -> None:
        self._kinds[kind.name] = kind

    def kind(self, name: str) -> JobKind:
        """Raises Problem (404)."""
        if name not in self._kinds:
            kinds = sorted(self._kinds)
            remedy = f"There are: {', '.join(kinds)}."
            raise Problem(404, "no-such-job-kind", f"there are no jobs of kind {name!r} here", remedy, kinds=kinds)
        return self._kinds[name]

    @property
    def kinds(self) -> list[JobKind]:
        return [self._kinds[name] for name in sorted(self._kinds)]

    # --- jobs

    def all(self) -> list[Job]:
        """Newest first."""
        return [self._entries[name].job for name in sorted(self._entries, reverse=True)]

    def get(self, name: str) -> Job:
        """Raises Problem (404)."""
        return self._entry(name).job

    def create(self, kind: str, options: dict[str, Any]) -> Job:
        """Start one. Raises Problem: 404 for an unknown kind, 422 for options that do not fit, 409 while one runs."""
        known = self.kind(kind)
        wanted = _checked(known, options)
        self._must_be_free(kind)
        self._latest = max(time.time_ns() // 1_000_000, self._latest + 1)  # so that names are in order
        name = f"{self._latest:012x}-{secrets.token_hex(3)}"
        job = Job(
            id=name, kind=kind, options=wanted.model_dump(mode="json"), state=JobState.RUNNING, created=time.time()
        )
        entry = self._entries[name] = _Entry(job)
        self._forget()
        return self._start(entry, known, wanted)

    def resume(self, name: str) -> Job:
        """Go on with one that did not end by itself, from its checkpoint. Raises Problem (404, 409)."""
        entry = self._entry(name)
        if entry.job.state in (JobState.RUNNING, JobState.DONE):
            raise Problem(409, "not-resumable", f"the job is {entry.job.state}")
        known = self.kind(entry.job.kind)
        self._must_be_free(known.name)
        entry.change(state=JobState.RUNNING, finished=None, problem="", result=None, attempts=entry.job.attempts + 1)
        return self._start(entry, known, _checked(known, entry.job.options))

    async def cancel(self, name: str) -> Job:
        """Stop one and wait for that. Raises Problem (404, 409)."""
        entry = self._entry(name)
        if entry.task is None:
            raise Problem(409, "not-running", f"the job is {entry.job.state}")
        entry.task.cancel()
        await asyncio.wait([entry.task])
        return entry.job

    async def watch(self, name: str) -> AsyncIterator[Job]:
        """The job now and at each change, until it has ended. Who is slow misses states between. Raises Problem (404)."""
        entry = self._entry(name)
        while True:
            job, changed = entry.job, entry.changed
            yield job
            if job.state is not JobState.RUNNING:
                return
            await changed.wait()

    async def close(self) -> None:
        """Interrupt what runs, and let another API have the folder."""
        self._closing = True
        tasks = [entry.task for entry in self._entries.values() if entry.task is not None]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        self._lock.close()

    # --- inside

    def _start(self, entry: _Entry, kind: JobKind, options: BaseModel) -> Job:
        entry.change(started=time.time())
        self._save(entry)
        entry.task = asyncio.create_task(self._run(entry, kind, options))
        return entry.job

    async def _run(self, entry: _Entry, kind: JobKind, options: BaseModel) -> None:
        state, problem, result = JobState.FAILED, "", None
        try:
            result = await kind.run(Running(entry, self._save), options)
            state = JobState.DONE
        except asyncio.CancelledError:
            state = JobState.INTERRUPTED if self._closing else JobState.CANCELLED
        except (KVStoreError, Problem) as error:
            problem = str(error)
        except Exception as error:
            log.error("job failed", job=entry.job.id, kind=kind.name, exc_info=error)
            problem = "this is a defect; the API's log has the details"
        entry.task = None
        entry.change(state=state, problem=problem, result=result, finished=time.time())
        self._save(entry)

    def _entry(self, name: str) -> _Entry:
        if name not in self._entries:
            raise Problem(404, "no-such-job", f"there is no job {name!r}", "See /v1/jobs.")
        return self._entries[name]

    def _must_be_free(self, kind: str) -> None:
        for entry in self._entries.values():
            if entry.job.kind == kind and entry.task is not None:
                raise Problem(
                    409, "job-running", f"job {entry.job.id} of kind {kind} is running", "Wait, or cancel it."
                )

    def _forget(self) -> None:
        ended = [name for name in sorted(self._entries) if self._entries[name].job.finished is not None]
        for name in ended[: max(len(ended) - MOST_KEPT, 0)]:
            del self._entries[name]
            self._path(name).unlink(missing_ok=True)

    def _path(self, name: str) -> Path:
        return self._directory / f"{name}.json"

    def _save(self, entry: _Entry, now: bool = True) -> None:
        if not now and time.monotonic() - entry.saved_at < SAVE_SECONDS:
            return
        entry.saved_at = time.monotonic()
        text = json.dumps({"job": entry.job.model_dump(mode="json"), "checkpoint": entry.checkpoint})
        try:
            replace_file(self._path(entry.job.id), text.encode())
        except OSError as error:
            log.warning("job not written down", job=entry.job.id, error=str(error))


def _read(path: Path) -> _Entry | None:
    try:
        with path.open("rb") as file:
            document = parse_json(file.read(MAX_FILE_BYTES))
        entry = _Entry(Job.model_validate(document["job"]), dict(document["checkpoint"]))
        if not _ID.fullmatch(entry.job.id) or path.stem != entry.job.id:
            raise ValueError("the file is named otherwise")
        return entry
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.warning("job not read", file=str(path), error=str(error))
        return None


def _checked(kind: JobKind, options: dict[str, Any]) -> BaseModel:
    try:
        return kind.options.model_validate(options)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = ".".join(str(part) for part in ("options", *first["loc"]))
        known = ", ".join(kind.options.model_fields) or "none"
        remedy = f"Options of {kind.name}: {known}; see /v1/job-kinds."
        raise Problem(422, "invalid-request", f"{name}: {first['msg']}", remedy) from None
