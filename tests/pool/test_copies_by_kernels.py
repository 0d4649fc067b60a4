"""Reads and writes whose copies and records are kernels': on a GPU, and under Triton's interpreter with host memory in its place.

For the interpreter ``test_record_kernels.py`` runs this in a child process. Every body holds for both.
"""

from __future__ import annotations

import os
import secrets
import threading
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import pytest
import torch

from tests.pool.conftest import QUICK
from tests.pool.payloads import new_keys, start_write, until
from vcache import block_cache, pool_runs
from vcache.block_cache import BlockCache
from vcache.devices import device_name
from vcache.keys import ChunkKey, ModelSpec
from vcache.memory.base import Memory
from vcache.memory.host import HostMemory
from vcache.paged_kv import PagedKV
from vcache.pool.client import PoolClient
from vcache.pool.donor import Donor
from vcache.pool.enqueued_records import ROOMS, prepare
from vcache.pool.reading import begin_read
from vcache.pool.segment import Segment
from vcache.pool.writing import PendingWrite
from vcache.stats import Counters
from vcache.transfer.arguments import rooms_of

MIB = 1 << 20
IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
PLACES = ["cpu"] if IS_INTERPRETED else [pytest.param("cuda:0", marks=pytest.mark.cuda)]
BLOCKS = np.array([[3, 1], [7, 2], [0, 5], [4, 6]])
THERE = BLOCKS + 8


class Pool(NamedTuple):
    client: PoolClient
    donor: Donor
    open_donor: Callable[[], Donor]
    kv: PagedKV
    caches: list[torch.Tensor]

    def begin_store(self, keys: list[ChunkKey]) -> PendingWrite:
        kv = self.kv
        nbytes = kv.payload_bytes(2)
        return start_write(self.client, keys, nbytes=nbytes, layout=kv.payload_layout, device=kv.device)

    def store(self, keys: list[ChunkKey]) -> int:
        write = self.begin_store(keys)
        write.copy_from(self.kv, BLOCKS[: len(keys)][write.granted])
        stored = write.complete()
        self.client.lookup(b"".join(keys))  # a round trip behind the commit
        return stored

    def load(self, keys: list[ChunkKey]) -> int:
        read = begin_read(self.client, keys, 0)
        read.copy_to(self.kv, THERE[: len(keys)])
        return read.complete()

    def is_loaded(self, chunks: int) -> bool:
        """Whether the first chunks are, in all their bytes."""
        here, there = BLOCKS[:chunks].ravel(), THERE[:chunks].ravel()
        return all(torch.equal(cache[there], cache[here]) for cache in self.caches)

    def nothing_is_held(self) -> bool:
        stats = self.client.stats()
        return stats is not None and not stats.reservations and not stats.leases


@pytest.fixture(params=PLACES)
def pool(request, start_server, open_client) -> Iterator[Pool]:
    """Planes and segments in one place, between which kernels copy."""
    # A key is left to its writer for as long as kernels may compile, and the device may be kept busy.
    config, _ = start_server(**QUICK | {"server": QUICK["server"] | {"reservation_timeout": 60.0}})
    place = torch.device(request.param)
    client = open_client(config, device=device_name(place))
    donors: list[Donor] = []

    def open_donor() -> Donor:
        segment_id = secrets.token_bytes(16)
        memory: Memory
        if IS_INTERPRETED:
            memory = HostMemory.create(client.runtime, segment_id, MIB)
        else:
            from vcache.memory.cuda import CudaMemory

            memory = CudaMemory.create(client.runtime, segment_id, MIB, device=str(place))
        donors.append(Donor(config, client, memory, segment_id, label="test"))
        assert donors[-1].wait_registered(60)
        return donors[-1]

    generator = torch.Generator().manual_seed(1)
    caches = [torch.randint(0, 255, (16, 2, 64), dtype=torch.uint8, generator=generator).to(place) for _ in range(3)]
    with pytest.MonkeyPatch.context() as patch:
        if IS_INTERPRETED:
            from tests.pool.assembly import interpreted_assembly

            patch.setattr(Segment, "is_copied_by_kernels", lambda segment, device: True)
            with interpreted_assembly():
                yield Pool(client, open_donor(), open_donor, PagedKV(caches, block_size=16, num_blocks=16), caches)
        else:
            yield Pool(client, open_donor(), open_donor, PagedKV(caches, block_size=16, num_blocks=16), caches)
    for donor in donors:
        donor.close(1.0)


