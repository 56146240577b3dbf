"""``kvstore evict``."""

from __future__ import annotations

from typing import Annotated

import typer

from kvstore.cli import options, output, prompts
from kvstore.cli.groups import grouped
from kvstore.cli.output import number
from kvstore.cli.overhttp import Api


@grouped
def evict(
    prompt: prompts.Named,
    tier: Annotated[
        options.TierName, typer.Option("--tier", metavar="TIER", help="The one to give them up: host or disk.")
    ],
    *,
    api: Api,
    json: options.Json = False,
) -> None:
    """Have one tier of the node give a prompt's blocks up. Other tiers keep theirs; what only this one held is gone."""
    from kvstore.admin.models.base import TierName

    wanted = prompt.prompt()
    with api.connect() as client:
        done = client.evict_prompt(TierName(tier.value), wanted)
    output.show(json, done, lambda: print(f"{number(done.evicted)} blocks given up by {tier.value}"))
