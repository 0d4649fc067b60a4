"""The read and write paths: what is copied is validated, what is granted is committed or given back."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from tests.pool.conftest import QUICK
from tests.pool.payloads import NBYTES, copy_out, fill, load, new_keys, payload, poke, start_write, store, until
from vcache.keys import ChunkKey
from vcache.pool.reading import begin_read
from vcache.protocol import Outcome

MIB = 1 << 20


@pytest.fixture
def pool(quick, open_client, open_donor):
    """A client that writes, with a donor of 8 MiB in its own process."""
    config, _ = quick
    client = open_client(config)
    return client, open_donor(config, client)


def nothing_is_held(client) -> bool:
    stats = client.stats()
    return stats is not None and not stats.reservations and not stats.leases


def test_what_was_stored_is_read_by_another_process_mapping(pool, open_client):
    client, _ = pool
    reader = open_client(client.config, writes=False)
    keys = new_keys(5)
    assert store(client, keys) == 5
    assert load(reader, keys) == load(client, keys) == 5
    assert reader.mappings.mapped() == client.mappings.mapped()
    until(lambda: nothing_is_held(client), "leases and reservations are given back")


def test_the_run_ends_at_the_first_absent_chunk(pool):
    client, _ = pool
    keys = new_keys(4)
    assert store(client, keys[:2]) == 2
    assert store(client, keys[3:], parent=keys[2]) == 1
    assert load(client, keys) == 2
    assert load(client, keys[2:]) == 0


def test_what_is_present_or_being_written_is_not_written_again(pool):
    client, _ = pool
    keys = new_keys(3)
    assert store(client, keys[:1]) == 1
    first = start_write(client, keys[1:2], parent=keys[0])
    second = start_write(client, keys)
    assert second.outcomes == [Outcome.EXISTS, Outcome.EXISTS, Outcome.GRANTED]
    assert second.granted.tolist() == [2]
    fill(second, keys)
    fill(first, keys[1:2])
    assert (first.complete(), second.complete()) == (1, 1)
    assert load(client, keys) == 3


@pytest.mark.parametrize("removal", ["remove", "clear"])
def test_what_was_being_written_when_it_was_removed_is_not_found(pool, open_client, removal: str):
    client, donor = pool
    other = open_client(client.config)
    keys = new_keys(2)
    write = start_write(client, keys)
    fill(write, keys)
    with ThreadPoolExecutor(1) as threads:
        answer = threads.submit(other.clear) if removal == "clear" else threads.submit(other.remove, b"".join(keys))
        again: list[Outcome] = []

        def is_free() -> bool:
            again[:] = (second := start_write(other, keys)).outcomes
            second.abort()
            return again == [Outcome.GRANTED] * 2

        until(is_free, "the removal has freed the keys")
        assert not answer.done(), "what is committed in memory now would be found there by the next server"
        write.complete()
        assert answer.result(30.0) == 0
    assert load(other, keys) == 0
    until(lambda: not any(record.generation for record in donor.segment.scan()), "so is what was given up meanwhile")
    until(lambda: nothing_is_held(client), "reservations are given back")
    assert store(client, keys) == load(other, keys) == 2, "what is stored afterwards is"


def test_what_was_granted_comes_back_when_its_segment_cannot_be_mapped_for_an_unknown_reason(pool, monkeypatch):
    client, _ = pool
    use_segment = client.use_segment

    def broken(info):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(client, "use_segment", broken)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        start_write(client, new_keys(3))
    assert client.session.evidence()[1] == [], "no heartbeat says that they are being written"
    until(lambda: nothing_is_held(client), "the server has them back")
    monkeypatch.setattr(client, "use_segment", use_segment)
    assert store(client, new_keys(3)) == 3


def test_nothing_is_visible_before_it_is_complete(pool):
    client, _ = pool
    keys = new_keys(2)
    write = start_write(client, keys)
    fill(write, keys)
    assert load(client, keys) == 0
    write.commit_records()
    assert load(client, keys) == 0
    write.tell()
    assert load(client, keys) == 2


def test_an_aborted_write_leaves_nothing_and_its_space_comes_back(pool):
    client, donor = pool
    keys = new_keys(100)
    write = start_write(client, keys)
    assert len(write.granted) == 100
    fill(write, keys)
    write.abort()
    write.abort()
    assert write.complete() == 0
    assert load(client, keys) == 0
    until(lambda: not list(donor.segment.scan()), "every record is retired in memory")
    assert store(client, keys) == 100
    assert load(client, keys) == 100


def test_a_write_without_a_copy_is_given_back(pool):
    client, _ = pool
    write = start_write(client, new_keys(2))
    assert write.complete() == 0
    until(lambda: nothing_is_held(client), "the grants are given back")


def test_into_host_memory_that_is_not_pinned_a_gpu_would_wait_so_the_grants_are_given_back(pool):
    client, donor = pool
    write = start_write(client, new_keys(2), device=torch.device("cuda:0"))
    assert (len(write.granted), write.outcomes) == (0, [Outcome.DECLINED] * 2)
    assert write.complete() == 0
    assert client.counters["unpinned_grants"] == 2
    until(lambda: nothing_is_held(client), "the grants are given back")
    assert not list(donor.segment.scan())


def test_a_copy_that_fails_gives_the_grants_back(pool):
    client, _ = pool
    keys = new_keys(2)
    write = start_write(client, keys)

    def broken(segment, chunks, offsets):
        poke(segment, int(offsets[0]), b"half")
        raise RuntimeError("the copy failed")

    with pytest.raises(RuntimeError, match="the copy failed"):
        write.copy_with(broken)
    assert write.complete() == 0
    until(lambda: nothing_is_held(client), "the grants are given back")
    assert load(client, keys) == 0


def test_a_read_without_a_copy_or_after_a_failed_one_has_loaded_nothing(pool):
    client, _ = pool
    keys = new_keys(2)
    assert store(client, keys) == 2
    assert begin_read(client, keys, 0).complete() == 0
    read = begin_read(client, keys, 0)

    def broken(segment, chunks, offsets):
        raise RuntimeError("the copy failed")

    with pytest.raises(RuntimeError, match="the copy failed"):
        read.copy_with(broken)
    assert read.complete() == read.complete() == 0
    until(lambda: nothing_is_held(client), "the leases are given back")
    assert load(client, keys) == 2, "a failed copy says nothing against the entries"


@pytest.mark.parametrize("broken", range(3))
def test_a_record_that_changed_under_the_copy_ends_the_run_and_is_dropped(pool, broken):
    client, donor = pool
    keys = new_keys(3)
    assert store(client, keys) == 3
    read = begin_read(client, keys, 0)
    copy_out(read)
    row = read.placements[broken]
    assert donor.segment.retire(int(row["record"]), int(row["generation"]))
    assert read.complete() == broken
    assert client.counters["invalid_reads"] == 1
    until(lambda: client.lookup(b"".join(keys)).hits == broken, "the server drops what did not validate")
    assert load(client, keys) == broken
    assert store(client, keys) == 1
    assert load(client, keys) == 3


def test_a_reader_slower_than_its_lease_gets_a_miss_when_its_extent_is_overwritten(
    start_server, open_client, open_donor
):
    settings = {**QUICK, "client": {"call_timeout": 1.0, "lease": 0.1}}
    config, _ = start_server(**settings)
    client = open_client(config)
    open_donor(config, client, size=1 * MIB)
    keys = new_keys(4)
    assert store(client, keys) == 4
    read = begin_read(client, keys, 0)
    assert read.hits == 4

    def is_overwritten() -> bool:
        store(client, new_keys(4))
        return all(data != payload(keys[chunk]) for chunk, data in copy_out(read).items())

    until(is_overwritten, "every extent of the run holds other bytes")
    assert read.complete() == 0
    assert client.counters["invalid_reads"] == 4


def test_a_full_pool_whose_entries_are_all_leased_skips_the_write(quick, open_client, open_donor):
    config, _ = quick
    client = open_client(config)
    open_donor(config, client, size=1 * MIB)
    keys = new_keys(40)
    write = start_write(client, keys)
    held = len(write.granted)
    assert 0 < held < 40
    assert set(write.outcomes[held:]) == {Outcome.NO_SPACE}
    fill(write, keys)
    assert write.complete() == held
    read = begin_read(client, keys[:held], 0)  # leases all that there is
    copied = copy_out(read)
    until(lambda: (stats := client.stats()) and stats.leases == 1, "the lease")
    refused = start_write(client, new_keys(held))
    assert set(refused.outcomes) == {Outcome.NO_SPACE}
    assert refused.complete() == 0
    assert read.complete() == len(copied) == held
    until(lambda: store(client, new_keys(2)) == 2, "eviction makes room once the lease has ended")


def test_a_full_pool_whose_entries_are_all_pinned_skips_the_write(quick, open_client, open_donor):
    config, _ = quick
    client = open_client(config)
    open_donor(config, client, size=1 * MIB)
    keys = new_keys(40)
    held = store(client, keys, pin_s=60.0)
    assert store(client, new_keys(2)) == 0
    assert load(client, keys[:held]) == held
    stats = client.stats()
    assert stats is not None
    assert stats.counters["reserve_no_space"] > 0
    assert client.unpin(b"".join(keys[:held])) == held
    until(lambda: store(client, new_keys(2)) == 2, "eviction makes room once they are unpinned")


def test_removed_means_gone_from_memory_too(pool):
    client, donor = pool
    keys = new_keys(4)
    assert store(client, keys) == 4
    assert client.remove(b"".join(keys[2:])) == 2
    assert {item.key for item in donor.segment.scan()} == set(keys[:2])
    assert load(client, keys) == 2
    assert client.clear() == 2
    assert list(donor.segment.scan()) == []
    assert store(client, keys) == 4


def test_chunks_of_several_segments_are_one_run(quick, open_client, open_donor):
    config, _ = quick
    client = open_client(config)
    for _ in range(3):
        open_donor(config, client, size=1 * MIB)
    keys = new_keys(40)
    assert store(client, keys) == 40
    read = begin_read(client, keys, 0)
    assert len(read.segments) == 3
    assert len(set(read.placements["segment"].tolist())) == 3
    copied = copy_out(read)
    assert read.complete() == 40
    assert copied == {chunk: payload(key) for chunk, key in enumerate(keys)}


def test_ranks_are_hits_together(pool):
    from vcache.pool.writing import begin_write

    client, _ = pool
    keys = new_keys(2)
    for rank in (1, 0):
        assert client.lookup(b"".join(keys)).hits == 0
        write = begin_write(client, keys, parent=b"", rank=rank, ranks=2, nbytes=NBYTES, tokens=256, tenant=0)
        fill(write, [ChunkKey(bytes([rank]) + key[1:]) for key in keys])
        assert write.complete() == 2
    for rank in (0, 1):
        read = begin_read(client, keys, rank)
        copied = copy_out(read)
        assert read.complete() == 2
        assert copied[0] == payload(bytes([rank]) + keys[0][1:])


def test_paged_kv_is_stored_and_loaded_block_by_block(pool):
    torch = pytest.importorskip("torch")
    from vcache.paged_kv import PagedKV

    client, _ = pool
    caches = [torch.randint(0, 255, (16, 2, 64), dtype=torch.uint8) for _ in range(3)]
    kv = PagedKV(caches, block_size=16, num_blocks=16)
    source, target = np.array([[3, 1], [7, 2]]), np.array([[10, 11], [12, 13]])
    keys = new_keys(2)
    write = start_write(client, keys, nbytes=kv.payload_bytes(2), layout=kv.payload_layout)
    write.copy_from(kv, source[write.granted])
    assert write.complete() == 2
    read = begin_read(client, keys, 0)
    read.copy_to(kv, target)
    assert read.complete() == 2
    for cache in caches:
        assert torch.equal(cache[target.reshape(-1)], cache[source.reshape(-1)])


def test_blocks_of_another_size_than_the_payload_are_not_loaded_and_not_stored(pool):
    torch = pytest.importorskip("torch")
    from vcache.paged_kv import PagedKV

    client, _ = pool
    kv = PagedKV([torch.zeros(16, 2, 64, dtype=torch.uint8)], block_size=16, num_blocks=16)
    keys = new_keys(1)
    assert store(client, keys, nbytes=4096) == 1
    read = begin_read(client, keys, 0)
    read.copy_to(kv, np.array([[0, 1]]))
    assert (read.hits, read.complete()) == (0, 0)
    write = start_write(client, new_keys(1), nbytes=4096)
    with pytest.raises(ValueError, match="chunks of 256 bytes, 4096 were reserved"):
        write.copy_from(kv, np.array([[0, 1]]))
    assert write.complete() == 0
