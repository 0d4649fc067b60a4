"""The directory store: what is stored comes back, also to others and later; the size limit; dead writers' files."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.store.shards import blank, payload, payloads, shard, shards
from vcache.errors import UnavailableError
from vcache.store.base import Got, Put
from vcache.store.files import FileStore
from vcache.store.files_eviction import FILES_COUNTERS
from vcache.store.objects import PAGE_BYTES


def files_of(store: FileStore) -> list[Path]:
    return sorted(path for path in store._root.rglob("*") if path.is_file() and path.name != "sweep.lock")


def load(store: FileStore, number: int, nbytes: int = 10_000) -> tuple[Got, torch.Tensor]:
    (buffer,) = blank(1, nbytes)
    (got,) = store.get_into([shard(number)], [buffer])
    return got, buffer


def test_what_was_stored_comes_back_whole(file_store):
    assert list(file_store.put_from(shards(5), payloads(5))) == [Put.STORED] * 5
    buffers = blank(7)
    assert list(file_store.get_into(shards(7), buffers)) == [Got.LOADED] * 5 + [Got.ABSENT] * 2
    for number in range(5):
        assert torch.equal(buffers[number], payload(number))


def test_storing_again_changes_nothing(file_store):
    file_store.put_from([shard(0)], [payload(0)])
    assert list(file_store.put_from([shard(0)], [payload(1)])) == [Put.EXISTS]
    assert torch.equal(load(file_store, 0)[1], payload(0))


def test_ranks_are_shards_of_their_own(file_store):
    file_store.put_from([shard(0, 0), shard(0, 1), shard(1, 0)], payloads(3))
    wanted = [shard(0, 0), shard(0, 1), shard(1, 0), shard(1, 1)]
    assert list(file_store.contains(wanted)) == [True, True, True, False]


def test_removed_is_gone(file_store):
    file_store.put_from(shards(2), payloads(2))
    assert file_store.remove(shards(3)) == 2
    assert list(file_store.contains(shards(3))) == [False] * 3
    assert files_of(file_store) == []


def test_another_process_or_a_later_one_finds_it(file_store, tmp_path):
    file_store.put_from(shards(3), payloads(3))
    other = FileStore(tmp_path / "store", size_limit=1 << 30)
    assert list(other.contains(shards(4))) == [True] * 3 + [False]
    assert torch.equal(load(other, 2)[1], payload(2))


def test_another_layout_is_invalid_and_removed(file_store):
    file_store.put_from(shards(1), payloads(1))
    assert list(file_store.get_into([shard(0)._replace(layout=1)], blank(1))) == [Got.INVALID]
    assert files_of(file_store) == []


def test_after_close_calls_are_refused(file_store):
    file_store.close()
    file_store.close()
    with pytest.raises(UnavailableError):
        file_store.contains(shards(1))


def test_a_missing_parent_is_not_made(tmp_path):
    store = FileStore(tmp_path / "not-mounted" / "store", size_limit=1 << 30)
    assert list(store.put_from(shards(1), payloads(1))) == [Put.FAILED]
    assert list(store.contains(shards(1))) == [False]
    assert list(tmp_path.iterdir()) == []


@given(steps=st.lists(st.tuples(st.sampled_from("prg"), st.integers(0, 5), st.integers(1, 5000)), max_size=30))
@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_it_behaves_like_a_dictionary(steps, tmp_path_factory):
    store = FileStore(tmp_path_factory.mktemp("dictionary") / "store", size_limit=1 << 30)
    model: dict[int, torch.Tensor] = {}
    for act, number, nbytes in steps:
        if act == "p":
            expected = Put.EXISTS if number in model else Put.STORED
            assert list(store.put_from([shard(number)], [payload(number, nbytes)])) == [expected]
            model.setdefault(number, payload(number, nbytes))
        elif act == "r":
            assert store.remove([shard(number)]) == (model.pop(number, None) is not None)
        else:
            got, buffer = load(store, number, model[number].nbytes if number in model else nbytes)
            assert got is (Got.LOADED if number in model else Got.ABSENT)
            assert number not in model or torch.equal(buffer, model[number])
        assert list(store.contains(shards(6))) == [index in model for index in range(6)]
    store.close()


# --- the size limit ----------------------------------------------------------------------------------------------------


def sweep(store: FileStore) -> dict[str, int]:
    store._sweeper.sweep()
    return dict(store.counters())


def age(store: FileStore, number: int, seconds: float) -> None:
    path = store._path(shard(number))
    used_at = os.stat(path).st_mtime - seconds
    os.utime(path, (used_at, used_at))


@pytest.fixture
def overfull(file_store: FileStore, tmp_path: Path) -> FileStore:
    """Twenty objects in a directory that this store allows half of."""
    file_store.put_from(shards(20), payloads(20))
    return FileStore(tmp_path / "store", size_limit=10 * (PAGE_BYTES + 10_000))


def bytes_in(store: FileStore) -> int:
    return sum(path.stat().st_size for path in files_of(store))


def test_the_least_recently_used_go_first(overfull):
    for number in range(20):
        age(overfull, number, seconds=1000 - number)
    load(overfull, 0)  # used: stays
    counters = sweep(overfull)
    there = list(overfull.contains(shards(20)))
    assert there == [True] + [False] * 11 + [True] * 8
    assert counters["store_evicted_objects"] == 11
    assert counters["store_evicted_bytes"] == 11 * (PAGE_BYTES + 10_000)
    assert set(counters) == set(FILES_COUNTERS)


def test_of_one_batch_the_end_of_the_chain_goes_first(overfull):
    sweep(overfull)
    assert list(overfull.contains(shards(20))) == [True] * 9 + [False] * 11


def test_writing_alone_keeps_the_directory_near_its_limit(tmp_path):
    limit = 20 << 20
    store = FileStore(tmp_path / "store", size_limit=limit)
    for number in range(60):
        store.put_from([shard(number)], [payload(number, 1 << 20)])
    patience = time.monotonic() + 60
    while not store.counters()["store_evicted_objects"]:
        assert time.monotonic() < patience, "nothing was swept"
        time.sleep(0.01)
    store.close(timeout_s=60)
    assert bytes_in(store) < 60 << 20


def test_two_sweep_at_once_without_harm(overfull):
    others = [FileStore(overfull._root.parent, size_limit=overfull._sweeper._size_limit) for _ in range(4)]
    threads = [threading.Thread(target=sweep, args=(store,)) for store in others]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert list(overfull.contains(shards(20))) == [True] * 9 + [False] * 11
