"""What commands print: results on standard output, everything else on standard error."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn

import typer


def print_json(document: object) -> None:
    """One JSON document; byte strings become hex, models of the API their JSON form."""
    typer.echo(json.dumps(document, indent=2, default=_plain))


def show(json: bool, document: object, text: Callable[[], None]) -> None:
    """One result, for programs or for people."""
    if json:
        print_json(document)
    else:
        text()


def _plain(value: object) -> object:
    if isinstance(value, bytes):
        return value.hex()
    if hasattr(value, "model_dump"):  # not imported here: most commands have no use for the API's models
        return value.model_dump(mode="json")
    raise TypeError(f"{type(value).__name__} has no JSON form")


def size(nbytes: int | None) -> str:
    """For a cell of a table."""
    from kvstore.units import human_bytes

    return "-" if nbytes is None else human_bytes(nbytes)


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]], title: str | None = None) -> None:
    """A table; a column whose name starts with '>' is aligned right. Nothing is cut when the output is not a terminal."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, title_style="bold")
    for column in columns:
        table.add_column(
            column.removeprefix(">"), justify="right" if column.startswith(">") else "left", overflow="fold"
        )
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    console = Console()
    if not console.is_terminal:
        console = Console(width=200)
    console.print(table)


def note(text: str) -> None:
    """A remark on standard error."""
    typer.echo(text, err=True)


def fail(error: Exception, status: int, remedy: str = "") -> NoReturn:
    """Say what went wrong and what to do, and end with ``status``."""
    typer.echo(f"{typer.style('Error:', fg='red', bold=True)} {error}", err=True)
    if remedy:
        typer.echo(remedy, err=True)
    raise typer.Exit(status)


def ago(seconds: float) -> str:
    """A duration in one unit: ``3 min``."""
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def number(value: Any) -> str:
    """A counter for reading."""
    return f"{value:,.3f}".rstrip("0").rstrip(".") if isinstance(value, float) else f"{value:,}"
