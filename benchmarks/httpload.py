"""A load generator for HTTP/1.1, in a process of its own and cheap enough to share a core with the server.

    httpload.py PORT CORE RATE CONNECTIONS

Reads the requests as a line of JSON, ``[[METHOD, PATH, BODY], ...]``, then ``go`` and ``stop`` from standard input, and answers
each with a line. After ``go`` it sends the requests in turn, RATE a second
over all connections; to ``stop`` it answers what came of that, as JSON. A connection that is behind sends at once until
it has caught up, so that a slow server shows in the figures.
"""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import sys
import time
from collections.abc import Iterator
from itertools import cycle


async def main(port: int, core: int, rate: float, connections: int) -> None:
    os.sched_setaffinity(0, {core})
    loop = asyncio.get_running_loop()
    requests = [encoded(*one) for one in json.loads(sys.stdin.readline())]
    print(flush=True)
    while word := (await loop.run_in_executor(None, sys.stdin.readline)).strip():
        assert word == "go"
        streams = [await asyncio.open_connection("127.0.0.1", port) for _ in range(connections)]
        print(flush=True)
        stop, took, failed = asyncio.Event(), [], []
        started = time.perf_counter()
        turns = cycle(requests)
        sending = [
            asyncio.create_task(send(*stream, turns, started + place / rate, connections / rate, stop, took, failed))
            for place, stream in enumerate(streams)
        ]
        await loop.run_in_executor(None, sys.stdin.readline)
        stop.set()
        await asyncio.gather(*sending)
        seconds = time.perf_counter() - started
        for _, writer in streams:
            writer.close()
        told = {"per_second": len(took) / seconds, "median_ms": 1e3 * statistics.median(took), "failed": len(failed)}
        print(json.dumps(told), flush=True)


async def send(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    turns: Iterator[bytes],
    due: float,
    interval: float,
    stop: asyncio.Event,
    took: list[float],
    failed: list[bytes],
) -> None:
    while not stop.is_set():
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        due += interval
        sent = time.perf_counter()
        writer.write(next(turns))
        head = await reader.readuntil(b"\r\n\r\n")
        (length,) = (
            int(line.split(b":")[1]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")
        )
        await reader.readexactly(length)
        took.append(time.perf_counter() - sent)
        if not head.startswith(b"HTTP/1.1 200 "):
            failed.append(head)


def encoded(method: str, path: str, body: object) -> bytes:
    content = b"" if body is None else json.dumps(body).encode()
    kind = "Content-Type: application/json\r\n" if content else ""
    head = f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n{kind}Content-Length: {len(content)}\r\n\r\n"
    return head.encode() + content


if __name__ == "__main__":
    port, core, rate, connections = sys.argv[1:]
    asyncio.run(main(int(port), int(core), float(rate), int(connections)))
