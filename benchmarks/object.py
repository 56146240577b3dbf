"""PUT and GET of blocks through the object tier, beside the fastest raw client on the same server.

The server is nginx on tmpfs, which neither signs nor hashes, so that the clients are measured and not the server. All four
clients keep the same number of requests in flight and take turns in every round:

* tier: ``ObjectTier``, from and to page-aligned memory; each GET is verified (crc32c and identity)
* encrypted: the same, with encryption at rest; ``encrypted_*_ratio`` is its speed by that of the tier
* raw: ``http.client`` from and to the same kind of memory, without signatures, retries or checks: nothing in Python is
  faster
* boto3: with its defaults, for comparison
"""

from __future__ import annotations

import asyncio
import http.client
import os
import random
import resource
import statistics
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import urlsplit

from benchmarks.study import Study
from kvstore.encryption import TenantKeys, new_key
from kvstore.identity import BlockKey
from kvstore.testing.blocks import SealedBlock, aligned_buffer, random_key, seal
from kvstore.testing.servers import nginx_webdav
from kvstore.tiers.base import Tier
from kvstore.tiers.encryption import Encrypting
from kvstore.tiers.object import ObjectSettings, ObjectTier, ServerFeatures
from kvstore.tiers.object.objects import Objects

SIZES_MIB = (2, 8)
IN_FLIGHT = 8
BYTES_PER_TURN = 256 << 20
ROUNDS = 7
BUCKET = "bkt"


@dataclass(frozen=True)
class Turn:
    """What one client did in one round."""

    gigabytes_per_second: float
    cpu_seconds_per_gigabyte: float


class Client(ABC):
    """Puts blocks under fresh names and gets them back."""

    name: str

    @abstractmethod
    def put(self, blocks: Sequence[SealedBlock]) -> None: ...

    @abstractmethod
    def get(self, blocks: Sequence[SealedBlock], buffers: Sequence[memoryview]) -> None:
        """Fetch what ``put`` stored; ``IN_FLIGHT`` buffers are used in turn."""

    @abstractmethod
    def delete(self, blocks: Sequence[SealedBlock]) -> None: ...


class TierClient(Client):
    name = "tier"

    def __init__(self, url: str) -> None:
        settings = ObjectSettings(url=f"s3://{BUCKET}", endpoint=url, access_key_id="a", secret_access_key="b")
        self._loop = asyncio.new_event_loop()
        self._tier = self._loop.run_until_complete(self._open(settings))

    async def _open(self, settings: ObjectSettings) -> Tier:
        """Without ``ObjectTier.open``: nginx can be written to and read, but neither listed nor asked conditionally."""
        tier = ObjectTier(Objects.connect(settings), settings)
        tier.features = ServerFeatures(conditional_put=True, ranged_get=True, checksums=False)
        return tier

    def put(self, blocks: Sequence[SealedBlock]) -> None:
        self._run(lambda block, _: self._tier.put(block.header, block.envelope), blocks, [memoryview(b"")] * IN_FLIGHT)

    def get(self, blocks: Sequence[SealedBlock], buffers: Sequence[memoryview]) -> None:
        self._run(lambda block, buffer: self._tier.get(block.key, buffer), blocks, buffers)

    def delete(self, blocks: Sequence[SealedBlock]) -> None:
        self._loop.run_until_complete(self._tier.delete([block.key for block in blocks]))

    def close(self) -> None:
        self._loop.run_until_complete(self._tier.close())
        self._loop.close()

    def _run(
        self,
        step: Callable[[SealedBlock, memoryview], Any],
        blocks: Sequence[SealedBlock],
        buffers: Sequence[memoryview],
    ) -> None:
        async def worker(todo: Iterator[SealedBlock], buffer: memoryview) -> None:
            for block in todo:
                await step(block, buffer)

        async def all_workers() -> None:
            todo = iter(blocks)
            await asyncio.gather(*(worker(todo, buffer) for buffer in buffers))

        self._loop.run_until_complete(all_workers())


class EncryptedTierClient(TierClient):
    name = "encrypted"

    async def _open(self, settings: ObjectSettings) -> Tier:
        return Encrypting(await super()._open(settings), TenantKeys(new_key(), "study"))


