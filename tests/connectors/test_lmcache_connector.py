"""LMCache's backends over a real node: LMCache's interfaces, and the faults that its own backends do not survive."""

from __future__ import annotations

import select
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from connectors.lmcache.chunks import MAX_SIZES, Chunks
from connectors.lmcache.connector import Completion, KVStoreConnector
from connectors.lmcache.names import Names
from connectors.lmcache.options import Options
from kvstore.errors import ConfigError
from kvstore.testing.node import RunningNode

SIZE = 64 << 10


@pytest.fixture
def node(tmp_path: Path) -> Iterator[RunningNode]:
    with RunningNode(tmp_path, "host.bytes=16MiB") as running:
        yield running


@pytest.fixture
def chunks(node: RunningNode) -> Iterator[Chunks]:
    chunks = open_chunks(node)
    yield chunks
    chunks.close()


def open_chunks(node: RunningNode, **options: object) -> Chunks:
    return Chunks(Options.parse({"socket": str(node.socket), "autostart": False, **options}))


def names(count: int, model: str = "org/model", salt: str = "") -> list[str]:
    return [f"{model}@01000100@0@{number:064x}{'@' + salt if salt else ''}" for number in range(count)]


def payloads(count: int, size: int = SIZE) -> list[np.ndarray]:
    rng = np.random.default_rng(count)
    return [rng.integers(0, 256, size, dtype=np.uint8) for _ in range(count)]


def empty(count: int, size: int = SIZE) -> list[np.ndarray]:
    return [np.zeros(size, np.uint8) for _ in range(count)]


def test_what_is_saved_is_found_and_loaded(chunks: Chunks) -> None:
    keys, stored = names(5), payloads(5)
    assert chunks.contains(keys) == [False] * 5
    assert all(chunks.save(keys, stored))
    assert chunks.contains([*keys, *names(1, salt="other")]) == [True] * 5 + [False]
    buffers = empty(5)
    assert chunks.load(keys, buffers) == [True] * 5
    assert all(map(np.array_equal, stored, buffers))


def test_chunks_behind_a_missing_one_are_delivered(chunks: Chunks) -> None:
    keys, stored = names(6), payloads(6)
    chunks.save(keys[::2], stored[::2])
    assert chunks.contains(keys) == [True, False] * 3
    buffers = empty(6)
    assert chunks.load(keys, buffers) == [True, False] * 3
    assert all(map(np.array_equal, stored[::2], buffers[::2]))
    assert not any(buffer.any() for buffer in buffers[1::2])


def test_a_fresh_process_finds_what_others_stored(node: RunningNode, chunks: Chunks) -> None:
    chunks.save(names(3), payloads(3))
    other = open_chunks(node)
    assert other.contains(names(4)) == [True, True, True, False]
    other.close()