def test_what_was_stored_is_loaded(pool):
    keys = new_keys(4)
    assert pool.store(keys) == 4
    pool.donor.segment.check_integrity()
    assert [item.key for item in pool.donor.segment.scan()] == keys
    assert pool.load(keys) == 4
    assert pool.is_loaded(4)
    until(pool.nothing_is_held, "leases and reservations are given back")


def test_chunks_of_several_segments_are_one_run(pool):
    keys = new_keys(2)
    assert pool.store(keys) == 2
    second = pool.open_donor().segment
    for _ in range(20):  # an empty segment is taken before long
        others = new_keys(2)
        assert pool.store(others) == 2
        if list(second.scan()):
            break
    read = begin_read(pool.client, keys + others, 0)
    assert len(read.segments) == 2
    read.copy_to(pool.kv, THERE)
    assert read.complete() == 4
    here, there = BLOCKS[:2].ravel(), THERE.reshape(2, -1)
    assert all(torch.equal(cache[blocks], cache[here]) for cache in pool.caches for blocks in there)


def test_nothing_is_marked_before_the_copy_and_nothing_is_committed_before_the_end(pool):
    keys = new_keys(2)
    write = pool.begin_store(keys)
    generations = [pool.donor.segment.generation(record) for record in write.placements["record"].tolist()]
    assert generations == [0, 0]
    write.copy_from(pool.kv, BLOCKS[:2])
    segment, granted = pool.donor.segment, write.placements["generation"].tolist()
    assert [segment.generation(record) for record in write.placements["record"].tolist()] == [g - 1 for g in granted]
    assert pool.load(keys) == 0
    assert write.complete() == write.complete() == 2
    assert pool.load(keys) == 2


def test_where_a_record_is_not_free_no_byte_of_the_payload_is_written(pool):
    keys = new_keys(3)
    write = pool.begin_store(keys)
    _, record, generation, offset, nbytes = write.placements.tolist()[1]
    segment = pool.donor.segment
    taken = segment.directory.rows(record, 1)[0]
    taken[0, 15] = generation + 1_000_000
    assert segment.mark([record], taken) == [True]
    segment.fence()
    before = segment.tensor[offset : offset + nbytes].clone()
    write.copy_from(pool.kv, BLOCKS[:3])
    assert write.complete() == 2
    assert write.granted.tolist() == [0, 2]
    assert torch.equal(segment.tensor[offset : offset + nbytes], before)
    counters = pool.client.counters
    assert (counters["refused_marks"], counters["lost_writes"]) == (1, 0)
    assert segment.generation(record) == generation + 1_000_000 - 1
    assert pool.load(keys) == 1


def test_a_record_that_is_taken_back_before_the_commit_stays_so(pool):
    keys = new_keys(2)
    write = pool.begin_store(keys)
    write.copy_from(pool.kv, BLOCKS[:2])
    _, record, generation, *_ = write.placements.tolist()[1]
    assert pool.donor.segment.retire(record, generation)
    assert write.complete() == 1
    assert pool.donor.segment.generation(record) == 0
    assert pool.client.counters["lost_writes"] == 1
    assert pool.load(keys) == 1


@pytest.mark.parametrize("broken", range(3))
def test_a_record_that_changed_under_the_copy_ends_the_run_and_is_dropped(pool, broken):
    keys = new_keys(3)
    assert pool.store(keys) == 3
    read = begin_read(pool.client, keys, 0)
    read.copy_to(pool.kv, THERE[:3])
    row = read.placements[broken]
    assert pool.donor.segment.retire(int(row["record"]), int(row["generation"]))
    assert read.complete() == read.complete() == broken
    assert pool.is_loaded(broken)
    assert pool.client.counters["invalid_reads"] == 1
    until(lambda: pool.client.lookup(b"".join(keys)).hits == broken, "the server drops what did not validate")


def test_payloads_of_another_form_end_the_run_and_nothing_is_said_against_them(pool):
    keys = new_keys(3)
    assert pool.store(keys[:1]) == 1
    halves = [cache.view(16, 2, 2, 32) for cache in pool.caches]
    other = pool._replace(kv=PagedKV(halves, block_size=16, num_blocks=16))
    assert other.kv.payload_layout != pool.kv.payload_layout
    assert other.store(keys[1:]) == 2
    read = begin_read(pool.client, keys, 0)
    read.copy_to(pool.kv, THERE[:3])
    assert read.hits == 3, "the form is known behind the copy"
    assert (read.complete(), read.hits) == (1, 1)
    assert pool.is_loaded(1)
    assert (pool.client.counters["misfit_hits"], pool.client.counters["invalid_reads"]) == (2, 0)
    assert pool.client.lookup(b"".join(keys)).hits == 3


