"""``kvstore warm``."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvstore.cli import options
from kvstore.cli.output import note, number, print_json
from kvstore.cli.prompts import TokenizerName
from kvstore.errors import ConfigError, KVStoreError
from replication.prompts import Prompt, read_prompts

if TYPE_CHECKING:
    from kvstore.config import Config
    from kvstore.identity import BlockKey, Namespace
    from kvstore.node.client import Client
    from replication.hotset import HotSet
    from replication.prime import Need, PrimeReport
    from replication.warmup import Progress, WarmReport

INTERRUPTED = 130


def warm(
    budget: Annotated[
        str, typer.Option(metavar="SIZE", help="Bytes to have on the node; else most of its disk, or of its memory.")
    ] = "",
    rate: Annotated[str, typer.Option(metavar="SIZE", help="Bytes per second to take from the bucket at most.")] = "",
    prompts: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Warm these prompts: a JSON list of token ids on each line; for --prime, or with --tokenizer, also texts.",
        ),
    ] = None,
    namespace: Annotated[
        str, typer.Option("--namespace", "-n", metavar="NAME", help="Whose prompts: a model, or start of a digest.")
    ] = "",
    tokenizer: TokenizerName = None,
    prime: Annotated[
        str,
        typer.Option(
            metavar="URL", help="Have an OpenAI-compatible endpoint compute those of --prompts that are not stored."
        ),
    ] = "",
    prime_model: Annotated[
        str, typer.Option(metavar="NAME", help="The model's name at that endpoint; else its first one.")
    ] = "",
    prime_api_key: Annotated[
        str, typer.Option(metavar="KEY", help="Its API key.", envvar="KVSTORE_PRIME_API_KEY", show_envvar=True)
    ] = "",
    at_once: Annotated[int, typer.Option(metavar="N", min=1, max=1024, help="Prompts at a time for --prime.")] = 4,
    per_second: Annotated[
        float, typer.Option(metavar="N", min=0, help="Prompts a second for --prime at most; 0: no limit.")
    ] = 0.0,
    check: Annotated[bool, typer.Option("--check", help="Only say how warm the node is, for readiness gates.")] = False,
    prefill_rate: Annotated[
        float, typer.Option(metavar="TOKENS", min=1, help="Tokens a second that the engine prefills, for the report.")
    ] = 20_000.0,
    at_least: Annotated[
        float,
        typer.Option(
            "--at-least",
            "--ready-at",
            metavar="SHARE",
            min=0,
            max=1,
            help="Share of the planned bytes from which the exit status is 0.",
        ),
    ] = 1.0,
    config: options.ConfigFile = None,
    overrides: options.Overrides = None,
    socket: options.Socket = None,
    json: options.Json = False,
) -> None:
    """Fill this machine's node from its bucket, hottest prompts first, before engines start. Ctrl-C keeps what is there.

    Exit status: 0 warm enough, 1 less, 2 bad input, 3 no node answers, 130 interrupted by SIGINT or SIGTERM.
    """
    loaded = options.load(config, overrides, socket).config
    if tokenizer is not None and prompts is None:
        raise ConfigError("--tokenizer", tokenizer, "goes with --prompts", "Name a file of prompts, or leave it out.")
    if check:
        _check(loaded, at_least, json)
    elif prime:
        if prompts is None:
            raise ConfigError("--prime", prime, "goes with --prompts", "Name a file of prompts.")
        with options.Node(config, overrides, socket).connect() as client, _interruptible():
            primer = {"model": prime_model, "api_key": prime_api_key, "at_once": at_once}
            chosen = list(_read(prompts, tokenizer, texts=True))
            report = _prime(loaded, client, chosen, namespace, prime, {**primer, "per_second": per_second or None})
        _show_primed(report, prefill_rate, json)
    else:
        if (prompts is None) == bool(namespace):
            raise ConfigError("--namespace", namespace, "goes with --prompts", "Give both, or neither.")
        asked = None if prompts is None else _read(prompts, tokenizer, texts=False)
        with options.Node(config, overrides, socket).connect() as client, _interruptible():
            warmed = _warm(
                loaded, client, asked, namespace, options.size("--budget", budget), options.size("--rate", rate)
            )
        if loaded.tenants.book is not None and loaded.node.token_file is None and warmed.skipped["other_tenant"]:
            note("A node with several tenants is warmed tenant by tenant: set identity.tenant and node.token_file.")
        _show_warmed(warmed, prefill_rate, at_least, json)


def _warm(
    config: Config,
    client: Client,
    prompts: Iterable[Prompt] | None,
    namespace: str,
    budget: int | None,
    rate: int | None,
) -> WarmReport:
    """Fill the node. Raises ConfigError, NodeUnavailable, TierUnavailable; the node's warmth says so too."""
    from replication.rate import RateLimit
    from replication.warmfile import WarmthFile
    from replication.warmup import Warmer, WarmReport

    client.call("status")
    told = WarmthFile(config.node.directory)
    report = WarmReport()
    problem = "it broke off"
    try:
        with _progress() as advance:

            def progress(report: WarmReport) -> None:
                advance(report)
                told.progress(report)

            progress(report)
            warmer = Warmer(client, config.identity.tenant, RateLimit(rate), progress, report)
            hot, namespaces = _find(config, client, report, prompts, namespace)
            warmer.run(hot, namespaces, budget)
        problem = ""
    except KeyboardInterrupt:
        report.interrupted, problem = True, ""
    except KVStoreError as error:
        problem = str(error)
        raise
    finally:
        told.end(report, problem)
    return report


