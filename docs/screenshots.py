"""Make the pictures of the dashboard anew: three regions with real buckets and nodes, traffic, and a browser.

python docs/screenshots.py [SECONDS of traffic before the first picture]

Needs chromium, and the Python packages playwright and ministack. What engines would save is made up; everything else is real.
"""

from __future__ import annotations

import random
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from playwright.sync_api import sync_playwright

from kvstore.admin.client import AdminClient
from kvstore.errors import KVStoreError
from kvstore.identity import NO_PARENT, Namespace, chain_digests
from kvstore.node.api import About, Description, NewBlock, Report
from kvstore.node.client import Client
from kvstore.policy.content import pieces
from kvstore.policy.prefill import attention
from kvstore.testing.admin import RunningApi
from kvstore.testing.servers import ministack
from kvstore.tiers.base import Medium
from replication.testing import LocalRegion, LocalRegions

IMAGES = Path(__file__).parent / "images"
BLOCK_BYTES, BLOCK_TOKENS = 100_000, 64
SPACES = [
    Namespace(
        model=model, weights="1", dtype=dtype, layers=2, kv_heads=2, head_dim=8, attention="gqa", rope="",
        block_tokens=BLOCK_TOKENS, layout="opaque:test",
    )
    for model, dtype in (("Qwen/Qwen3-8B", "bfloat16"), ("meta-llama/Llama-3.3-70B", "fp8"))
]  # fmt: skip
LENGTHS = (90, 70, 48, 40, 30, 24, 16, 12, 9)
SETTINGS = [
    "identity.secret=the same in all regions", "policy.admission=off",
    "host.bytes=24MiB", "host.extent_bytes=2MiB", "disk.bytes=96MiB", "disk.segment_bytes=8MiB",
]  # fmt: skip


class Engine:
    """Asks for prompts as an engine would, and saves what it computed."""

    def __init__(self, socket: Path, name: str, seed: int) -> None:
        self._client = Client(socket, name=name)
        self._random = random.Random(seed)
        same = random.Random(0)
        system = [same.randrange(50_000) for _ in range(BLOCK_TOKENS * 8)]
        self._prompts = [
            (SPACES[at % 3 == 2], system + [same.randrange(50_000) for _ in range(BLOCK_TOKENS * (blocks - 8))])
            for at, blocks in enumerate(LENGTHS)
        ]
        self._asked = 0

    def fill(self) -> None:
        for space, tokens in self._prompts:
            self._save(space, tokens)
            self._ask(space, tokens)
        self._client.call("drain", 60.0, timeout=50.0)

    def serve(self, stop: threading.Event) -> None:
        while not stop.wait(self._random.uniform(0.05, 0.4)):
            try:
                self._turn()
            except KVStoreError as error:
                print(f"a turn failed: {error}", file=sys.stderr)

    def _turn(self) -> None:
        at = min(int(self._random.expovariate(0.5)), len(self._prompts) - 1)
        space, tokens = self._prompts[at]
        said = [self._random.randrange(50_000) for _ in range(BLOCK_TOKENS * self._random.randrange(16))]
        if self._random.random() < 0.2:  # a time of day near the beginning, which nothing is shared behind
            tokens = tokens[:BLOCK_TOKENS] + [self._random.randrange(50_000) for _ in range(12)] + tokens[BLOCK_TOKENS:]
        found = self._ask(space, tokens + said)
        if self._random.random() < 0.3:
            self._save(space, tokens + said)
        computed = max(len(tokens + said) - found * BLOCK_TOKENS, BLOCK_TOKENS)
        pairs = attention(found * BLOCK_TOKENS, computed)
        self._client.report(Report(steps=[(computed, pairs, 0.005 + 33e-6 * computed + 1e-9 * pairs)]))

    def _ask(self, space: Namespace, tokens: list[int]) -> int:
        keys = self._client.open_namespace(space, BLOCK_BYTES).block_keys(chain_digests(tokens, BLOCK_TOKENS))
        self._asked += 1
        about = About(f"cmpl-{self._asked:05d}")
        found = self._client.lookup(keys, timeout=5.0, about=about).blocks
        cut = pieces(tokens, b"")
        self._client.describe(about, Description(len(tokens), cut.starts.tobytes(), cut.hashes.tobytes(), (), ()), 5.0)
        loaded = self._client.acquire(keys[:found], 5.0)
        self._client.release(keys[: len(loaded.media)])
        return len(loaded.media)

    def _save(self, space: Namespace, tokens: list[int]) -> None:
        keys = self._client.open_namespace(space, BLOCK_BYTES).block_keys(chain_digests(tokens, BLOCK_TOKENS))
        parents = [NO_PARENT, *keys]
        blocks = [NewBlock(key, parent, at) for at, (key, parent) in enumerate(zip(keys, parents, strict=False))]
        reserved = self._client.reserve(space, blocks, timeout=5.0)
        taken = [(key, offset) for key, offset in zip(keys, reserved.offsets, strict=True) if offset is not None]
        for key, offset in taken:
            reserved.arena.slot(offset, BLOCK_BYTES)[:] = random.Random(key).randbytes(BLOCK_BYTES)
        self._client.commit([key for key, _ in taken], durable=Medium.HOST, timeout=5.0)


