"""Copying blocks between regions over a link of 50 ms: how much of the link is used, and what a cut costs.

Source and destination are nginx on tmpfs and the link is the shaping proxy of ``kvstore.testing``, so that neither server is the
limit. The ceiling is measured in the same rounds: plain HTTP reads of the same objects over the same link, on as many
connections, nothing checked and nothing written.

    bytes per second of the copy (fetched, verified, asked for at the destination, created there)
    ÷ bytes per second of the plain reads
"""

from __future__ import annotations

import argparse
import asyncio
import http.client
import random
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import obstore

from benchmarks.study import Study
from kvstore.envelope import envelope_bytes
from kvstore.testing.blocks import SealedBlock, random_chain
from kvstore.testing.servers import nginx_webdav
from kvstore.testing.shaping import Shape, ShapedLink, shaped
from kvstore.tiers.object import ObjectSettings
from kvstore.tiers.object.names import block_name
from kvstore.tiers.object.objects import Objects
from replication.copier import Copied, Outcome, Streamed, Window, copy
from replication.links import Links
from replication.manifest import HotBlock
from replication.rate import RateLimit
from replication.topology import CONNECT_SECONDS, REQUEST_SECONDS, STALL_SECONDS

ROUND_TRIP = 0.05
READERS = 32
CUT_SECONDS = 5.0


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--megabytes-per-second", type=float, default=50.0, help="of the link (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=6.0, help="that the link needs for a round's bytes")


def run(args: Any) -> Mapping[str, float]:
    rate = args.megabytes_per_second * 1e6
    figures: dict[str, float] = {}
    with nginx_webdav() as far, nginx_webdav() as near:
        for name, payload in (("", 2 << 20), ("_small_blocks", 256 << 10)):
            blocks = random_chain(random.Random(1), int(rate * args.seconds / envelope_bytes(payload)), payload)
            store(far, blocks)
            with shaped(far, Shape(ROUND_TRIP / 2, rate)) as link:
                ratios = []
                for number in range(args.rounds):
                    ceiling = plain_reads(link, blocks)
                    ours = copied(link, near, blocks, f"{payload}-{number}")
                    ratios.append(ours / ceiling)
                    say(f"{payload >> 10} KiB: link {ceiling / 1e6:.1f} MB/s, copy {ours / 1e6:.1f} MB/s")
                figures[f"link_utilisation_50ms{name}"] = statistics.median(ratios)
                if not name:
                    figures["copy_megabytes_per_second"] = ours / 1e6
                    figures["convergence_seconds_after_cut"] = after_a_cut(link, near, blocks)
    return figures


def say(text: str) -> None:
    print(text, file=sys.stderr)


def settings(endpoint: str, folder: str) -> ObjectSettings:
    """As the replicator has them; nginx asks for no signature."""
    return ObjectSettings(
        url=f"s3://bkt/{folder}",
        endpoint=endpoint,
        access_key_id="a",
        secret_access_key="b",
        connect_timeout=CONNECT_SECONDS,
        read_timeout=STALL_SECONDS,
        request_timeout=REQUEST_SECONDS,
        retries=0,
    )


def store(endpoint: str, blocks: Sequence[SealedBlock]) -> None:
    bucket = Objects.connect(settings(endpoint, "source")).store
    for block in blocks:
        obstore.put(bucket, block_name(block.header.namespace, block.key), bytes(block.envelope), use_multipart=False)


def plain_reads(link: ShapedLink, blocks: Sequence[SealedBlock]) -> float:
    """Bytes per second."""
    host = urlsplit(link.endpoint).netloc
    waiting = iter([block_name(block.header.namespace, block.key) for block in blocks])

    def read() -> int:
        connection = http.client.HTTPConnection(host)
        nbytes = 0
        for name in waiting:
            connection.request("GET", f"/bkt/source/{name}")
            nbytes += len(connection.getresponse().read())
        connection.close()
        return nbytes

    started = time.perf_counter()
    with ThreadPoolExecutor(READERS) as threads:
        nbytes = sum(future.result() for future in [threads.submit(read) for _ in range(READERS)])
    return nbytes / (time.perf_counter() - started)


def copied(link: ShapedLink, near: str, blocks: Sequence[SealedBlock], folder: str, cut_after: int = 0) -> float:
    """Bytes per second of a copy; with ``cut_after`` the link is cut for a while when so many blocks have arrived."""
    result = Copied()

    def done(block: HotBlock, outcome: Outcome) -> None:
        result.add(block, outcome)
        if sum(result.outcomes.values()) == cut_after:
            link.cut()
            asyncio.get_running_loop().call_later(CUT_SECONDS, link.heal)

    async def whole() -> float:
        rows = [
            HotBlock(b.key, b.header.parent, b.header.namespace, b.header.length, b.header.created, 1.0) for b in blocks
        ]
        async with (
            Links.open([settings(link.endpoint, "source")]) as source,
            Links.open([settings(near, folder)]) as destination,
        ):
            started = time.perf_counter()
            await copy(rows, Streamed(source, destination, RateLimit(None), Window()), done)
            return result.nbytes / (time.perf_counter() - started)

    rate = asyncio.run(whole())
    assert result.outcomes == {Outcome.COPIED: len(blocks)}, result.outcomes
    return rate


def after_a_cut(link: ShapedLink, near: str, blocks: Sequence[SealedBlock]) -> float:
    """Seconds that a cut costs beyond its own length: from the repair until the copy is where it would have been."""
    nbytes = sum(block.header.envelope_bytes for block in blocks)
    lost = []
    for number in range(3):
        whole = nbytes / copied(link, near, blocks, f"whole-{number}")
        broken = nbytes / copied(link, near, blocks, f"cut-{number}", cut_after=len(blocks) // 3)
        lost.append(broken - whole - CUT_SECONDS)
        say(f"cut for {CUT_SECONDS:g} s: {whole:.1f} s became {broken:.1f} s")
    return statistics.median(lost)


STUDY = Study(
    name="replication",
    summary="Copying blocks between regions over a link of 50 ms",
    run=run,
    targets={"link_utilisation_50ms": ">=0.9", "convergence_seconds_after_cut": "<10"},
    arguments=arguments,
)
