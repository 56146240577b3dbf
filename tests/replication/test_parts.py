"""Small parts: hotness snapshots, the shaped link, links and their health."""

from __future__ import annotations

import asyncio
import random
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.envelope import Header
from kvstore.errors import ProtocolError, TierRefused, TierUnavailable
from kvstore.identity import BlockKey
from kvstore.index import BlockIndex
from kvstore.policy.hotness import Hotness
from kvstore.policy.reuse import Traffic
from kvstore.testing.blocks import SealedBlock, random_chain, random_key, seal
from kvstore.testing.shaping import Shape, shaped
from kvstore.tiers.object import ObjectSettings
from kvstore.tiers.object.hotness import MAX_BLOCKS, HotnessSnapshot, merged
from replication.hotset import hot_block, raise_ancestors
from replication.links import Links

KEY = BlockKey(b"k" * 16)

keys = st.binary(min_size=16, max_size=16).map(BlockKey)


class TestHotnessSnapshot:
    @given(st.floats(0, 1e10), st.floats(1e-3, 1e6), st.dictionaries(keys, st.floats(0, 2**99, width=32), max_size=20))
    def test_what_is_packed_is_unpacked(self, taken: float, half_life: float, scores: dict[BlockKey, float]) -> None:
        snapshot = HotnessSnapshot(taken, half_life, scores)
        assert HotnessSnapshot.unpack(snapshot.pack()) == snapshot

    @given(st.binary(max_size=200))
    def test_arbitrary_bytes_are_refused(self, raw: bytes) -> None:
        with pytest.raises(ProtocolError):
            HotnessSnapshot.unpack(raw)

    def test_the_hottest_are_kept_when_there_are_too_many(self) -> None:
        scores = {BlockKey(i.to_bytes(16, "big")): float(i) for i in range(MAX_BLOCKS + 10)}
        kept = HotnessSnapshot.unpack(HotnessSnapshot(1.0, 1.0, scores).pack()).scores
        assert len(kept) == MAX_BLOCKS
        assert min(kept.values()) == 10.0

    def test_snapshots_of_different_age_are_brought_to_one_moment(self) -> None:
        old, new = HotnessSnapshot(0.0, 100.0, {KEY: 8.0}), HotnessSnapshot(200.0, 100.0, {KEY: 1.0})
        assert merged([old, new], 200.0) == {KEY: 3.0}

    def test_a_nodes_counts_become_scores_per_block(self) -> None:
        chain = [BlockKey(bytes([i]) * 16) for i in range(4)]
        hotness = Hotness(half_life=3600.0)
        for _ in range(3):
            hotness.observe(chain, 1000.0, block_tokens=64, block_bytes=4096)
        snapshot = HotnessSnapshot.of(hotness, 1000.0, lambda tokens: tokens / 100)
        assert snapshot.scores.keys() == {chain[-1]}
        assert snapshot.scores[chain[-1]] == pytest.approx(3 * 256 / 100 / 4, rel=0.4)

    def test_a_conversation_that_goes_on_is_expected_back_before_any_hit(self) -> None:
        """Conversations are continued after a minute, one-off prompts never: that is learnt, and no count shows it."""
        traffic, index, source = Traffic(1 << 14), BlockIndex(), random.Random(1)
        going_on: dict[int, list[SealedBlock]] = {}
        once: list[SealedBlock] = []
        for minute in range(40):
            now = 60.0 * minute
            for number, conversation in list(going_on.items()):
                conversation += self.tail(source, conversation, 2)
                traffic.observe([block.key for block in conversation], now)
                if len(conversation) > 12:
                    del going_on[number]
            going_on[minute] = random_chain(source, 4, 100)
            once = random_chain(source, 60, 100)
            for blocks in (going_on[minute], once):
                traffic.observe([block.key for block in blocks], now)
        newest = going_on[39]
        for block in (*newest, *once):
            index.add(block.header, 0, 60.0 * 39)
        snapshot = HotnessSnapshot.learnt(traffic, index, 60.0 * 40, lambda tokens: tokens / 100)
        scores = dict(snapshot.scores)
        raise_ancestors([hot_block(block.header) for block in (*newest, *once)], scores)
        coldest = min(scores[block.key] for block in newest)
        assert coldest > max(scores[block.key] for block in once)

    def tail(self, source: random.Random, chain: list[SealedBlock], blocks: int) -> list[SealedBlock]:
        added: list[SealedBlock] = []
        for _ in range(blocks):
            last = (chain + added)[-1]
            added.append(seal(random_key(source), b"x" * 100, parent=last.key, index=last.header.index + 1))
        return added

    @given(st.integers(0, 2**32 - 1))
    @settings(max_examples=20)
    def test_a_report_says_the_same_of_all_blocks_by_naming_few(self, seed: int) -> None:
        source, traffic, index = random.Random(seed), Traffic(1 << 10), BlockIndex()
        chains = [random_chain(source, 6, 100)]
        for _ in range(8):  # each leaves an earlier one somewhere
            stem = source.choice(chains)[: source.randint(1, 6)]
            chains.append([*stem, *self.tail(source, stem, source.randint(1, 6))])
        blocks = {block.key: hot_block(block.header) for chain in chains for block in chain}
        for header in {block.key: block.header for chain in chains for block in chain}.values():
            index.add(header, 0, 0.0)
        now = 0.0
        for _ in range(20):
            now += source.expovariate(1 / 30)
            chain = [block.key for block in source.choice(chains)]
            traffic.observe(chain, now)
            index.touch(chain, now)
        report = HotnessSnapshot.learnt(traffic, index, now, lambda tokens: tokens / 100)
        rows = index.rows(blocks)
        rates = traffic.values(index.key_bytes(rows), index.hits[rows], now - index.accessed[rows])
        seconds = rates * 3600.0 * index.tokens[rows] / 100
        told, everything = dict(report.scores), dict(zip(blocks, seconds.tolist(), strict=True))
        for scores in (told, everything):
            raise_ancestors(list(blocks.values()), scores)
        assert told == pytest.approx(everything)
        assert len(report.scores) < len(blocks)
        uses = dict(report.used)
        for block in reversed(blocks.values()):
            if block.key in uses:
                uses[block.parent] = max(uses[block.key], uses.get(block.parent, 0.0))
        accessed = dict(zip(blocks, index.accessed[rows].tolist(), strict=True))
        assert {key: uses[key] for key in blocks if key in uses} == {key: at for key, at in accessed.items() if at}

    def test_what_was_counted_is_told_of_blocks_that_are_not_ranked(self) -> None:
        chain, other = random_chain(random.Random(3), 3, 100), BlockKey(b"o" * 16)
        traffic, index = Traffic(64), BlockIndex()
        traffic.observe([block.key for block in chain], 1.0)
        for block in chain:
            index.add(block.header, 0, 1.0)
        counted = HotnessSnapshot(2.0, 3600.0, {chain[1].key: 1e9, other: 5.0}, {other: 1.0})
        report = HotnessSnapshot.learnt(traffic, index, 2.0, float, counted)
        assert report.scores[other] == 5.0
        assert max(score for key, score in report.scores.items() if key != other) < 1e9

    def test_blocks_of_which_only_the_size_is_known_are_not_ranked(self) -> None:
        index = BlockIndex()
        index.add(Header(key=KEY, namespace=b"n" * 16, index=0, tokens=0, length=100, crc=0), 0, 1.0)
        assert HotnessSnapshot.learnt(Traffic(64), index, 2.0, float).scores == {}


