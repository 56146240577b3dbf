"""Regions on one machine, for tests and demos: a bucket, a node and the commands of each, and links of any shape between them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import obstore

from kvstore.envelope import HEADER_BYTES
from kvstore.identity import BlockKey
from kvstore.testing.node import NodeProcess
from kvstore.testing.servers import Daemon, S3Server
from kvstore.testing.shaping import Shape, ShapedLink, shaped
from kvstore.tiers.object import ObjectSettings
from kvstore.tiers.object.names import block_name
from kvstore.tiers.object.objects import Objects
from replication.keys import create_key, public_text

COMMAND_SECONDS = 120.0


@dataclass
class LocalRegion:
    """One region. What it calls other regions' buckets leads through its links to them."""

    name: str
    folder: Path
    s3: S3Server
    bucket: ObjectSettings
    node: NodeProcess
    """Not started yet."""
    public_key: str
    settings: Sequence[str]
    """Of its node and its service, as ``section.key=value``."""
    links: dict[str, ShapedLink] = field(default_factory=dict)
    """To its sources, by their names."""

    @property
    def topology(self) -> Path:
        return self.folder / "regions.toml"

    @property
    def key(self) -> Path:
        """With which it signs its manifests."""
        return self.folder / "key.pem"

    def command(self, verb: str, *arguments: str) -> list[str]:
        """``kvstore region VERB`` for this region, for verbs that take settings."""
        places = ["--topology", str(self.topology), "--region", self.name]
        return [sys.executable, "-m", "kvstore", "region", verb, *places, *self._options, *arguments]

    @property
    def _options(self) -> list[str]:
        return [f"--set={text}" for text in self.settings]

    def publish(self) -> dict[str, Any]:
        """What the command says, with its exit status as ``status``."""
        return _json(self.command("publish", "--key", str(self.key), "--json"))

    def replicate(self) -> dict[str, Any]:
        """One round, as ``publish``."""
        return _json(self.command("replicate", "--json"))

    def warm(self, *arguments: str) -> dict[str, Any]:
        """Fill the node from the region's bucket, as ``publish``."""
        node = ["--socket", str(self.node.socket), f"--set=node.directory={self.node.data}", *self._options]
        return _json([sys.executable, "-m", "kvstore", "warm", "--json", *node, *arguments])

    def damage(self, namespace: bytes, key: BlockKey) -> None:
        """Flip a bit of a block's payload in the bucket."""
        store, name = Objects.connect(self.bucket).store, block_name(namespace, key)
        body = bytearray(obstore.get(store, name).bytes())
        body[HEADER_BYTES + 1000] ^= 1
        obstore.put(store, name, bytes(body), use_multipart=False)

    @contextmanager
    def service(self) -> Iterator[Daemon]:
        """``kvstore region run`` until the block ends."""
        daemon = Daemon(
            self.command("run", "--key", str(self.key)), self.folder / "region.log", lambda: True, patience=15
        )
        daemon.start()
        try:
            yield daemon
        finally:
            daemon.stop()


class LocalRegions:
    """Makes regions and what connects them. A context manager: links end with it; servers and nodes are the caller's."""

    def __init__(self, folder: Path) -> None:
        """``folder`` must have a short name: a socket's path has at most 107 bytes."""
        self.regions: dict[str, LocalRegion] = {}
        self._folder = folder
        self._flows: list[tuple[str, str, str]] = []
        self._stack = ExitStack()

    def __enter__(self) -> LocalRegions:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def add(self, name: str, s3: S3Server, *settings: str, bucket: str = "") -> LocalRegion:
        """A region with a bucket on ``s3``, which its node makes when it starts; ``settings`` are the node's."""
        folder = self._folder / name
        folder.mkdir()
        where = ObjectSettings(
            url=f"s3://{bucket or f'kv-{name}'}/regional",
            endpoint=s3.endpoint,
            region=s3.region,
            access_key_id=s3.access_key,
            secret_access_key=s3.secret_key,
        )
        settings = (*_bucket_settings(where), *settings)
        node = NodeProcess(folder, "object.create_bucket=true", *settings)
        key = public_text(create_key(folder / "key.pem").public_key())
        region = self.regions[name] = LocalRegion(name, folder, s3, where, node, key, settings)
        (self._folder / f"{name}.credentials").write_text(
            f'access_key_id = "{s3.access_key}"\nsecret_access_key = "{s3.secret_key}"\n'
        )
        self._write()
        return region

    def flow(self, source: str, to: str, shape: Shape | None = None, limits: str = "") -> ShapedLink:
        """Let ``to`` pull from ``source`` over a link of its own; ``limits`` are further lines of the flow in TOML."""
        link = self._stack.enter_context(shaped(self.regions[source].s3.endpoint, shape))
        self.regions[to].links[source] = link
        self._flows.append((source, to, limits))
        self._write()
        return link

    def _write(self) -> None:
        for region in self.regions.values():
            region.topology.write_text(self._topology(region))

    def _topology(self, viewer: LocalRegion) -> str:
        """The same for all but for the addresses: each region has its own way to the others."""
        text = ['mode = "enforce"']
        for region in self.regions.values():
            link = viewer.links.get(region.name)
            text += [
                f"[regions.{region.name}]",
                f'url = "{region.bucket.url}"',
                f'endpoints = ["{link.endpoint if link else region.s3.endpoint}"]',
                f'credentials_file = "{self._folder / region.name}.credentials"',
                f'public_key = "{region.public_key}"',
            ]
        for source, to, limits in self._flows:
            text += ["[[flows]]", f'from = "{source}"', f'to = ["{to}"]', limits]
        return "\n".join(text) + "\n"


def _bucket_settings(bucket: ObjectSettings) -> list[str]:
    return [
        f"object.url={bucket.url}",
        f"object.endpoint={bucket.endpoint}",
        f"object.region={bucket.region}",
        f"object.access_key_id={bucket.access_key_id}",
        f"object.secret_access_key={bucket.secret_access_key}",
    ]


def _json(argv: Sequence[str]) -> dict[str, Any]:
    done = subprocess.run(argv, capture_output=True, text=True, timeout=COMMAND_SECONDS)
    if not done.stdout:
        raise RuntimeError(f"{' '.join(argv[2:5])} ended with status {done.returncode}:\n{done.stderr[-3000:]}")
    said: dict[str, Any] = json.loads(done.stdout)
    return {**said, "status": done.returncode}
