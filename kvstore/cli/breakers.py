"""``kvstore breakers``."""

from __future__ import annotations

import json as jsonlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvstore.cli import options, prompts
from kvstore.cli.groups import grouped
from kvstore.cli.output import note, number, print_json, print_table
from kvstore.errors import ConfigError

if TYPE_CHECKING:
    from kvstore.cli.tokenizer import Tokenizer

MAX_PROMPTS = 10_000
SHOWN_TOKENS = 16
"""Of each of two prompts, from where they part."""

PromptsFile = Annotated[
    Path | None,
    typer.Option(
        "--prompts",
        metavar="FILE",
        help="Compare these prompts instead of the node's traffic: one JSON text, list of token ids, or object a line.",
    ),
]


@grouped
def show(
    file: PromptsFile = None,
    tokenizer: prompts.TokenizerName = None,
    limit: Annotated[int, typer.Option(metavar="N", min=1, max=1000, help="Places to show.")] = 10,
    *,
    node: options.Node,
    json: options.Json = False,
) -> None:
    """Show where prompts that share text part early, and how many tokens could be shared if what parts them came later."""
    if file is None:
        with node.connect() as client:
            report = client.call("breakers", 60.0)
        texts: dict[str, list[int]] = {}
        decoder = None
    else:
        decoder = _tokenizer(tokenizer)
        texts = _named(_read(file, decoder))
        report = _compare(texts)
    if json:
        print_json(report)
        return
    if not report["prompts"]:
        note("No prompt is known. Switch content_fingerprints on in the connector, or give --prompts.")
        return
    _print(report, limit)
    for breaker in report["breakers"][:limit] if texts else ():
        for line in _text(breaker["examples"][0], texts, decoder):
            print(line)


def _tokenizer(name: str | None) -> Tokenizer | None:
    from kvstore.cli.tokenizer import Tokenizer

    return Tokenizer(name) if name else None


def _read(file: Path, tokenizer: Tokenizer | None) -> Iterator[tuple[str, list[int]]]:
    """Prompts by name. An object has its text or ids under ``prompt``, ``text``, ``tokens`` or ``prompt_token_ids``."""
    lines = [line for line in prompts.read(file).splitlines() if line.strip()]
    if len(lines) > MAX_PROMPTS:
        raise ConfigError("--prompts", str(file), f"more than {MAX_PROMPTS} prompts", "Give a sample.")
    for at, line in enumerate(lines, start=1):
        try:
            row = jsonlib.loads(line)
        except ValueError:
            raise ConfigError("--prompts", f"line {at}", "not JSON", "Write one prompt a line.") from None
        name = f"line {at}"
        if isinstance(row, dict):
            name = str(row.get("request_id") or row.get("id") or name)
            fields = ("prompt_token_ids", "tokens", "prompt", "text")
            row = next((row[field] for field in fields if field in row), None)
        if isinstance(row, str):
            if tokenizer is None:
                raise ConfigError("--tokenizer", "", "needed to turn text into tokens", "Name the folder of the model.")
            row = tokenizer.encode(row)
        if not isinstance(row, list) or not all(type(n) is int and 0 <= n < 1 << 32 for n in row):
            raise ConfigError("--prompts", f"line {at}", "neither text nor token ids", "See kvstore breakers --help.")
        yield name, row


def _named(rows: Iterable[tuple[str, list[int]]]) -> dict[str, list[int]]:
    """By name; a name that comes again is given a number."""
    texts: dict[str, list[int]] = {}
    for at, (name, ids) in enumerate(rows, start=1):
        texts[f"{name} (line {at})" if name in texts else name] = ids
    return texts


def _compare(texts: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    from kvstore.policy.breakers import Prompt, find_breakers
    from kvstore.policy.content import pieces

    return asdict(find_breakers([Prompt(name, pieces(ids, b"")) for name, ids in texts.items()]))


def _print(report: dict[str, Any], limit: int) -> None:
    total = max(report["tokens"], 1)
    print(
        f"{number(report['prompts'])} prompts of {number(report['tokens'])} tokens: {report['by_prefix'] / total:.0%} could be "
        f"shared as they are, {report['anywhere'] / total:.0%} were seen before at some position."
    )
    if not report["breakers"]:
        print("No prompts share text behind the place where they part.")
        return
    print_table(
        (">part at token", ">prompts", ">shareable tokens", ">of theirs", ">part to move", "for example"),
        [
            (
                number(breaker["token"]),
                number(breaker["prompts"]),
                number(breaker["shareable"]),
                f"{breaker['shareable'] / max(breaker['tokens'], 1):.0%}",
                f"{number(breaker['breaking'])} tokens",
                _example(breaker["examples"][0]),
            )
            for breaker in report["breakers"][:limit]
        ],
        title="Where prompts part",
    )
    note(
        "They part at that token or some 60 behind it. Shareable: what the most alike earlier prompt has too, behind that."
    )


def _example(example: dict[str, Any]) -> str:
    here, there = example["resumes"]
    same = f"{example['later']} at {number(here)}, {example['earlier']} at {number(there)}"
    return f"alike again: {same} ({number(example['shareable'])} tokens)"


def _text(example: dict[str, Any], texts: Mapping[str, Sequence[int]], tokenizer: Tokenizer | None) -> Iterator[str]:
    """The exact token at which two prompts part, and what each goes on with."""
    later, earlier = texts[example["later"]], texts[example["earlier"]]
    shortest = min(len(later), len(earlier))
    at = next((at for at in range(shortest) if later[at] != earlier[at]), shortest)
    yield f"Token {number(at)} is the first that differs:"
    for name, ids in ((example["later"], later), (example["earlier"], earlier)):
        following = list(ids[at : at + SHOWN_TOKENS])
        yield f"  {name}: {tokenizer.decode(following)!r}" if tokenizer else f"  {name}: {following}"