def test_a_run_that_takes_several_calls_ends_at_a_payload_of_another_form(pool, monkeypatch):
    for module in (block_cache, pool_runs):
        monkeypatch.setattr(module, "parts_of", lambda keys: [keys[at : at + 2] for at in range(0, len(keys), 2)])
    model = ModelSpec(
        model="m", dtype="bfloat16", num_layers=3, num_kv_heads=1, head_size=2, block_size=16, chunk_size=32
    )
    cache = BlockCache(pool.client, None, None, model=model, rank=0, counters=Counters())
    keys = new_keys(4)
    halves = [tensor.view(16, 2, 2, 32) for tensor in pool.caches]
    other = pool._replace(kv=PagedKV(halves, block_size=16, num_blocks=16))
    assert (pool.store(keys[:1]), other.store(keys[1:2]), pool.store(keys[2:])) == (1, 1, 2)
    pending = cache.begin_retrieve(pool.kv, keys, THERE, parent=None, tenant=0)
    assert [read.hits for read, _ in pending.reads] == [2, 2]
    assert pending.complete() == 1
    assert cache.close(0.0)


def test_a_copy_that_fails_gives_everything_back(pool):
    keys = new_keys(2)
    write = pool.begin_store(keys)
    with pytest.raises(ValueError, match="there are blocks 0 to 15"):
        write.copy_from(pool.kv, np.array([[0, 1], [2, 16]]))
    assert write.complete() == 0
    until(pool.nothing_is_held, "the grants are given back")
    assert pool.store(keys) == 2
    read = begin_read(pool.client, keys, 0)
    with pytest.raises(ValueError, match="there are blocks 0 to 15"):
        read.copy_to(pool.kv, np.array([[8, 9], [10, 16]]))
    assert read.complete() == 0
    until(pool.nothing_is_held, "the leases are given back")
    assert pool.load(keys) == 2, "a failed copy says nothing against the entries"


def test_a_write_without_a_copy_is_given_back(pool):
    write = pool.begin_store(new_keys(2))
    assert write.complete() == 0
    until(pool.nothing_is_held, "the grants are given back")
    assert list(pool.donor.segment.scan()) == []


def test_nobody_else_copies_into_records_that_are_not_marked_yet(pool):
    write = pool.begin_store(new_keys(1))
    with pytest.raises(ValueError, match="copy_from copies"):
        write.copy_with(lambda segment, chunks, offsets: pytest.fail("copied"))
    assert write.complete() == 0


def test_another_thread_may_complete(pool):
    keys, answers = new_keys(4), []
    write = pool.begin_store(keys)
    if pool.kv.device.type == "cuda":
        torch.cuda._sleep(200_000_000)
    write.copy_from(pool.kv, BLOCKS)
    thread = threading.Thread(target=lambda: answers.append(write.complete()))
    thread.start()
    thread.join(60)
    pool.client.lookup(b"".join(keys))
    read = begin_read(pool.client, keys, 0)
    read.copy_to(pool.kv, THERE)
    thread = threading.Thread(target=lambda: answers.append(read.complete()))
    thread.start()
    thread.join(60)
    assert answers == [4, 4]
    assert pool.is_loaded(4)


def test_what_was_prepared_serves_all_calls(pool):
    prepare(pool.kv)
    rooms = rooms_of(pool.kv.device)
    before = len(rooms._free)
    assert before >= ROOMS
    keys = new_keys(4)
    for _ in range(5):
        assert pool.store(keys) == 4
        assert pool.load(keys) == 4
        pool.client.clear()
    assert len(rooms._free) == before


@pytest.mark.skipif(IS_INTERPRETED, reason="the interpreter has no streams")
def test_the_caller_waits_for_nothing_before_the_end(pool):
    keys = new_keys(4)
    assert pool.store(keys) == 4
    pool.load(keys)  # loads the kernels
    pool.client.clear()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(2_000_000_000)  # about a second
        write = pool.begin_store(keys)
        write.copy_from(pool.kv, BLOCKS)
        assert not stream.query()
        assert write.complete() == 4
        pool.client.lookup(b"".join(keys))
        torch.cuda._sleep(2_000_000_000)
        read = begin_read(pool.client, keys, 0)
        read.copy_to(pool.kv, THERE)
        assert not stream.query()
        assert read.complete() == 4
    assert pool.is_loaded(4)