@pytest.fixture
def echo() -> Iterator[str]:
    """A server that sends back what it gets."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=answer, args=(client,), daemon=True).start()

    def answer(client: socket.socket) -> None:
        with client, suppress(OSError):
            while data := client.recv(1 << 16):
                client.sendall(data)

    threading.Thread(target=serve, daemon=True).start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    listener.close()


class TestShapedLink:
    def exchange(self, port: int, data: bytes, timeout: float = 20.0) -> tuple[bytes, float]:
        started = time.monotonic()
        with socket.create_connection(("127.0.0.1", port), timeout) as client:
            sender = threading.Thread(target=client.sendall, args=(data,))
            sender.start()
            back = b""
            while len(back) < len(data) and (piece := client.recv(1 << 16)):
                back += piece
            sender.join()
        return back, time.monotonic() - started

    def test_bytes_come_through_whole_and_late(self, echo: str) -> None:
        data = bytes(range(256)) * 2000
        with shaped(echo, Shape(delay=0.1)) as link:
            back, seconds = self.exchange(link.port, data)
            assert back == data
            assert seconds >= 0.2
            assert link.bytes_up == link.bytes_down == len(data)

    def test_bandwidth_is_a_limit_for_all_connections_together(self, echo: str) -> None:
        with shaped(echo, Shape(bytes_per_second=1e6)) as link:
            started = time.monotonic()
            threads = [threading.Thread(target=self.exchange, args=(link.port, bytes(250_000))) for _ in range(2)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert time.monotonic() - started >= 0.5

    def test_loss_delays(self, echo: str) -> None:
        with shaped(echo, Shape(loss=1.0)) as link:
            back, seconds = self.exchange(link.port, b"x")
            assert back == b"x"
            assert seconds >= 0.4

    def test_a_cut_link_is_silent_and_heals(self, echo: str) -> None:
        with shaped(echo) as link:
            link.cut()
            with pytest.raises(TimeoutError):
                self.exchange(link.port, b"x", timeout=0.3)
            link.heal()
            assert self.exchange(link.port, b"y")[0] == b"y"

    def test_a_reset_breaks_connections(self, echo: str) -> None:
        with shaped(echo) as link, socket.create_connection(("127.0.0.1", link.port), 20) as client:
            client.sendall(b"x")
            assert client.recv(1) == b"x"
            link.reset()
            try:
                assert client.recv(1) == b""
            except ConnectionResetError:
                pass


class TestLinks:
    def settings(self, folder: Path) -> ObjectSettings:
        return ObjectSettings(url=f"file://{folder}")

    async def test_the_first_link_that_answers_is_used_and_a_dead_one_waits_for_its_time(self, tmp_path: Path) -> None:
        asked: list[str] = []
        async with Links.open([self.settings(tmp_path / "a"), self.settings(tmp_path / "b")], patience=0.0) as links:
            first = links.links[0].objects

            async def request(objects: object) -> str:
                asked.append("first" if objects is first else "second")
                if objects is first:
                    raise TierUnavailable("dead")
                return "answer"

            assert await links.ask(request) == "answer"
            assert await links.ask(request) == "answer"
            assert asked == ["first", "second", "second"]

    async def test_a_refusal_is_not_waited_out(self, tmp_path: Path) -> None:
        asked = 0
        async with Links.open([self.settings(tmp_path)], patience=1e9) as links:

            async def refuses(_: object) -> None:
                nonlocal asked
                asked += 1
                raise TierRefused("QuotaExceeded")

            for _ in range(2):
                with pytest.raises(TierRefused, match="QuotaExceeded"):
                    await links.ask(refuses)
            assert asked == 2, "the link itself works"

    async def test_of_many_requests_one_tries_a_dead_link_again(self, tmp_path: Path) -> None:
        tried = 0
        async with Links.open([self.settings(tmp_path)], patience=0.0) as links:

            async def fails(_: object) -> None:
                raise TierUnavailable("dead")

            async def slow(_: object) -> None:
                nonlocal tried
                tried += 1
                await asyncio.sleep(0.05)

            with pytest.raises(TierUnavailable, match="dead"):
                await links.ask(fails)
            links.links[0]._retry_at = 0.0
            results = await asyncio.gather(*(links.ask(slow) for _ in range(5)), return_exceptions=True)
            assert tried == 1
            assert sum(isinstance(result, TierUnavailable) for result in results) == 4
            await asyncio.gather(*(links.ask(slow) for _ in range(5)))
            assert tried == 6
