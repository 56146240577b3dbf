"""``kvstore warm``."""

from __future__ import annotations

import json as jsonlib
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvstore.cli import options
from kvstore.cli.output import note, number, print_json
from kvstore.errors import ConfigError

if TYPE_CHECKING:
    from kvstore.config import Config
    from kvstore.identity import BlockKey, Namespace
    from kvstore.node.client import Client
    from replication.hotset import HotSet
    from replication.warmup import Progress, WarmReport

INTERRUPTED = 130
MAX_PROMPT_BYTES = 64 << 20


def warm(
    budget: Annotated[
        str, typer.Option(metavar="SIZE", help="Bytes to have on the node; else most of its disk, or of its memory.")
    ] = "",
    rate: Annotated[str, typer.Option(metavar="SIZE", help="Bytes per second to take from the bucket at most.")] = "",
    prompts: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Warm these prompts: a JSON list of token ids on each line.")
    ] = None,
    namespace: Annotated[
        str, typer.Option("--namespace", "-n", metavar="NAME", help="Whose prompts: a model, or start of a digest.")
    ] = "",
    prefill_rate: Annotated[
        float, typer.Option(metavar="TOKENS", min=1, help="Tokens a second that the engine prefills, for the report.")
    ] = 20_000.0,
    ready_at: Annotated[
        float, typer.Option(metavar="SHARE", min=0, max=1, help="Share of the bytes from which the exit status is 0.")
    ] = 1.0,
    config: options.ConfigFile = None,
    overrides: options.Overrides = None,
    socket: options.Socket = None,
    json: options.Json = False,
) -> None:
    """Fill this machine's node from its bucket, hottest prompts first, before engines start. Ctrl-C keeps what is there."""
    from kvstore.cli.logs import configure
    from replication.rate import RateLimit
    from replication.warmup import Warmer

    configure("warning")
    if (prompts is None) == bool(namespace):
        raise ConfigError("--namespace", namespace, "goes with --prompts", "Give both, or neither.")
    loaded = options.load(config, overrides, socket).config
    limit = RateLimit(_size("--rate", rate))
    with options.connect(config, overrides, socket) as client:
        client.call("status")
        with _progress() as advance:
            warmer = Warmer(client, loaded.identity.tenant, limit, advance)
            hot, namespaces = _find(loaded, client, warmer.report, prompts, namespace)
            report = warmer.run(hot, namespaces, _size("--budget", budget))
    document = _document(report, prefill_rate)
    if json:
        print_json(document)
    else:
        _print(report, document)
    if report.interrupted:
        raise typer.Exit(INTERRUPTED)
    if report.ready < ready_at:
        raise typer.Exit(1)


def _find(
    config: Config, client: Client, report: WarmReport, prompts: Path | None, wanted: str
) -> tuple[HotSet, dict[bytes, Namespace]]:
    """What to warm. Raises ConfigError, TierUnavailable."""
    import asyncio

    from replication.hotset import describe, read_namespaces, usual_hot_set
    from replication.site import Site
    from replication.warmup import blocks_of_prompts

    site = Site(config)

    async def hot_set() -> tuple[HotSet, dict[bytes, Namespace]]:
        async with site.open_contents() as held:
            return await usual_hot_set(held, time.time()), await read_namespaces(held.bucket)

    async def survey() -> tuple[set[BlockKey], Namespace, int]:
        async with site.open_contents() as held:
            chosen = _named(wanted, await read_namespaces(held.bucket))
            blocks = {key: entry for key, entry in (await held.blocks()).items() if entry.namespace == chosen.digest}
            described = await describe(held.bucket, dict(list(blocks.items())[:8]))
            if not described:
                raise ConfigError("--namespace", wanted, "the bucket has no blocks of it", "See kvstore ls.")
            return set(blocks), chosen, next(iter(described.values())).length

    if prompts is None:
        return asyncio.run(hot_set())
    stored, chosen, length = asyncio.run(survey())
    hot, lacking = blocks_of_prompts(client, chosen, length, _read_prompts(prompts), stored.__contains__)
    report.skipped.update({"not_in_bucket": lacking} if lacking else {})
    return hot, {chosen.digest: chosen}


def _named(wanted: str, namespaces: dict[bytes, Namespace]) -> Namespace:
    found = [n for n in namespaces.values() if n.model == wanted or n.digest.hex().startswith(wanted.lower())]
    if len(found) == 1:
        return found[0]
    digests = ", ".join(f"{n.digest.hex()[:12]} ({n.model})" for n in found or namespaces.values())
    problem = f"{len(found)} namespaces of the bucket match"
    raise ConfigError("--namespace", wanted, problem, f"Give one of: {digests or 'none, the bucket is empty'}.")


def _read_prompts(path: Path) -> Iterator[Sequence[int]]:
    remedy = "Write a JSON list of token ids on each line."
    try:
        with path.open() as lines:
            for place, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                if len(line) > MAX_PROMPT_BYTES:
                    raise ConfigError("--prompts", f"{path}:{place}", "a line is too long", remedy)
                try:
                    tokens = jsonlib.loads(line)
                except ValueError:
                    tokens = None
                if not isinstance(tokens, list) or not all(type(t) is int and 0 <= t < 1 << 32 for t in tokens):
                    raise ConfigError("--prompts", f"{path}:{place}", "not a list of token ids", remedy)
                yield tokens
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("--prompts", str(path), str(error), remedy) from error


@contextmanager
def _progress() -> Iterator[Progress]:
    """A bar on a terminal; yields what is to be called with the report as it grows."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.progress import Progress as Bars

    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn()
    with Bars(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal) as bars:
        task = bars.add_task("warming", total=None)
        yield lambda report: bars.update(task, total=report.planned_bytes, completed=report.warm_bytes)


def _document(report: WarmReport, prefill_rate: float) -> dict[str, Any]:
    return {
        "planned": {"blocks": report.planned_blocks, "bytes": report.planned_bytes},
        "blocks": dict(report.blocks),
        "bytes_from_bucket": report.nbytes,
        "seconds": report.seconds,
        "ready": report.ready,
        "prefill_seconds_saved": report.tokens / prefill_rate,
        "skipped": dict(report.skipped),
        "interrupted": report.interrupted,
    }


def _print(report: WarmReport, document: dict[str, Any]) -> None:
    from kvstore.units import human_bytes

    already = report.blocks["host"] + report.blocks["disk"]
    print(
        f"{report.ready:.0%} warm: {number(report.blocks['object'])} blocks ({human_bytes(report.nbytes)}) from the "
        f"bucket in {report.seconds:.1f} s, {number(already)} were there"
    )
    print(f"Used once each, they save {document['prefill_seconds_saved']:.1f} s of prefill.")
    for reason, count in report.skipped.items():
        note(f"{number(count)} blocks skipped: {reason}")
    if report.interrupted:
        note("Interrupted: the same command goes on from here.")


def _size(option: str, text: str) -> int | None:
    from kvstore.units import parse_bytes

    if not text:
        return None
    try:
        return parse_bytes(text)
    except ValueError as error:
        raise ConfigError(option, text, str(error), "Write it as 16GiB, 500MB, or a number of bytes.") from None
