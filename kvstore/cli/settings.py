"""``kvstore config``."""

from __future__ import annotations

from dataclasses import asdict

from kvstore.cli import options
from kvstore.cli.groups import grouped
from kvstore.cli.output import print_json, print_table


@grouped
def show(source: options.Settings, json: options.Json = False) -> None:
    """Print every setting, its value and where the value came from. Secrets are masked."""
    settings = source.load().settings()
    if json:
        print_json([asdict(setting) for setting in settings])
    else:
        print_table(("setting", "value", "from"), [(s.name, s.value or "-", s.origin) for s in settings])
