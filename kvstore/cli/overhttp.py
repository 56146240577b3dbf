"""Commands that talk to the admin API: ``kvstore jobs`` and ``kvstore policy``."""

from __future__ import annotations

import json as jsonlib
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvstore.cli import options
from kvstore.cli.output import ago, note, number, print_json, print_table
from kvstore.errors import ConfigError

if TYPE_CHECKING:
    from kvstore.admin.client import AdminClient
    from kvstore.admin.models.jobs import Job

Api = Annotated[str, typer.Option("--api", metavar="URL", help="The admin API; else api.listen.", envvar="KVSTORE_API")]
Name = Annotated[str, typer.Argument(metavar="JOB", help="As kvstore jobs list shows it; its start is enough.")]

jobs = typer.Typer(no_args_is_help=True, help="Long work on a node, through its admin API.")
policy = typer.Typer(no_args_is_help=True, help="What a node keeps, through its admin API.")


class ModeName(StrEnum):
    """Modes of admission on the command line."""

    off = "off"
    observe = "observe"
    enforce = "enforce"


@contextmanager
def admin(api: str, config: options.ConfigFile, overrides: options.Overrides) -> Iterator[AdminClient]:
    """A client of the API that the options name, with the token in KVSTORE_API_TOKEN.

    Raises ConfigError, and NodeUnavailable on first use.
    """
    settings = options.load(config, overrides).config.api
    if not api and not settings.listen:
        raise ConfigError("api.listen", "", "no admin API is configured", "Set it to 127.0.0.1:7070, or give --api.")
    from kvstore.admin.client import AdminClient

    with AdminClient(api or settings.url, os.environ.get("KVSTORE_API_TOKEN", "")) as client:
        yield client


@jobs.command("kinds")
def job_kinds(
    api: Api = "", config: options.ConfigFile = None, overrides: options.Overrides = None, json: options.Json = False
) -> None:
    """Show what can be run as a job."""
    with admin(api, config, overrides) as client:
        kinds = client.job_kinds()
    if json:
        print_json([kind.model_dump() for kind in kinds])
    else:
        rows = [(kind.name, kind.summary, ", ".join(kind.options.get("properties", {})) or "-") for kind in kinds]
        print_table(("kind", "what it does", "options"), rows)


@jobs.command("list")
def list_jobs(
    limit: Annotated[int, typer.Option(metavar="N", min=1, max=200, help="Jobs to show.")] = 20,
    api: Api = "",
    config: options.ConfigFile = None,
    overrides: options.Overrides = None,
    json: options.Json = False,
) -> None:
    """Show jobs, newest first."""
    from itertools import islice

    with admin(api, config, overrides) as client:
        found = list(islice(client.jobs(), limit))
    if json:
        print_json([job.model_dump(mode="json") for job in found])
        return
    print_table(
        ("job", "kind", "state", ">done", ">started", "problem"),
        [
            (job.id, job.kind, job.state, _progress(job), f"{ago(time.time() - job.created)} ago", job.problem or "-")
            for job in found
        ],
    )


@jobs.command()
def show(
    name: Name,
    api: Api = "",
    config: options.ConfigFile = None,
    overrides: options.Overrides = None,
    json: options.Json = False,
) -> None:
    """Show one job and its result."""
    with admin(api, config, overrides) as client:
        _print(client.job(_whole(client, name)), json)


@jobs.command()
def run(
    kind: Annotated[str, typer.Argument(metavar="KIND", help="As kvstore jobs kinds shows it.")],
    option: Annotated[
        list[str] | None,
        typer.Option("--option", "-o", metavar="NAME=JSON", help='As tiers=["disk"] or rate=100MiB; repeatable.'),
    ] = None,
    follow: Annotated[bool, typer.Option(help="Wait for its end.")] = True,
    api: Api = "",
    config: options.ConfigFile = None,
    overrides: options.Overrides = None,
    json: options.Json = False,
) -> None:
    """Start a job and follow it. Ctrl-C leaves it running. The exit status is 1 when it does not get done."""
    with admin(api, config, overrides) as client:
        job = client.run_job(kind, dict(map(_option, option or ())))
        _print(_follow(client, job) if follow else job, json)


