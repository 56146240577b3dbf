"""``kvstore hot --region``: from the catalog, so that no node is asked."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import TYPE_CHECKING

from kvstore.cli.output import note, number, print_json, print_table
from kvstore.errors import ConfigError, TierError

if TYPE_CHECKING:
    from kvstore.catalog.hottest import HotChain
    from kvstore.config import Config


def show(config: Config, limit: int, json: bool) -> None:
    """Print what all nodes of the region ask for most. Raises ConfigError, CatalogUnavailable."""
    from kvstore.units import human_bytes

    chains, models = asyncio.run(_read(config, limit))
    if json:
        print_json(
            [
                {
                    "key": chain.key,
                    "model": models.get(chain.namespace, ""),
                    "namespace": chain.namespace,
                    "tokens": chain.tokens,
                    "bytes": chain.nbytes,
                    "prefill_seconds_saved": round(chain.seconds, 3),
                    "nodes": chain.nodes,
                }
                for chain in chains
            ]
        )
        return
    if not chains:
        note("No node has reported a block that is in the bucket.")
        return
    rows = [
        (
            chain.key.hex(),
            models.get(chain.namespace, "?"),
            number(chain.tokens),
            human_bytes(chain.nbytes),
            f"{chain.seconds:.2f} s",
            number(chain.nodes),
        )
        for chain in chains
    ]
    print_table(
        ("prompt", "model", ">tokens", ">size", ">prefill saved", ">nodes"), rows, title="Hot prompts of the region"
    )
    note(
        "A prompt is named by its last block, or where prompts part. Prefill saved is expected within an hour, on all nodes."
    )


async def _read(config: Config, limit: int) -> tuple[list[HotChain], Mapping[bytes, str]]:
    from kvstore.assembly import open_catalog
    from kvstore.catalog.hottest import hottest

    catalog = await open_catalog(config)
    if catalog is None:
        raise ConfigError("catalog.url", "", "no catalog is configured", "Leave --region away, or set it.")
    try:
        chains = await hottest(catalog, limit)
    finally:
        await catalog.close()
    try:
        return chains, await _models(config)
    except TierError as error:
        note(f"Names of models cannot be read from the bucket: {error}")
        return chains, {}


async def _models(config: Config) -> Mapping[bytes, str]:
    """By namespace."""
    from kvstore.assembly import object_settings
    from kvstore.tiers.object.documents import read_namespaces
    from kvstore.tiers.object.objects import Objects

    objects = await asyncio.to_thread(Objects.connect, object_settings(config))
    try:
        return {digest: namespace.model for digest, namespace in (await read_namespaces(objects)).items()}
    finally:
        await objects.close()
