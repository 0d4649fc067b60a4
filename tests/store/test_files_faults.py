"""The directory store when disks and writers fail: a miss and a count, no exception through the guard, no wrong byte."""

from __future__ import annotations

import os
import subprocess
import threading

import pytest
import torch

from tests.store.shards import blank, payload, payloads, shard, shards
from tests.store.test_files import files_of, load, sweep
from vcache.store.base import Got, Put
from vcache.store.files import FileStore
from vcache.store.objects import PAGE_BYTES

ONE_WRITES_AND_DIES = """
import os, signal, sys
from pathlib import Path
from tests.store.shards import payload, shard
from vcache.store.files import FileStore

def die(*names):
    os.kill(os.getpid(), signal.{signal})

os.rename = die  # the real write has happened; the name never comes
FileStore(Path(sys.argv[1]), size_limit=1 << 30).put_from([shard(0)], [payload(0)])
"""


def test_a_full_disk_refuses_and_keeps_what_it_has(small_disk, guarded):
    store = FileStore(small_disk / "store", size_limit=1 << 30)
    guard = guarded(store, retries=1)
    results = list(guard.put_from(shards(8), payloads(8, 500_000)))
    stored = results.count(Put.STORED)
    assert 0 < stored < 8
    assert set(results) == {Put.STORED, Put.FULL}
    buffers = blank(8, 500_000)
    gots = guard.get_into(shards(8), buffers)
    for number in range(8):
        assert gots[number] is (Got.LOADED if results[number] is Put.STORED else Got.ABSENT)
        assert gots[number] is Got.ABSENT or torch.equal(buffers[number], payload(number, 500_000))
    assert len(files_of(store)) == stored, "a half-written file stayed"
    stats = guard.stats()
    assert stats["store_full"] == 8 - stored
    assert stats["store_retries"] == 1
    assert stats["store_circuit"] == "closed", "a full disk still serves reads"


def test_a_read_only_disk_serves_reads(small_disk, guarded):
    store = FileStore(small_disk / "store", size_limit=1 << 30)
    guard = guarded(store)
    guard.put_from(shards(2), payloads(2))
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    assert list(guard.put_from([shard(5)], [payload(5)])) == [Put.FAILED]
    buffers = blank(2)
    assert list(guard.get_into(shards(2), buffers)) == [Got.LOADED] * 2
    assert torch.equal(buffers[1], payload(1))
    assert guard.stats()["store_failed_writes"] == 1


def test_a_removal_that_a_read_only_disk_refuses_is_not_confirmed(small_disk, guarded):
    store = FileStore(small_disk / "store", size_limit=1 << 30)
    guard = guarded(store)
    guard.put_from(shards(2), payloads(2))
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    assert guard.remove(shards(2)) is None
    assert guard.remove([shard(1), shard(5)]) is None
    assert guard.remove([shard(5)]) == 0, "what is not there need not be removed"
    assert list(guard.get_into(shards(2), blank(2))) == [Got.LOADED] * 2
    assert guard.stats()["store_circuit"] == "closed", "reads go on"
    subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
    assert guard.remove([shard(0), shard(1), shard(5)]) == 2


@pytest.mark.parametrize("keep", [0, 1, PAGE_BYTES - 1, PAGE_BYTES, PAGE_BYTES + 1, PAGE_BYTES + 9_999])
def test_a_truncated_file_is_a_miss_and_goes(file_store, keep):
    file_store.put_from(shards(1), payloads(1))
    os.truncate(file_store._path(shard(0)), keep)
    assert load(file_store, 0)[0] is Got.INVALID
    assert load(file_store, 0)[0] is Got.ABSENT
    assert list(file_store.put_from(shards(1), payloads(1))) == [Put.STORED]
    assert torch.equal(load(file_store, 0)[1], payload(0))


@pytest.mark.parametrize("position", [0, 8, 20, 60, 75, PAGE_BYTES, PAGE_BYTES + 5_000, PAGE_BYTES + 9_999])
def test_a_flipped_bit_is_a_miss_and_goes(file_store, guarded, position):
    guard = guarded(file_store)
    guard.put_from(shards(1), payloads(1))
    with open(file_store._path(shard(0)), "r+b") as file:
        file.seek(position)
        (byte,) = file.read(1)
        file.seek(position)
        file.write(bytes([byte ^ 4]))
    buffers = blank(1)
    assert list(guard.get_into(shards(1), buffers)) == [Got.INVALID]
    assert not buffers[0].any(), "nothing of it reached the caller"
    assert guard.stats()["store_invalid"] == 1
    assert files_of(file_store) == []


def test_a_file_under_another_name_is_a_miss(file_store):
    file_store.put_from(shards(2), payloads(2))
    os.replace(file_store._path(shard(1)), file_store._path(shard(0)))
    assert load(file_store, 0)[0] is Got.INVALID


def test_a_directory_in_the_place_of_a_file_is_a_miss(file_store, guarded):
    os.makedirs(file_store._path(shard(0)))
    guard = guarded(file_store)
    assert list(guard.contains(shards(1))) == [False]
    assert list(guard.get_into(shards(1), blank(1))) != [Got.LOADED]
    assert list(guard.put_from(shards(1), payloads(1))) == [Put.FAILED]
    assert files_of(file_store) == []


def test_two_writers_of_a_key_leave_one_whole_object(tmp_path):
    stores = [FileStore(tmp_path / "store", size_limit=1 << 30) for _ in range(4)]
    barrier = threading.Barrier(4)
    results: list[Put] = []

    def write(store: FileStore) -> None:
        for number in range(20):
            barrier.wait()
            results.extend(store.put_from([shard(number)], [payload(number)]))

    threads = [threading.Thread(target=write, args=(store,)) for store in stores]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(results) <= {Put.STORED, Put.EXISTS}
    assert len(files_of(stores[0])) == 20
    for number in range(20):
        assert torch.equal(load(stores[0], number)[1], payload(number))


def test_a_writer_killed_before_the_rename_leaves_no_entry_and_its_file_is_cleaned(tmp_path, processes):
    child = processes.python("-c", ONE_WRITES_AND_DIES.format(signal="SIGKILL"), str(tmp_path / "store"))
    assert child.wait() == -9
    store = FileStore(tmp_path / "store", size_limit=1 << 30, stale_s=-1.0)  # at any age, also by a coarse clock
    assert [path.suffix for path in files_of(store)] == [".tmp"]
    assert load(store, 0)[0] is Got.ABSENT
    assert sweep(store)["store_stale_removed"] == 1
    assert files_of(store) == []
    assert list(store.put_from(shards(1), payloads(1))) == [Put.STORED]


def test_the_file_of_a_suspended_writer_is_left_alone(tmp_path, processes):
    child = processes.python("-c", ONE_WRITES_AND_DIES.format(signal="SIGSTOP"), str(tmp_path / "store"))
    os.waitid(os.P_PID, child.pid, os.WSTOPPED | os.WNOWAIT)
    store = FileStore(tmp_path / "store", size_limit=1 << 30, stale_s=-1.0)  # at any age, also by a coarse clock
    assert sweep(store)["store_stale_removed"] == 0
    child.kill()
    assert sweep(store)["store_stale_removed"] == 1


def test_a_directory_removed_beneath_the_store_is_a_miss_and_comes_back(file_store):
    file_store.put_from(shards(1), payloads(1))
    subprocess.run(["rm", "-r", str(file_store._root.parent)], check=True)
    assert load(file_store, 0)[0] is Got.ABSENT
    assert list(file_store.put_from(shards(1), payloads(1))) == [Put.STORED]
    assert torch.equal(load(file_store, 0)[1], payload(0))