@jobs.command()
def cancel(
    name: Name,
    api: Api = "",
    config: options.ConfigFile = None,
    overrides: options.Overrides = None,
    json: options.Json = False,
) -> None:
    """Stop a job. What it has done stays done."""
    with admin(api, config, overrides) as client:
        job = client.cancel_job(_whole(client, name))
    if json:
        print_json(job.model_dump(mode="json"))
    else:
        note(f"{job.id} is {job.state}.")


@jobs.command()
def resume(
    name: Name,
    follow: Annotated[bool, typer.Option(help="Wait for its end.")] = True,
    api: Api = "",
    config: options.ConfigFile = None,
    overrides: options.Overrides = None,
    json: options.Json = False,
) -> None:
    """Go on with a job that was cancelled, interrupted or failed."""
    with admin(api, config, overrides) as client:
        job = client.resume_job(_whole(client, name))
        _print(_follow(client, job) if follow else job, json)


@policy.command("show")
def show_policy(
    api: Api = "", config: options.ConfigFile = None, overrides: options.Overrides = None, json: options.Json = False
) -> None:
    """Show how blocks are admitted and evicted now, and what the rule of admission said."""
    with admin(api, config, overrides) as client:
        found = client.policy()
    if json:
        print_json(found.model_dump(mode="json"))
        return
    print(f"admission: {found.mode}; eviction: {found.eviction}")
    rows = [(d.tier, d.reason, number(d.blocks), "admits" if d.admits else "refuses") for d in found.decisions]
    print_table(("tier", "rule", ">blocks", "says"), rows, title="Decisions since the node's start")


@policy.command("set")
def set_policy(
    mode: Annotated[ModeName, typer.Argument(metavar="MODE", help="off, observe or enforce.")],
    api: Api = "",
    config: options.ConfigFile = None,
    overrides: options.Overrides = None,
    json: options.Json = False,
) -> None:
    """Switch admission, until the node stops; policy.admission says how it starts."""
    from kvstore.admin.models.policy import Mode

    with admin(api, config, overrides) as client:
        found = client.set_policy(Mode(mode.value))
    if json:
        print_json(found.model_dump(mode="json"))
    else:
        note(f"Admission is in {found.mode} until the node stops.")


def _follow(client: AdminClient, job: Job) -> Job:
    """Its last state, with a line of progress on a terminal."""
    from rich.console import Console

    with Console(stderr=True).status(job.kind) as shown:
        last = job
        for last in client.watch_job(job.id):
            shown.update(f"{last.kind}: {_progress(last)} {last.progress.note}")
    return last


def _print(job: Job, json: bool) -> None:
    if json:
        print_json(job.model_dump(mode="json"))
    else:
        lasted = (job.finished or time.time()) - (job.started or job.created)
        print(f"{job.id}  {job.kind} {job.state} after {ago(lasted)}: {_progress(job)}")
        if job.problem:
            note(job.problem)
        if job.result:
            print_json(job.result)
    if job.finished is not None and job.state != "done":
        raise typer.Exit(1)


def _progress(job: Job) -> str:
    of = f" of {number(job.progress.total)}" if job.progress.total is not None else ""
    return f"{number(job.progress.done)}{of} {job.progress.unit}".strip()


def _whole(client: AdminClient, start: str) -> str:
    """The one job whose name begins so."""
    found = [job.id for job in client.jobs() if job.id.startswith(start)]
    if len(found) != 1:
        problem = "no job begins so" if not found else f"{len(found)} jobs begin so"
        raise ConfigError("JOB", start, problem, "See kvstore jobs list.")
    return found[0]


def _option(text: str) -> tuple[str, Any]:
    name, separator, value = text.partition("=")
    if not separator:
        raise ConfigError("--option", text, "has no '='", "Write --option name=value.")
    try:
        return name, jsonlib.loads(value)
    except ValueError:
        return name, value