class ThreadedClient(Client):
    """Blocking calls in ``IN_FLIGHT`` threads that live as long as the client."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._threads = ThreadPoolExecutor(IN_FLIGHT)

    @abstractmethod
    def put_one(self, name: str, body: memoryview) -> None: ...

    @abstractmethod
    def get_one(self, name: str, into: memoryview) -> None: ...

    def put(self, blocks: Sequence[SealedBlock]) -> None:
        self._run(lambda block, _: self.put_one(block.key.hex(), block.envelope), blocks, [memoryview(b"")] * IN_FLIGHT)

    def get(self, blocks: Sequence[SealedBlock], buffers: Sequence[memoryview]) -> None:
        self._run(lambda block, buffer: self.get_one(block.key.hex(), buffer), blocks, buffers)

    def delete(self, blocks: Sequence[SealedBlock]) -> None:
        connection = http.client.HTTPConnection(urlsplit(self.url).netloc)
        for block in blocks:
            connection.request("DELETE", f"/{BUCKET}/{block.key.hex()}")
            connection.getresponse().read()
        connection.close()

    def close(self) -> None:
        self._threads.shutdown()

    def _run(
        self,
        step: Callable[[SealedBlock, memoryview], None],
        blocks: Sequence[SealedBlock],
        buffers: Sequence[memoryview],
    ) -> None:
        todo = iter(blocks)
        turn = threading.Lock()

        def worker(buffer: memoryview) -> None:
            while True:
                with turn:
                    block = next(todo, None)
                if block is None:
                    return
                step(block, buffer)

        list(self._threads.map(worker, buffers))


class RawClient(ThreadedClient):
    name = "raw"

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self._local = threading.local()

    def put_one(self, name: str, body: memoryview) -> None:
        connection = self._connection()
        connection.request("PUT", f"/{BUCKET}/{name}", body, {"Content-Length": str(len(body))})
        reply = connection.getresponse()
        reply.read()
        if reply.status != 201:
            raise RuntimeError(f"PUT answered {reply.status}")

    def get_one(self, name: str, into: memoryview) -> None:
        connection = self._connection()
        connection.request("GET", f"/{BUCKET}/{name}")
        reply = connection.getresponse()
        position = 0
        while count := reply.readinto(into[position:]):
            position += count
        reply.read()
        if reply.status != 200 or position != len(into):
            raise RuntimeError(f"GET answered {reply.status} and {position} bytes")

    def _connection(self) -> http.client.HTTPConnection:
        connection: http.client.HTTPConnection | None = getattr(self._local, "connection", None)
        if connection is None:
            connection = self._local.connection = http.client.HTTPConnection(urlsplit(self.url).netloc)
        return connection


class Boto3Client(ThreadedClient):
    name = "boto3"

    def __init__(self, url: str) -> None:
        import boto3

        super().__init__(url)
        self._client = boto3.client(
            "s3", endpoint_url=url, region_name="us-east-1", aws_access_key_id="a", aws_secret_access_key="b"
        )

    def put_one(self, name: str, body: memoryview) -> None:
        self._client.put_object(Bucket=BUCKET, Key=name, Body=bytes(body))

    def get_one(self, name: str, into: memoryview) -> None:
        into[:] = self._client.get_object(Bucket=BUCKET, Key=name)["Body"].read()


@contextmanager
def measured(nbytes: int, into: list[Turn]) -> Iterator[None]:
    before, started = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    yield
    seconds, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    into.append(Turn(nbytes / seconds / 1e9, cpu / (nbytes / 1e9)))


def run(args: Any) -> Mapping[str, float]:
    turns: dict[tuple[str, str, int], list[Turn]] = defaultdict(list)
    source = random.Random(1)
    with nginx_webdav() as url:
        clients = [TierClient(url), EncryptedTierClient(url), RawClient(url), Boto3Client(url)]
        for size in SIZES_MIB:
            payload = os.urandom((size << 20) - 4096)
            sealed = seal(random_key(source), payload)
            blocks = [fresh(sealed, source) for _ in range(max(IN_FLIGHT, BYTES_PER_TURN // (size << 20)))]
            buffers = [aligned_buffer(size << 20) for _ in range(IN_FLIGHT)]
            nbytes = len(blocks) * (size << 20)
            for number in range(-1, ROUNDS):  # the first round warms connections and is not counted
                for client in clients if number % 2 else reversed(clients):
                    put_turns: list[Turn] = []
                    get_turns: list[Turn] = []
                    with measured(nbytes, put_turns):
                        client.put(blocks)
                    with measured(nbytes, get_turns):
                        client.get(blocks, buffers)
                    client.delete(blocks)
                    if number >= 0:
                        turns[client.name, "put", size] += put_turns
                        turns[client.name, "get", size] += get_turns
        for client in clients:
            client.close()
    return figures(turns)


def fresh(sealed: SealedBlock, source: random.Random) -> SealedBlock:
    """The same payload under another key."""
    header = replace(sealed.header, key=BlockKey(random_key(source)))
    envelope = aligned_buffer(len(sealed.envelope))
    envelope[:] = sealed.envelope
    header.pack_into(envelope)
    return SealedBlock(header, envelope)


def ratio(ours: Sequence[Turn], theirs: Sequence[Turn]) -> float:
    """Median over the rounds."""
    return statistics.median(a.gigabytes_per_second / b.gigabytes_per_second for a, b in zip(ours, theirs, strict=True))


def figures(turns: Mapping[tuple[str, str, int], Sequence[Turn]]) -> dict[str, float]:
    """Medians of all rounds; a ratio is taken within each round first, and the lower of both sizes counts."""
    found: dict[str, float] = {}
    for verb, direction in (("put", "write"), ("get", "read")):
        ratios, encrypted = [], []
        for size in SIZES_MIB:
            for (name, other, mib), done in turns.items():
                if (other, mib) == (verb, size):
                    found[f"{verb}_{name}_gbps_{size}m"] = statistics.median(t.gigabytes_per_second for t in done)
                    found[f"{verb}_{name}_cpu_s_per_gb_{size}m"] = statistics.median(
                        t.cpu_seconds_per_gigabyte for t in done
                    )
            ratios.append(ratio(turns["tier", verb, size], turns["raw", verb, size]))
            encrypted.append(ratio(turns["encrypted", verb, size], turns["tier", verb, size]))
            found[f"{verb}_ratio_to_raw_{size}m"] = ratios[-1]
        found[f"{verb}_ratio_to_raw"] = min(ratios)
        found[f"encrypted_{direction}_ratio"] = min(encrypted)
    for name, value in found.items():
        print(f"{name:32} {value:.3f}", file=sys.stderr)
    return found


STUDY = Study(
    name="object",
    summary="PUT and GET of 2 and 8 MiB blocks, 8 in flight, object tier against a raw HTTP client",
    run=run,
    targets={"put_ratio_to_raw": ">=0.9", "get_ratio_to_raw": ">=0.5"},
)
