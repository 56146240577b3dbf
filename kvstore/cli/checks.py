"""``kvstore doctor``."""

from __future__ import annotations

from dataclasses import asdict

import typer

from kvstore.cli import options
from kvstore.cli.groups import grouped
from kvstore.cli.output import print_json


@grouped
def doctor(node: options.Node, json: options.Json = False) -> None:
    """Check this machine against the configuration: node, memory, disk, bucket, catalog, secret, GPU."""
    from kvstore.doctor import Verdict, examine

    results = []
    for result in examine(node.load().config):
        results.append(result)
        if not json:
            color = {Verdict.OK: "green", Verdict.WARN: "yellow", Verdict.FAIL: "red"}[result.verdict]
            typer.echo(
                f"{typer.style(f'{result.verdict.value:4}', fg=color, bold=True)}  {result.name}: {result.finding}"
            )
            if result.remedy:
                typer.echo(f"      {result.remedy}")
    if json:
        print_json([{**asdict(result), "verdict": result.verdict.value} for result in results])
    if any(result.verdict is Verdict.FAIL for result in results):
        raise typer.Exit(1)
