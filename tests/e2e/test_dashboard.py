"""The dashboard in a real Chromium, over a real node and its API."""

from __future__ import annotations

import asyncio
import random
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from kvstore.admin.jobs import JobKind, Running
from kvstore.admin.kinds import NoOptions
from kvstore.admin.tokens import Role, TokenBook
from kvstore.identity import NO_PARENT, BlockKey, Namespace, chain_digests
from kvstore.node.api import About, Description, NewBlock
from kvstore.policy.content import pieces
from kvstore.testing.admin import RunningApi
from kvstore.testing.node import PatientClient, RunningNode
from kvstore.tiers.base import Medium
from replication.contents import Contents
from replication.keys import public_text
from replication.links import Links
from replication.publisher import publish
from replication.replicator import Replicator
from replication.topology import Topology, load_topology

playwright = pytest.importorskip("playwright.sync_api", reason="needs the playwright package")
accessibility = pytest.importorskip("axe_playwright_python.sync_playwright", reason="needs its package").Axe()
CHROMIUM = shutil.which("chromium")
if CHROMIUM is None:
    pytest.skip("needs a chromium on the path", allow_module_level=True)
expect = playwright.expect

ARGUMENTS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip
PATIENCE = 10_000
"""Milliseconds that an expectation waits: far beyond what it takes."""

BLOCK_BYTES = 10_000
NAMESPACE = Namespace(
    model="org/toy", weights="1", dtype="float32", layers=2, kv_heads=2, head_dim=8, attention="gqa", rope="",
    block_tokens=16, layout="opaque:test",
)  # fmt: skip
TOKENS = list(range(16 * 5 + 3))


@dataclass
class Site:
    folder: Path
    node: RunningNode
    api: RunningApi
    client: PatientClient

    def save(self, tokens: list[int]) -> list[BlockKey]:
        """Save the blocks of a prompt, in host memory and on disk."""
        keys = self.keys(tokens)
        parents = [NO_PARENT, *keys]
        blocks = [NewBlock(key, parent, index) for index, (key, parent) in enumerate(zip(keys, parents, strict=False))]
        reserved = self.client.reserve(NAMESPACE, blocks)
        for index, offset in enumerate(reserved.offsets):
            if offset is not None:
                reserved.arena.slot(offset, BLOCK_BYTES)[:] = bytes([index]) * BLOCK_BYTES
        self.client.commit(
            [key for key, at in zip(keys, reserved.offsets, strict=True) if at is not None], durable=Medium.DISK
        )
        return keys

    def ask(self, tokens: list[int], request: str) -> None:
        self.client.lookup(self.keys(tokens), timeout=5.0, about=About(request))

    def keys(self, tokens: list[int]) -> list[BlockKey]:
        keyring = self.client.open_namespace(NAMESPACE, BLOCK_BYTES)
        return keyring.block_keys(chain_digests(tokens, NAMESPACE.block_tokens))


@contextmanager
def running_site(folder: Path) -> Iterator[Site]:
    """With one prompt of five blocks that was asked for twice."""
    with RunningNode(folder) as node, RunningApi(folder) as api:
        with PatientClient(node.socket, name="vllm rank 0") as client:
            site = Site(folder, node, api, client)
            site.save(TOKENS)
            site.ask(TOKENS, "cmpl-first")
            with PatientClient(
                node.socket, name="vllm rank 1"
            ) as other:  # the same client asking again would be a retry
                Site(folder, node, api, other).ask(TOKENS, "cmpl-second")
            yield site


@pytest.fixture
def own_site(tmp_path: Path) -> Iterator[Site]:
    """For tests that change what others look at."""
    with running_site(tmp_path) as site:
        yield site


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with running_site(tmp_path_factory.mktemp("site")) as site:
        yield site


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Any, site: Site) -> Iterator[Any]:
    with opened(browser, site) as page:
        yield page


@pytest.fixture
def own_page(browser: Any, own_site: Site) -> Iterator[Any]:
    with opened(browser, own_site) as page:
        yield page