def make_regions(stack: ExitStack, folder: Path) -> LocalRegion:
    """Europe, with a node; it pulls from two regions that have published."""
    s3 = stack.enter_context(ministack())
    regions = stack.enter_context(LocalRegions(folder))
    sources = [regions.add(name, s3, *SETTINGS) for name in ("na", "ap")]
    eu = regions.add("eu", s3, *SETTINGS)
    for source in sources:
        regions.flow(source.name, "eu", limits="price_per_gb = 0.02")
    for region in (*sources, eu):
        region.node.start()
        stack.callback(region.node.stop)
    for source in sources:
        Engine(source.node.socket, "vllm rank 0", 1).fill()
        source.publish()
    eu.replicate()
    eu.publish()
    stack.enter_context(eu.service())
    return eu


def take(api: str, scheme: str, name: str, size: tuple[int, int], act: Callable[[Any], None] | None = None) -> None:
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=["--headless", "--no-sandbox"])
        context = browser.new_context(color_scheme=scheme, viewport={"width": size[0], "height": size[1]})  # type: ignore[arg-type]
        page = context.new_page()
        page.goto(api)
        page.get_by_text("Live", exact=True).wait_for()
        page.wait_for_timeout(float(sys.argv[1]) * 1000 if len(sys.argv) > 1 else 60_000)
        if act:
            act(page)
        page.screenshot(path=IMAGES / f"{name}.png", full_page=name == "dashboard-dark")
        browser.close()


def open_second_prompt(page: Any) -> None:
    page.keyboard.press("j")
    page.keyboard.press("j")
    page.keyboard.press("Enter")
    page.get_by_role("slider").focus()
    page.wait_for_timeout(500)


def main() -> None:
    IMAGES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="kvd-") as name, ExitStack() as stack:
        eu = make_regions(stack, Path(name))
        region = [f"node.socket={eu.node.socket}", f"region.topology={eu.topology}", "region.name=eu"]
        api = stack.enter_context(RunningApi(eu.node.data, *region, *eu.settings))
        with AdminClient(api.url) as admin:
            admin.run_job("warm", {"rate": "120KiB"})
        stop = threading.Event()
        stack.callback(stop.set)
        engines = [Engine(eu.node.socket, f"vllm rank {rank}", rank) for rank in range(2)]
        for engine in engines:
            threading.Thread(target=engine.serve, args=(stop,), daemon=True).start()
        time.sleep(5)
        pictures = [
            ("dashboard-light", "light", (1440, 900), None),
            ("dashboard-dark", "dark", (1440, 900), None),
            ("dashboard-prompt", "dark", (1440, 900), open_second_prompt),
            ("dashboard-narrow", "light", (420, 900), None),
        ]
        takers = [
            threading.Thread(target=take, args=(api.url, scheme, name, size, act))
            for name, scheme, size, act in pictures
        ]
        for taker in takers:
            taker.start()
        for taker in takers:
            taker.join()


if __name__ == "__main__":
    main()