def _check(config: Config, at_least: float, json: bool) -> None:
    """Say how warm the node is. Exit status 1 when that is not enough, or it was never warmed."""
    from dataclasses import asdict

    from kvstore.warmth import read_warmth

    warmth = read_warmth(config.node.directory)
    if json:
        print_json(None if warmth is None else {**asdict(warmth), "share": warmth.share})
    elif warmth is None:
        print("never warmed")
    else:
        print(f"{warmth.share:.0%} warm, {warmth.state}" + (f": {warmth.problem}" if warmth.problem else ""))
    if warmth is None or not warmth.enough(at_least):
        raise typer.Exit(1)


def _read(file: Path, tokenizer: str | None, texts: bool) -> Iterator[Prompt]:
    """The prompts of a file, as token ids where there is a tokenizer; texts only where ``texts`` says so. Raises ConfigError."""
    if tokenizer is None:
        return read_prompts(file, texts)
    from kvstore.cli.tokenizer import Tokenizer

    encode = Tokenizer(tokenizer).encode
    return (encode(prompt) if isinstance(prompt, str) else prompt for prompt in read_prompts(file, texts=True))


def _prime(
    config: Config, client: Client, prompts: Sequence[Prompt], wanted: str, url: str, primer: dict[str, Any]
) -> PrimeReport:
    """Have prompts computed. Raises ConfigError, EndpointUnavailable, and what finding out what is stored raises."""
    import asyncio
    import signal

    if find_spec("httpx") is None:
        raise ConfigError("--prime", url, "the package httpx is not installed", "Install llm-kvstore[admin].")
    from replication.prime import Primer

    judge = {"need": _judge(client, *_survey(config, wanted))} if wanted else {}

    async def run() -> PrimeReport:
        task = asyncio.current_task()
        assert task is not None
        for signum in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(signum, task.cancel)
        async with Primer(url, **primer) as sender:
            return await sender.run(prompts, **judge)

    return asyncio.run(run())


def _judge(client: Client, stored: set[BlockKey], namespace: Namespace, length: int) -> Callable[[Prompt], Need]:
    """Tells which prompts are worth computing. Texts are: only the engine knows their tokens."""
    from kvstore.identity import chain_digests
    from replication.prime import Need

    keyring = client.open_namespace(namespace, length)

    def need(prompt: Prompt) -> Need:
        if isinstance(prompt, str):
            return Need.SEND
        keys = keyring.block_keys(chain_digests(prompt, namespace.block_tokens))
        if not keys:
            return Need.SHORT
        return Need.STORED if stored.issuperset(keys) else Need.SEND

    return need