@contextmanager
def opened(browser: Any, site: Site) -> Iterator[Any]:
    """An open dashboard; fails if the page asks another site for anything, or anything in it went wrong."""
    context = browser.new_context(color_scheme="dark", viewport={"width": 1440, "height": 900})
    context.set_default_timeout(PATIENCE)
    playwright.expect.set_options(timeout=PATIENCE)
    page = context.new_page()
    wrong: list[str] = []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on(
        "console",
        lambda said: wrong.append(said.text) if said.type == "error" and "Failed to load" not in said.text else None,
    )
    page.on("console", lambda said: wrong.append(said.text) if "Content Security" in said.text else None)
    page.on("request", lambda asked: None if asked.url.startswith(site.api.url) else wrong.append(asked.url))
    page.goto(site.api.url)
    yield page
    context.close()
    assert wrong == []


def panel(page: Any, name: str) -> Any:
    return page.locator(f"[data-panel={name}]")


def tile(page: Any, name: str) -> Any:
    return page.locator(f"[data-tile={name}]")


def barriers(page: Any) -> list[Any]:
    """What axe-core says is wrong with the page as it is now."""
    found = accessibility.run(page).response
    assert found["passes"], "it looked at nothing"
    return list(found["violations"])


def open_first_prompt(page: Any) -> Any:
    panel(page, "hot").get_by_role("button").first.click()
    dialog = page.get_by_role("dialog")
    expect(dialog).to_contain_text("5 of 5 blocks")
    return dialog


def test_numbers_are_live(own_page: Any, own_site: Site) -> None:
    expect(own_page.get_by_text("Live", exact=True)).to_be_visible()
    expect(tile(own_page, "stored")).to_contain_text("5 in all")
    expect(panel(own_page, "tiers").locator("[data-tier=disk]")).to_contain_text("5 blocks")
    expect(panel(own_page, "hot").get_by_role("row")).to_have_count(2)
    expect(panel(own_page, "nodes")).to_contain_text("vllm rank 0")
    own_site.save([7, *TOKENS])
    expect(tile(own_page, "stored")).to_contain_text("10 in all")
    expect(panel(own_page, "tiers").locator("[data-tier=disk]")).to_contain_text("10 blocks")
    own_site.ask([9, *TOKENS], "cmpl-miss")
    expect(tile(own_page, "hits")).to_contain_text("67%")  # 10 of 15 blocks' tokens
    chart = panel(own_page, "chart").get_by_role("img")
    expect(chart).to_have_attribute("aria-label", "Of 80 tokens asked for, found in host 0%, disk 0%.")


