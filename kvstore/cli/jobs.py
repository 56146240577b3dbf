"""``kvstore jobs``."""

from __future__ import annotations

import json as jsonlib
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvstore.cli import options, output
from kvstore.cli.groups import grouped
from kvstore.cli.output import ago, note, number, print_json, print_table
from kvstore.cli.overhttp import Api
from kvstore.errors import ConfigError

if TYPE_CHECKING:
    from kvstore.admin.client import AdminClient
    from kvstore.admin.models.jobs import Job

Name = Annotated[str, typer.Argument(metavar="JOB", help="As kvstore jobs list shows it; its start is enough.")]

app = typer.Typer(no_args_is_help=True, help="Long work on a node, through its admin API.")


@app.command("kinds")
@grouped
def job_kinds(api: Api, json: options.Json = False) -> None:
    """Show what can be run as a job."""
    with api.connect() as client:
        kinds = client.job_kinds()
    rows = [(kind.name, kind.summary, ", ".join(kind.options.get("properties", {})) or "-") for kind in kinds]
    output.show(json, kinds, lambda: print_table(("kind", "what it does", "options"), rows))


@app.command("list")
@grouped
def list_jobs(
    limit: Annotated[int, typer.Option(metavar="N", min=1, max=200, help="Jobs to show.")] = 20,
    *,
    api: Api,
    json: options.Json = False,
) -> None:
    """Show jobs, newest first."""
    from itertools import islice

    with api.connect() as client:
        found = list(islice(client.jobs(), limit))
    rows = [
        (job.id, job.kind, job.state, _progress(job), f"{ago(time.time() - job.created)} ago", job.problem or "-")
        for job in found
    ]
    columns = ("job", "kind", "state", ">done", ">started", "problem")
    output.show(json, found, lambda: print_table(columns, rows))


@app.command()
@grouped
def show(name: Name, api: Api, json: options.Json = False) -> None:
    """Show one job and its result."""
    with api.connect() as client:
        show_job(client.job(_whole(client, name)), json)


@app.command()
@grouped
def run(
    kind: Annotated[str, typer.Argument(metavar="KIND", help="As kvstore jobs kinds shows it.")],
    option: Annotated[
        list[str] | None,
        typer.Option("--option", "-o", metavar="NAME=JSON", help='As tiers=["disk"] or rate=100MiB; repeatable.'),
    ] = None,
    follow: Annotated[bool, typer.Option(help="Wait for its end.")] = True,
    *,
    api: Api,
    json: options.Json = False,
) -> None:
    """Start a job and follow it. Ctrl-C leaves it running. The exit status is 1 when it does not get done."""
    with api.connect() as client:
        job = client.run_job(kind, dict(map(_option, option or ())))
        show_job(follow_job(client, job) if follow else job, json)


@app.command()
@grouped
def cancel(name: Name, api: Api, json: options.Json = False) -> None:
    """Stop a job. What it has done stays done."""
    with api.connect() as client:
        job = client.cancel_job(_whole(client, name))
    output.show(json, job, lambda: note(f"{job.id} is {job.state}."))


@app.command()
@grouped
def resume(
    name: Name,
    follow: Annotated[bool, typer.Option(help="Wait for its end.")] = True,
    *,
    api: Api,
    json: options.Json = False,
) -> None:
    """Go on with a job that was cancelled, interrupted or failed."""
    with api.connect() as client:
        job = client.resume_job(_whole(client, name))
        show_job(follow_job(client, job) if follow else job, json)


def follow_job(client: AdminClient, job: Job) -> Job:
    """Its last state, with a line of progress on a terminal."""
    from rich.console import Console

    with Console(stderr=True).status(job.kind) as shown:
        last = job
        for last in client.watch_job(job.id):
            shown.update(f"{last.kind}: {_progress(last)} {last.progress.note}")
    return last


def show_job(job: Job, json: bool) -> None:
    """As it is; one that ended otherwise than done ends the command with status 1."""
    output.show(json, job, lambda: _print(job))
    if job.finished is not None and job.state != "done":
        raise typer.Exit(1)


def _print(job: Job) -> None:
    lasted = (job.finished or time.time()) - (job.started or job.created)
    print(f"{job.id}  {job.kind} {job.state} after {ago(lasted)}: {_progress(job)}")
    if job.problem:
        note(job.problem)
    if job.result:
        print_json(job.result)


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
