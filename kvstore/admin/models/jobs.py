"""Long work."""

from __future__ import annotations

from enum import StrEnum
from typing import Any

from pydantic import ConfigDict, Field

from kvstore.admin.models.base import Model, Wanted


class JobState(StrEnum):
    """What became of a job."""

    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    """It broke off; ``problem`` says why. It can be resumed."""
    CANCELLED = "cancelled"
    """Somebody stopped it. It can be resumed."""
    INTERRUPTED = "interrupted"
    """The API ended under it. It can be resumed."""


class JobProgress(Model):
    """How far a job is."""

    done: float = 0
    total: float | None = Field(None, description="null while nobody knows.")
    unit: str = Field("", examples=["blocks"])
    note: str = Field("", description="What it is at.", examples=["disk"])


class Job(Model):
    """A piece of long work."""

    id: str = Field(examples=["019a2b3c4d5e-9f8e7d"])
    kind: str = Field(examples=["scrub"])
    options: dict[str, Any]
    state: JobState
    created: float
    started: float | None = None
    finished: float | None = None
    attempts: int = Field(1, description="Grows with each time it is resumed.")
    progress: JobProgress = JobProgress()
    result: dict[str, Any] | None = None
    problem: str = Field("", description="Why it failed.")
    api: str = Field("", description="Address of the other API of the region that runs it; empty: this one does.")


class JobPage(Model):
    """Jobs, newest first."""

    items: list[Job]
    cursor: str = Field("", description="Ask again with it for more; empty at the end.")


class JobKindInfo(Model):
    """A kind of job and what it may be asked."""

    name: str = Field(examples=["scrub"])
    summary: str
    role: str = Field(description="What starting one needs.", examples=["operator"])
    options: dict[str, Any] = Field(description="JSON schema of the options.")


class NewJob(Wanted):
    """Start a job."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"kind": "scrub", "options": {"tiers": ["disk"]}}]})

    kind: str = Field(max_length=64, examples=["scrub"])
    options: dict[str, Any] = Field(default_factory=dict)