@contextmanager
def _interruptible() -> Iterator[None]:
    """SIGTERM ends a warm-up as Ctrl-C does."""
    import signal

    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _find(
    config: Config, client: Client, report: WarmReport, prompts: Iterable[Prompt] | None, wanted: str
) -> tuple[HotSet, dict[bytes, Namespace]]:
    """What to warm. Raises ConfigError, TierUnavailable."""
    import asyncio

    from replication.hotset import read_namespaces, usual_hot_set
    from replication.site import Site
    from replication.warmup import blocks_of_prompts

    async def hot_set() -> tuple[HotSet, dict[bytes, Namespace]]:
        async with Site(config).open_contents() as held:
            return await usual_hot_set(held, time.time()), await read_namespaces(held.bucket)

    if prompts is None:
        return asyncio.run(hot_set())
    stored, chosen, length = _survey(config, wanted)
    tokens = (prompt for prompt in prompts if not isinstance(prompt, str))
    hot, lacking = blocks_of_prompts(client, chosen, length, tokens, stored.__contains__)
    report.skipped.update({"not_in_bucket": lacking} if lacking else {})
    return hot, {chosen.digest: chosen}


def _survey(config: Config, wanted: str) -> tuple[set[BlockKey], Namespace, int]:
    """The blocks that the bucket has of a namespace, the namespace, and the payload size of its blocks."""
    import asyncio

    from replication.hotset import describe, read_namespaces
    from replication.site import Site

    async def survey() -> tuple[set[BlockKey], Namespace, int]:
        async with Site(config).open_contents() as held:
            chosen = _named(wanted, await read_namespaces(held.bucket))
            blocks = {key: entry for key, entry in (await held.blocks()).items() if entry.namespace == chosen.digest}
            described = await describe(held.bucket, dict(list(blocks.items())[:8]))
            if not described:
                raise ConfigError("--namespace", wanted, "the bucket has no blocks of it", "See kvstore ls.")
            return set(blocks), chosen, next(iter(described.values())).length

    return asyncio.run(survey())


def _named(wanted: str, namespaces: dict[bytes, Namespace]) -> Namespace:
    found = [
        namespace
        for namespace in namespaces.values()
        if (namespace.model == wanted and not namespace.group) or namespace.digest.hex().startswith(wanted.lower())
    ]  # a model's states, of group 1, are no prompts
    if len(found) == 1:
        return found[0]
    digests = ", ".join(f"{n.digest.hex()[:12]} ({n.model})" for n in found or namespaces.values())
    problem = f"{len(found)} namespaces of the bucket match"
    raise ConfigError("--namespace", wanted, problem, f"Give one of: {digests or 'none, the bucket is empty'}.")


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


def _show_warmed(report: WarmReport, prefill_rate: float, at_least: float, json: bool) -> None:
    document = _document(report, prefill_rate)
    if json:
        print_json(document)
    else:
        _print(report, document)
    if report.interrupted:
        raise typer.Exit(INTERRUPTED)
    if report.ready < at_least:
        raise typer.Exit(1)


def _show_primed(report: PrimeReport, prefill_rate: float, json: bool) -> None:
    document = {
        "sent": report.sent,
        "tokens": report.tokens,
        "skipped": {need.value: count for need, count in report.skipped.items()},
        "failed": dict(report.failed),
        "seconds": report.seconds,
        "prefill_seconds_saved": report.tokens / prefill_rate,
        "interrupted": report.interrupted,
    }
    if json:
        print_json(document)
    else:
        print(f"{number(report.sent)} prompts ({number(report.tokens)} tokens) computed in {report.seconds:.1f} s")
        for need, count in report.skipped.items():
            note(f"{number(count)} prompts skipped: {need.value}")
        print(f"Used once each, they save {document['prefill_seconds_saved']:.1f} s of prefill.")
        for reason, count in report.failed.items():
            note(f"{number(count)} prompts failed: {reason}")
        if report.interrupted:
            note("Interrupted: the same command goes on from here, if --namespace says what is stored.")
    if report.interrupted:
        raise typer.Exit(INTERRUPTED)
    if report.failed:
        raise typer.Exit(1)


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