@pytest.mark.parametrize("size", [SIZE // 2, SIZE * 2])
def test_a_reader_of_another_size_misses_and_its_buffer_is_left_alone(chunks: Chunks, size: int) -> None:
    chunks.save(names(2), payloads(2))
    buffers = empty(2, size)
    assert chunks.load(names(2), buffers) == [False, False]
    assert not any(buffer.any() for buffer in buffers)


@pytest.mark.parametrize("option", ["weights", "dtype"])
def test_what_lmcaches_keys_do_not_say_keeps_chunks_apart(node: RunningNode, chunks: Chunks, option: str) -> None:
    chunks.save(names(2), payloads(2))
    other = open_chunks(node, **{option: "another"})
    assert other.contains(names(2)) == [False, False]
    assert other.load(names(2), empty(2)) == [False, False]
    other.close()


def test_sizes_that_vary_are_refused_and_counted(chunks: Chunks) -> None:
    for number in range(MAX_SIZES):
        assert chunks.save(names(1), payloads(1, SIZE + 4096 * number)) == [True]
    assert chunks.save(names(1), payloads(1, SIZE // 2)) == [False]
    assert chunks.misses["too_many_sizes"] == 1


def test_two_processes_that_store_the_same_chunks_both_succeed(node: RunningNode) -> None:
    both = [open_chunks(node) for _ in range(2)]
    keys, stored = names(16), payloads(16)
    answers: list[list[bool]] = []
    threads = [threading.Thread(target=lambda c=c: answers.append(c.save(keys, stored))) for c in both]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [[True] * 16] * 2
    buffers = empty(16)
    assert all(both[0].load(keys, buffers))
    assert all(map(np.array_equal, stored, buffers))
    for chunks in both:
        chunks.close()


def test_a_deleted_chunk_that_is_leased_stays_until_the_last_lease(chunks: Chunks) -> None:
    keys, stored = names(2), payloads(2)
    chunks.save(keys, stored)
    assert chunks.lease(keys[:1]) == chunks.lease(keys[:1]) == [True]
    assert chunks.delete(keys) == [True, True]
    assert chunks.contains(keys) == [True, False]
    chunks.unlease(keys[:1])
    buffers = empty(1)
    assert chunks.load(keys[:1], buffers) == [True]
    assert np.array_equal(buffers[0], stored[0])
    chunks.unlease(keys[:1])
    assert chunks.contains(keys) == [False, False]


def test_leases_leave_most_of_host_memory_to_others(node: RunningNode, chunks: Chunks) -> None:
    count = node.config.host.bytes // SIZE // 2
    assert all(chunks.save(names(count), payloads(count)))
    first, second = chunks.lease(names(count)), chunks.lease(names(count))
    assert 0 < sum(first) * SIZE <= node.config.host.bytes // 4
    assert not any(second)
    chunks.unlease(names(count))
    assert chunks.lease(names(1)) == [True]


def test_without_a_node_everything_is_a_miss_and_with_one_again_it_works(tmp_path: Path) -> None:
    with RunningNode(tmp_path) as node:
        chunks = open_chunks(node)
        assert chunks.save(names(2), payloads(2)) == [True, True]
        assert chunks.is_healthy()
    assert chunks.contains(names(2)) == chunks.save(names(2), payloads(2)) == [False, False]
    assert chunks.load(names(2), empty(2)) == [False, False]
    assert chunks.misses["unavailable"] >= 6
    assert not chunks.is_healthy()
    with RunningNode(tmp_path):
        wait_until(chunks.is_healthy)
        buffers = empty(2)
        assert chunks.load(names(2), buffers) == [True, True]  # from the disk
        assert all(map(np.array_equal, payloads(2), buffers))
        chunks.close()


def test_a_flipped_bit_is_a_miss_and_storing_again_heals(tmp_path: Path) -> None:
    with RunningNode(tmp_path) as node:
        chunks = open_chunks(node)
        chunks.save(names(1), payloads(1))
        chunks.close()
    pattern = payloads(1)[0].tobytes()[:512]
    for segment in (tmp_path / "disk").rglob("*"):
        if segment.is_file() and (place := segment.read_bytes().find(pattern)) >= 0:
            with open(segment, "r+b") as file:
                file.seek(place + 100)
                file.write(bytes([pattern[100] ^ 1]))
            break
    else:
        pytest.fail("the chunk is not on the disk")
    with RunningNode(tmp_path) as node:
        chunks = open_chunks(node)
        assert chunks.load(names(1), buffers := empty(1)) == [False]
        assert not buffers[0].any()
        assert chunks.misses["corrupt"] == 1
        assert chunks.contains(names(1)) == [False]
        assert chunks.save(names(1), payloads(1)) == chunks.load(names(1), empty(1)) == [True]
        chunks.close()


def test_the_connector_answers_every_future_over_its_descriptor(node: RunningNode) -> None:
    connector = KVStoreConnector(socket=str(node.socket), autostart=False)
    keys, stored, buffers = names(3), payloads(3), empty(3)
    saved = connector.submit_batch_set(keys, [memoryview(buffer) for buffer in stored])
    assert completions(connector, 1) == {saved: (saved, True, "", [True] * 3)}
    found = connector.submit_batch_exists(keys)
    loaded = connector.submit_batch_get(keys, [memoryview(buffer) for buffer in buffers])
    bad = connector.submit_batch_exists(["not a key"])
    done = completions(connector, 3)
    assert done[found][3] == done[loaded][3] == [True] * 3
    assert all(map(np.array_equal, stored, buffers))
    assert not done[bad][1]
    assert "not a key" in done[bad][2]
    connector.submit_batch_delete(keys)
    completions(connector, 1)
    absent = connector.submit_batch_exists(keys)
    assert completions(connector, 1)[absent][3] == [False] * 3
    connector.close()


def test_a_store_that_lacks_one_chunk_is_said_to_have_failed(node: RunningNode) -> None:
    connector = KVStoreConnector(socket=str(node.socket), autostart=False)
    count = 2 * node.config.host.bytes // SIZE
    future = connector.submit_batch_set(names(count), [memoryview(buffer) for buffer in empty(count)])
    _, well, problem, answers = completions(connector, 1)[future]
    assert not well
    assert problem
    assert not all(answers or ())
    connector.close()


@pytest.mark.parametrize(
    ("params", "named"),
    [
        ({"sokket": "x"}, "sokket"),
        ({"workers": "4"}, "workers"),
        ({"workers": 0}, "workers"),
        ({"chunk_tokens": -1}, "chunk"),
    ],
)
def test_bad_settings_are_named(params: dict[str, object], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        KVStoreConnector(**params)


@dataclass
class Item:
    """What the adapter needs of LMCache's MemoryObj."""

    byte_array: memoryview


def test_the_adapter_locks_lists_and_reports(node: RunningNode, tmp_path: Path) -> None:
    api = pytest.importorskip("lmcache.v1.distributed.api")
    from connectors.lmcache import KVStoreAdapter

    adapter = KVStoreAdapter({"socket": str(node.socket), "autostart": False, "names": str(tmp_path / "names.db")})
    adapter.set_backend_identity("plugin")
    keys = [api.ObjectKey(bytes([number]) * 32, "org/model", 0x01000100) for number in range(5)]
    stored, buffers = payloads(5), empty(5)
    descriptors = {
        adapter.get_store_event_fd(), adapter.get_lookup_and_lock_event_fd(), adapter.get_load_event_fd()
    }  # fmt: skip
    assert len(descriptors) == 3

    task = adapter.submit_store_task(keys[:4], [Item(memoryview(buffer)) for buffer in stored[:4]])
    wait_readable(adapter.get_store_event_fd())
    assert adapter.pop_completed_store_tasks() == {task: 4 * SIZE}

    task = adapter.submit_lookup_and_lock_task(keys, {})
    wait_readable(adapter.get_lookup_and_lock_event_fd())
    found = adapter.query_lookup_and_lock_result(task)
    assert [found.test(place) for place in range(5)] == [True] * 4 + [False]
    assert adapter.query_lookup_and_lock_result(task) is None

    adapter.delete(keys[:1])  # locked: it must still load
    task = adapter.submit_load_task(keys, [Item(memoryview(buffer)) for buffer in buffers])
    wait_readable(adapter.get_load_event_fd())
    loaded = adapter.query_load_result(task)
    assert [loaded.test(place) for place in range(5)] == [True] * 4 + [False]
    assert all(map(np.array_equal, stored[:4], buffers[:4]))
    adapter.submit_unlock(keys)
    wait_until(lambda: len(adapter.list_l2_keys().entries) == 3)

    page = adapter.list_l2_keys("org/model", page_size=2)
    rest = adapter.list_l2_keys("org/model", page_size=2, cursor=page.next_page_token)
    assert [entry.key.to_object_key() for entry in (*page.entries, *rest.entries)] == keys[1:4]
    assert rest.next_page_token is None
    assert adapter.list_l2_keys("other").entries == ()
    assert adapter.report_status()["is_healthy"]
    adapter.close()


def test_both_backends_read_each_others_chunks(node: RunningNode, tmp_path: Path) -> None:
    """``native_plugin`` is given names that LMCache makes of its keys; the adapter makes them itself."""
    native = pytest.importorskip("lmcache.v1.distributed.l2_adapters.native_connector_l2_adapter")
    from lmcache.v1.distributed.api import ObjectKey

    from connectors.lmcache import KVStoreAdapter

    keys = [
        ObjectKey(bytes([number]) * 32, "org/model", 0x02010201, group, salt)
        for number, (group, salt) in enumerate([(0, ""), (1, ""), (10, "tenant a"), (0, "salt")])
    ]
    stored, buffers = payloads(4), empty(4)
    adapter = KVStoreAdapter({"socket": str(node.socket), "autostart": False, "names": str(tmp_path / "names.db")})
    task = adapter.submit_store_task(keys, [Item(memoryview(buffer)) for buffer in stored])
    wait_until(lambda: task in adapter.pop_completed_store_tasks())
    connector = KVStoreConnector(socket=str(node.socket), autostart=False)
    named = [native._object_key_to_string(key) for key in keys]
    future = connector.submit_batch_get(named, [memoryview(buffer) for buffer in buffers])
    assert completions(connector, 1)[future][3] == [True] * 4
    assert all(map(np.array_equal, stored, buffers))
    connector.close()
    adapter.close()


def test_a_new_server_finds_what_another_machine_stored_meanwhile(tmp_path: Path) -> None:
    """Its node learnt the bucket's namespaces before there were any; LMCache says which size it looks for."""
    api = pytest.importorskip("lmcache.v1.distributed.api")
    import torch

    from connectors.lmcache import KVStoreAdapter

    keys = [api.ObjectKey(bytes([number]) * 32, "org/model", 0x01000100) for number in range(3)]
    layouts = {0: api.MemoryLayoutDesc([torch.Size([2, SIZE // 8]), torch.Size([SIZE // 4])], [torch.bfloat16] * 2)}

    def adapter(node: RunningNode) -> KVStoreAdapter:
        names = str(tmp_path / f"{node.socket.parent.name}.db")
        return KVStoreAdapter({"socket": str(node.socket), "autostart": False, "names": names})

    bucket = f"object.url=file://{tmp_path}/bucket"
    with RunningNode(tmp_path / "a", bucket) as here, RunningNode(tmp_path / "b", bucket) as there:
        first, second = adapter(here), adapter(there)
        task = first.submit_store_task(keys, [Item(memoryview(buffer)) for buffer in payloads(3)])
        wait_until(lambda: task in first.pop_completed_store_tasks())

        def found() -> bool:
            task = second.submit_lookup_and_lock_task(keys, layouts)
            answers: list[object] = []

            def answered() -> bool:
                answers.append(second.query_lookup_and_lock_result(task))
                return answers[-1] is not None

            wait_until(answered)
            return all(answers[-1].test(place) for place in range(3))  # type: ignore[attr-defined]

        wait_until(found)
        for each in (first, second):
            each.close()


def test_a_listing_shows_what_the_node_holds_whoever_stored_it_and_whenever(tmp_path: Path) -> None:
    api = pytest.importorskip("lmcache.v1.distributed.api")
    from connectors.lmcache import KVStoreAdapter

    def adapter(node: RunningNode, **params: str) -> KVStoreAdapter:
        names = str(tmp_path / "names.db")
        return KVStoreAdapter({"socket": str(node.socket), "autostart": False, "names": names, **params})

    def store(into: KVStoreAdapter, keys: list[object]) -> None:
        task = into.submit_store_task(keys, [Item(memoryview(buffer)) for buffer in payloads(len(keys))])
        wait_until(lambda: task in into.pop_completed_store_tasks())

    def listed(by: KVStoreAdapter, model: str | None = None) -> list[object]:
        found, cursor = [], None
        while True:
            page = by.list_l2_keys(model, page_size=2, cursor=cursor)
            found += [entry.key.to_object_key() for entry in page.entries]
            assert {entry.size_bytes for entry in page.entries} <= {SIZE}
            if (cursor := page.next_page_token) is None:
                return found

    keys = [api.ObjectKey(bytes([number]) * 32, "org/model", 0x02010201, 1, "salt") for number in range(5)]
    other = [api.ObjectKey(bytes([number]) * 32, "org/model2", 0x01000100) for number in range(2)]
    with RunningNode(tmp_path) as node:
        first = adapter(node)
        store(first, keys)
        store(first, other)
        second = adapter(node)
        assert listed(second) == [*other, *keys], "by name"
        assert listed(second, "org/model") == keys
        assert listed(second, "org/model2") == other
        assert listed(second, "org") == []
        second.delete(keys[:1])
        assert listed(first, "org/model") == keys[1:]
        apart = adapter(node, dtype="float8")
        assert listed(apart) == []
        for each in (first, second, apart):
            each.close()
    with RunningNode(tmp_path) as node:
        later = adapter(node)
        assert listed(later) == [*other, *keys[1:]], "from the disk, by another process"
        later.close()


def test_names_are_bounded_and_outlive_their_process(tmp_path: Path) -> None:
    names = Names(tmp_path / "names.db", "space", most=3)
    names.add((f"model@{number}", 10 + number) for number in range(4))
    names.add([("model@3", 13)])
    names.close()
    again = Names(tmp_path / "names.db", "space")
    assert again.between("", "n", 10) == [("model@1", 11), ("model@2", 12), ("model@3", 13)]
    assert again.between("model@1", "model@3", 10) == [("model@2", 12)]
    assert again.remove(["model@2", "model@9"]) == {"model@2": 12}
    assert again.between("", "n", 1) == [("model@1", 11)]
    again.close()


def test_without_a_place_for_names_a_process_names_what_it_moved(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    names = Names(tmp_path / "file" / "names.db", "space")
    names.add([("model@1", 1)])
    assert names.between("", "n", 10) == [("model@1", 1)]
    names.close()


def completions(connector: KVStoreConnector, count: int) -> dict[int, Completion]:
    done: dict[int, Completion] = {}
    while len(done) < count:
        wait_readable(connector.event_fd())
        done.update((completion[0], completion) for completion in connector.drain_completions())
    return done


def wait_readable(descriptor: int) -> None:
    assert select.select([descriptor], [], [], 30)[0]


def wait_until(condition: object) -> None:
    from kvstore.testing.node import wait_for

    wait_for(condition)  # type: ignore[arg-type]
