"""``kvstore region run`` and ``kvstore up``."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvstore.cli import options
from kvstore.cli.groups import grouped
from kvstore.cli.output import note
from kvstore.errors import ConfigError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from prometheus_client import CollectorRegistry

    from kvstore.config import Config
    from replication.site import Site
    from replication.topology import Topology

TopologyFile = Annotated[
    Path,
    typer.Option("--topology", "-t", metavar="FILE", help="TOML file with all regions.", envvar="KVSTORE_TOPOLOGY"),
]
RegionName = Annotated[
    str, typer.Option("--region", "-r", metavar="NAME", help="The region to act for.", envvar="KVSTORE_REGION")
]
OptionalKey = Annotated[
    Path | None,
    typer.Option(
        "--key",
        metavar="FILE",
        help="The region's private key; without one it publishes nothing.",
        envvar="KVSTORE_REGION_KEY",
    ),
]


@dataclass(frozen=True, slots=True)
class Metrics:
    """Where the service's metrics are served."""

    metrics: Annotated[
        str,
        typer.Option(
            metavar="HOST:PORT",
            help="Serve Prometheus metrics of the service here; without --metrics-client-ca on loopback only.",
        ),
    ] = ""
    metrics_certificate: Annotated[
        Path | None, typer.Option(metavar="FILE", help="PEM file of that listener's certificate chain, for TLS.")
    ] = None
    metrics_key: Annotated[
        Path | None, typer.Option(metavar="FILE", help="PEM file of the certificate's private key.")
    ] = None
    metrics_client_ca: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="PEM file of the authority whose certificates clients must show there."),
    ] = None

    def serving(self, registry: CollectorRegistry) -> AbstractContextManager[None]:
        """While the context lasts, if asked for. Raises ConfigError."""
        if not self.metrics:
            return nullcontext()
        from replication.exposition import MetricsAddress

        address = MetricsAddress.of(self.metrics, self.metrics_certificate, self.metrics_key, self.metrics_client_ca)
        return address.serving(registry)


@grouped
def run(
    topology: TopologyFile,
    region: RegionName,
    signing_key: OptionalKey = None,
    *,
    metrics: Metrics,
    settings: options.Settings,
) -> None:
    """Run the regional service until SIGINT or SIGTERM: publish, replicate, evict, retire. Several replicas may run."""
    import asyncio
    import signal

    from prometheus_client import CollectorRegistry

    from kvstore import tracing
    from kvstore.admin.process import inside
    from kvstore.cli.logs import configure
    from replication.service import serve

    loaded = options.load(settings.config, [*(settings.overrides or ()), *_named(topology, region)])
    site = load_site(loaded.config, topology, region)
    private = own_key(site, signing_key)
    registry = CollectorRegistry()
    configure(loaded.config.node.log_level)

    async def main() -> None:
        stop = asyncio.Event()
        for signum in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(signum, stop.set)
        telemetry = loaded.config.telemetry
        with tracing.exporting("kvstore-region", telemetry.otlp_endpoint, telemetry.sample_ratio):
            async with inside(loaded, registry):
                await serve(site, private, stop, registry)

    with metrics.serving(registry):
        asyncio.run(main())


@grouped
def up(
    topology: Annotated[
        Path | None,
        typer.Option(
            "--topology",
            "-t",
            metavar="FILE",
            help="TOML file with all regions; else there is only this one.",
            envvar="KVSTORE_TOPOLOGY",
        ),
    ] = None,
    region: Annotated[
        str, typer.Option("--region", "-r", metavar="NAME", help="The region to act for.", envvar="KVSTORE_REGION")
    ] = "",
    signing_key: OptionalKey = None,
    *,
    metrics: Metrics,
    node: options.Node,
) -> None:
    """Run a node and its region's service in one process, for one machine, until SIGINT or SIGTERM.

    Without a bucket in the configuration, blocks are kept in a folder of the node's directory. Other regions come from the
    options, or from region.topology and region.name.
    """
    import asyncio

    from prometheus_client import CollectorRegistry

    from kvstore.admin.process import beside
    from kvstore.cli.logs import configure
    from kvstore.node.server import serve
    from replication.service import beside_a_node

    if bool(topology) != bool(region):
        raise ConfigError("--region", region, "goes with --topology", "Give both, or neither.")
    chosen = [*(node.overrides or ()), *_named(topology, region), *_defaults(node.load().config)]
    node = replace(node, overrides=chosen)
    settings = node.load().config
    site = load_site(settings, settings.region.topology, settings.region.name)
    private = own_key(site, signing_key)
    registry = CollectorRegistry()
    configure(settings.node.log_level)

    async def main() -> None:
        async with (
            beside(settings, node.arguments()),
            beside_a_node(site, private, registry),
        ):
            await serve(settings)

    with metrics.serving(registry):
        asyncio.run(main())


def _named(topology: Path | None, region: str) -> list[str]:
    """The region as settings, for its admin API."""
    return [f"region.name={region}", f"region.topology={topology.absolute()}"] if topology and region else []


def _defaults(settings: Config) -> list[str]:
    """A bucket for who has configured none, and a catalog for who has none and a folder for a bucket."""
    folder = settings.node.directory.absolute()
    bucket = [] if settings.object.url else [f"object.url=file://{folder}/bucket"]
    local = bucket or settings.object.url.startswith("file:")
    return bucket + ([f"catalog.url=sqlite://{folder}/catalog.db"] if local and not settings.catalog.url else [])


def load_site(settings: Config, topology: Path | None, region: str) -> Site:
    """The region that the options name, with what its configuration adds. Raises ConfigError."""
    from replication.site import Site
    from replication.topology import load_topology

    if topology is None:
        return Site(settings)
    regions = load_topology(topology)
    if region not in regions.regions:
        known = ", ".join(regions.regions)
        raise ConfigError("--region", region, f"not in {topology}", f"There are: {known}.")
    return Site(settings, regions, region)


def own_key(site: Site, file: Path | None) -> Ed25519PrivateKey | None:
    """The region's private key, if it is to publish. Raises ConfigError."""
    if site.topology is None:
        if file is not None:
            raise ConfigError("--key", str(file), "there is no other region to sign for", "Give --topology too.")
        return None
    if file is None:
        if site.topology.regions[site.region].public_key:
            note(f"Warning: the topology has a public_key for {site.region}, but without --key nothing is published.")
        return None
    return matching_key(site.topology, site.region, file)


def matching_key(topology: Topology, region: str, file: Path) -> Ed25519PrivateKey:
    """The private half of the region's public key. Raises ConfigError."""
    from replication.keys import public_text, read_key

    private = read_key(file, "--key")
    if public_text(private.public_key()) != topology.regions[region].public_key:
        problem = "not the private half of the region's public_key"
        raise ConfigError("--key", str(file), problem, "Put the public half of this key into the topology.")
    return private