def test_the_page_runs_nothing_but_its_own_files(page: Any, site: Site) -> None:
    answer = page.request.get(site.api.url)
    policy = dict(part.strip().split(" ", 1) for part in answer.headers["content-security-policy"].split(";"))
    assert policy["default-src"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    assert page.request.get(f"{site.api.url}/dashboard/main.js").headers["x-content-type-options"] == "nosniff"
    for outside in ("../jobs.py", "%2e%2e/jobs.py", "..%2fjobs.py", "vendor"):
        assert page.request.get(f"{site.api.url}/dashboard/{outside}").status == 404


def test_themes_follow_the_system_and_the_switch(page: Any) -> None:
    def ground() -> int:
        """How bright the page is."""
        color: str = page.evaluate("getComputedStyle(document.body).backgroundColor")
        return sum(map(int, color.removeprefix("rgb(").removesuffix(")").split(",")))

    expect(page.get_by_text("Live", exact=True)).to_be_visible()
    assert ground() < 150
    page.keyboard.press("t")
    expect(page.get_by_text("Theme: light")).to_be_visible()
    assert ground() > 600
    page.reload()
    expect(page.get_by_text("Live", exact=True)).to_be_visible()
    assert ground() > 600
    page.get_by_role("button", name="Theme: light").click()
    assert ground() < 150


def test_nothing_keeps_anybody_from_reading_it(browser: Any, site: Site) -> None:
    """By axe-core: contrast, names, roles, landmarks. Light, dark and narrow, and in dialogs."""
    for scheme, width in (("light", 1440), ("dark", 1440), ("light", 420)):
        with opened(browser, site) as page:
            page.emulate_media(color_scheme=scheme)
            page.set_viewport_size({"width": width, "height": 900})
            expect(panel(page, "hot").get_by_role("button").first).to_be_visible()
            found = {"page": barriers(page)}
            for key in ("?", "e", "w"):
                page.keyboard.press(key)
                expect(page.get_by_role("dialog")).to_be_visible()
                found[key] = barriers(page)
                page.keyboard.press("Escape")
                expect(page.get_by_role("dialog")).to_have_count(0)
            open_first_prompt(page)
            expect(page.get_by_role("dialog")).to_contain_text("Prompts that begin alike")
            found["prompt"] = barriers(page)
        told = [
            f"{place}: {one['id']}: {node['html'][:200]}"
            for place in found
            for one in found[place]
            for node in one["nodes"]
        ]
        assert told == [], (scheme, width)


def test_everything_is_reached_from_the_keyboard(page: Any) -> None:
    expect(panel(page, "hot").get_by_role("button")).to_be_visible()
    page.keyboard.press("?")
    expect(page.get_by_role("dialog", name="Shortcuts")).to_contain_text("explain a prompt")
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog")).to_have_count(0)
    page.keyboard.press("j")
    expect(panel(page, "hot").get_by_role("button")).to_be_focused()
    page.keyboard.press("Enter")
    block = page.get_by_role("slider", name="Block")
    expect(block).to_have_attribute("aria-valuetext", "block 0, in host, disk")
    block.focus()
    page.keyboard.press("End")
    page.keyboard.press("ArrowLeft")
    expect(block).to_have_attribute("aria-valuetext", "block 3, in host, disk")
    page.keyboard.press("Escape")
    expect(panel(page, "hot").get_by_role("button")).to_be_focused()
    page.keyboard.press("e")
    field = page.get_by_role("dialog", name="Explain a prompt").get_by_label("Request id", exact=True).last
    expect(field).to_be_focused()
    field.fill("e w j")  # typed, not done
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog")).to_have_count(0)
    landmarks = {name: page.get_by_role(name).count() for name in ("banner", "main", "navigation", "contentinfo")}
    assert set(landmarks.values()) == {1}, landmarks


def explain(page: Any, way: str, text: str) -> Any:
    expect(page.get_by_role("dialog")).to_have_count(0)
    page.keyboard.press("e")
    dialog = page.get_by_role("dialog")
    dialog.get_by_text(way, exact=True).first.click()
    dialog.get_by_role("textbox").fill(text)
    dialog.get_by_role("button", name="Explain").click()
    return dialog


def test_a_miss_is_explained(own_page: Any, own_site: Site) -> None:
    expect(own_page.get_by_text("Live", exact=True)).to_be_visible()
    own_site.ask([*TOKENS[:32], *range(500, 532)], "cmpl-parts")
    dialog = explain(own_page, "Request id", "cmpl-parts")
    expect(dialog).to_contain_text("32 tokens, 2 of 4 blocks")
    expect(dialog.get_by_role("row").filter(has_text="2 – 3")).to_contain_text("never stored")
    expect(dialog.get_by_role("slider")).to_have_attribute("aria-valuetext", "block 2, in no tier")
    own_page.keyboard.press("Escape")
    expect(explain(own_page, "Token ids", ", ".join(map(str, TOKENS)))).to_contain_text("80 tokens, 5 of 5 blocks")
    own_page.keyboard.press("Escape")
    expect(explain(own_page, "Token ids", "1, two")).to_contain_text("Token ids are whole numbers")
    own_page.keyboard.press("Escape")
    expect(explain(own_page, "Request id", "cmpl-nobody").get_by_role("alert")).to_contain_text("cmpl-nobody")


def test_a_job_is_started_and_cancelled(page: Any, site: Site) -> None:
    async def run(job: Running, options: NoOptions) -> dict[str, Any]:
        for done in range(1000):
            job.report(done, 1000, "steps", "walking")
            await asyncio.sleep(0.05)
        return {}

    site.api.site.jobs.register(JobKind("walk", "Takes a while.", NoOptions, run))
    expect(panel(page, "jobs")).to_contain_text("No job was run yet")
    for kind in ("scrub", "walk"):
        page.get_by_role("button", name="Start a job").click()
        page.get_by_role("dialog").get_by_role("radio", name=kind).check()
        page.get_by_role("dialog").get_by_role("button", name="Start", exact=True).click()
        expect(page.get_by_role("dialog")).to_have_count(0)
    rows = panel(page, "jobs").get_by_role("listitem")
    expect(rows.filter(has_text="scrub")).to_contain_text("10 of 10 blocks")
    walk = rows.filter(has_text="walk")
    before = walk.get_by_role("progressbar").get_attribute("value")
    expect(walk.get_by_role("progressbar")).not_to_have_attribute("value", before or "")
    walk.get_by_role("button", name="Cancel walk").click()
    expect(walk).to_contain_text("cancelled")
    assert {job.kind: job.state.value for job in site.api.site.jobs.all()} == {"scrub": "done", "walk": "cancelled"}


def test_a_job_that_deletes_wants_its_name(own_page: Any, own_site: Site) -> None:
    async def run(job: Running, options: NoOptions) -> dict[str, Any]:
        return {}

    own_site.api.site.jobs.register(JobKind("raze", "Deletes.", NoOptions, run, Role.ADMIN))
    own_page.get_by_role("button", name="Start a job").click()
    dialog = own_page.get_by_role("dialog")
    start = dialog.get_by_role("button", name="Start", exact=True)
    dialog.get_by_role("radio", name="raze").check()
    expect(start).to_be_disabled()
    dialog.get_by_role("textbox").fill("raz")
    own_page.keyboard.press("Enter")
    assert own_site.api.site.jobs.all() == []
    dialog.get_by_role("textbox").fill("raze")
    own_page.keyboard.press("Enter")
    expect(dialog).to_have_count(0)
    assert [job.kind for job in own_site.api.site.jobs.all()] == ["raze"]


def test_a_prompt_is_pinned_and_unpinned(page: Any) -> None:
    expect(panel(page, "pins")).to_contain_text("Nothing is pinned")
    dialog = open_first_prompt(page)
    dialog.get_by_label("Pin for").select_option("8 hours")
    dialog.get_by_role("button", name="Pin", exact=True).click()
    expect(dialog).to_contain_text("pinned, ends in 8")
    page.keyboard.press("Escape")
    pin = panel(page, "pins").get_by_role("row").nth(1)
    expect(pin).to_contain_text("host 5 · disk 5")
    pin.get_by_role("button", name="Unpin").click()
    expect(panel(page, "pins")).to_contain_text("Nothing is pinned")


def test_purging_needs_the_name(own_page: Any) -> None:
    own_page.get_by_role("button", name="Purge org/toy").click()
    dialog = own_page.get_by_role("dialog", name="Purge org/toy")
    purge = dialog.get_by_role("button", name="Purge", exact=True)
    expect(purge).to_be_disabled()
    dialog.get_by_role("textbox").fill("org/to")
    own_page.keyboard.press("Enter")
    expect(purge).to_be_disabled()
    expect(panel(own_page, "tiers").locator("[data-tier=disk]")).to_contain_text("5 blocks")
    dialog.get_by_role("textbox").fill("org/toy")
    purge.click()
    expect(dialog).to_have_count(0)
    expect(own_page.get_by_text("Purged org/toy: 5 blocks from host, 5 blocks from disk")).to_be_visible()
    expect(panel(own_page, "tiers").locator("[data-tier=disk]")).to_contain_text("0 blocks")


def test_a_bad_block_is_shown(own_page: Any, own_site: Site) -> None:
    expect(panel(own_page, "troubles")).to_contain_text("Every block that was read verified")
    _flip_a_bit(own_site.node.config.disk_directory, bytes([3]) * 100)
    own_site.client.call("verify", 30.0, medium="disk", limit=100)
    expect(panel(own_page, "troubles").get_by_role("listitem").filter(has_text="disk").first).to_be_visible()
    expect(panel(own_page, "tiers").locator("[data-tier=disk]")).to_contain_text("1 bad")


def _flip_a_bit(folder: Path, content: bytes) -> None:
    """In the only file under ``folder`` that has that content."""
    for path in folder.rglob("segment-*"):
        if (at := path.read_bytes().find(content)) >= 0:
            with path.open("r+b") as file:
                file.seek(at)
                file.write(bytes([content[0] ^ 1]))
            return
    pytest.fail("no segment has it")


def test_a_token_is_asked_for(browser: Any, tmp_path: Path) -> None:
    book = TokenBook(tmp_path / "tokens.json")
    _, text = book.create("on call", Role.VIEWER)
    with RunningNode(tmp_path), RunningApi(tmp_path, f"api.tokens={tmp_path / 'tokens.json'}") as api:
        page = browser.new_page()
        page.goto(api.url)
        expect(page.get_by_role("alert")).to_contain_text("A token is needed")
        page.get_by_label("Token").fill("kvs_wrong")
        page.keyboard.press("Enter")
        expect(page.get_by_role("alert")).to_contain_text("a valid bearer token is needed")
        page.get_by_label("Token").fill(text)
        page.keyboard.press("Enter")
        expect(page.get_by_text("Live", exact=True)).to_be_visible()
        expect(page.get_by_role("contentinfo")).to_contain_text("on call, viewer")
        expect(page.get_by_role("button", name="Start a job")).to_be_disabled()
        page.reload()
        expect(page.get_by_text("Live", exact=True)).to_be_visible()
        assert page.evaluate("JSON.stringify(localStorage) + document.cookie + location.href").count(text) == 0
        page.get_by_role("button", name="Sign out").click()
        expect(page.get_by_label("Token")).to_be_visible()
        assert page.evaluate("sessionStorage.length") == 0
        page.close()


def test_a_tenants_token_is_told_where_it_is_of_use(browser: Any, tmp_path: Path) -> None:
    book = TokenBook(tmp_path / "tokens.json")
    _, text = book.create("acme's own", Role.ADMIN, tenant="acme")
    settings = [f"tenants.book={tmp_path / 'tenants.json'}", f"api.tokens={tmp_path / 'tokens.json'}"]
    with RunningNode(tmp_path, settings[0]), RunningApi(tmp_path, *settings) as api:
        page = browser.new_page()
        page.goto(api.url)
        page.get_by_label("Token").fill(text)
        page.keyboard.press("Enter")
        expect(page.get_by_role("alert")).to_contain_text("This token is of tenant acme")
        assert page.evaluate("sessionStorage.length") == 0
        page.close()


def test_a_node_that_dies_is_told_of(own_page: Any, own_site: Site) -> None:
    expect(own_page.get_by_text("Live", exact=True)).to_be_visible()
    own_site.client.close()
    own_site.node.stop()
    expect(own_page.get_by_role("alert")).to_contain_text("The node does not answer")
    expect(own_page.get_by_text("Node is down")).to_be_visible()
    expect(tile(own_page, "stored")).to_contain_text("5 in all")  # as it was last
    with RunningNode(own_site.folder):
        expect(own_page.get_by_text("Live", exact=True)).to_be_visible()
        expect(own_page.get_by_role("alert")).to_be_empty()
        expect(tile(own_page, "stored")).to_contain_text("0 in all")
    own_site.api.stop()
    expect(own_page.get_by_role("alert")).to_contain_text("Trying again")
    expect(own_page.get_by_text("No connection")).to_be_visible()


def test_a_service_without_a_node_has_a_page_too(browser: Any, tmp_path: Path) -> None:
    with RunningApi(tmp_path, node=False) as api:
        page = browser.new_page()
        wrong: list[str] = []
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.goto(api.url)
        expect(page.get_by_text("Live", exact=True)).to_be_visible()
        expect(panel(page, "jobs")).to_be_visible()
        expect(panel(page, "tiers")).to_have_count(0)
        expect(page.get_by_role("alert")).to_be_empty()
        assert wrong == []
        page.close()


def test_the_tree_of_a_prompt_leads_to_those_that_begin_alike(own_page: Any, own_site: Site) -> None:
    other = [*TOKENS[:48], *range(900, 932)]
    keys = own_site.save(other)
    own_site.ask(other, "cmpl-other")
    with PatientClient(own_site.node.socket, name="vllm rank 1") as again:
        Site(own_site.folder, own_site.node, own_site.api, again).ask(other, "cmpl-other-again")
    expect(panel(own_page, "hot").get_by_role("row").nth(2)).to_be_visible()
    dialog = explain(own_page, "Token ids", ", ".join(map(str, TOKENS)))
    tree = dialog.get_by_role("region", name="Prompts that begin alike")
    trunk = tree.get_by_role("listitem").first
    expect(trunk).to_contain_text("blocks 0 – 2")
    expect(tree.get_by_text("this prompt")).to_have_count(1)
    tree.get_by_role("button", name=f"Open prompt {keys[-1].hex()[:8]}").click()
    expect(own_page.get_by_role("dialog", name=f"Prompt {keys[-1].hex()[:8]}")).to_contain_text("5 of 5 blocks")


def test_a_prompt_is_shown_by_region(browser: Any, tmp_path: Path) -> None:
    """Two regions, each with a node and a bucket. The other one has published the first three blocks."""
    key = Ed25519PrivateKey.generate()
    for name in ("na", "eu"):
        (tmp_path / name / "bucket").mkdir(parents=True)
    bucket = {name: f"file://{tmp_path / name / 'bucket'}" for name in ("na", "eu")}
    file = tmp_path / "regions.toml"
    file.write_text(
        f'[regions.na]\nurl = "{bucket["na"]}"\npublic_key = "{public_text(key.public_key())}"\n'
        f'[regions.eu]\nurl = "{bucket["eu"]}"\n[[flows]]\nfrom = "na"\nto = ["eu"]\n'
    )
    region = [f"object.url={bucket['eu']}", f"region.topology={file}", "region.name=eu"]
    with RunningNode(tmp_path / "na", f"object.url={bucket['na']}", "policy.admission=off") as far:
        with PatientClient(far.socket) as client:
            Site(tmp_path, far, None, client).save(TOKENS[: 16 * 3])  # type: ignore[arg-type]
            assert client.call("drain", 60.0, timeout=50.0)["drained"]
        with ThreadPoolExecutor(1) as thread:  # this one has the browser's event loop
            thread.submit(asyncio.run, told(load_topology(file), key)).result()
    with RunningNode(tmp_path / "eu", region[0]) as node, RunningApi(tmp_path / "eu", *region) as api:
        with PatientClient(node.socket) as client:
            site = Site(tmp_path, node, api, client)
            site.save(TOKENS)
            site.ask(TOKENS, "cmpl-here")
            with opened(browser, site) as page:
                expect(panel(page, "regions")).to_contain_text("na → eu")
                page.keyboard.press("e")
                page.get_by_role("dialog").get_by_role("textbox").first.fill("cmpl-here")
                page.keyboard.press("Enter")
                dialog = page.get_by_role("dialog")
                expect(dialog).to_contain_text("5 of 5 blocks")
                expect(dialog).to_contain_text("na has published 3 of 5 blocks")


async def told(topology: Topology, key: Ed25519PrivateKey) -> None:
    """What the two services do: na publishes, eu hears of it."""
    async with Links.open(topology.links("na")) as bucket:
        await publish(Contents(bucket), "na", key)
    async with Replicator.open(topology, "eu") as replicator:
        await replicator.cycle()


def test_where_prompts_part_is_shown(own_page: Any, own_site: Site) -> None:
    expect(panel(own_page, "breakers")).to_contain_text("content_fingerprints")
    source = random.Random(1)
    same = [source.randrange(1000) for _ in range(3000)]
    for name in ("cmpl-one", "cmpl-two"):
        prompt = [*same[:64], *[source.randrange(1000) for _ in range(20)], *same[64:]]
        own_site.ask(prompt, name)
        cut = pieces(prompt, b"")
        described = Description(len(prompt), cut.starts.tobytes(), cut.hashes.tobytes(), (), ())
        own_site.client.describe(About(name), described, 30.0)
    node = own_site.api.site.node
    assert node is not None
    node.breakers.forget()
    own_page.reload()
    row = panel(own_page, "breakers").get_by_role("row").nth(1)
    expect(row).to_contain_text("cmpl-two")
    row.get_by_role("button", name="cmpl-two").click()
    expect(own_page.get_by_role("dialog", name="Request cmpl-two")).to_contain_text("org/toy")
