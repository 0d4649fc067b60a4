"""A scheduler sees what workers stored, and touches neither devices nor segments."""

from __future__ import annotations

from pathlib import Path

from tests.engine.kv import CHUNK, fill, model_of, new_tensors, slots_of

TOKENS = list(range(4 * CHUNK))
BLOCKS = list(range(8))


def test_a_scheduler_looks_up_and_maps_nothing(pool, open_engine, start_worker, runtime_dir):
    worker = start_worker(pool)
    scheduler = open_engine(pool, role="scheduler")
    assert scheduler.lookup(TOKENS) == 0
    assert worker.do("store", tokens=TOKENS, blocks=BLOCKS) == {"stored": 4}
    assert scheduler.lookup(TOKENS) == 32
    found = scheduler.lookup_keys(scheduler.keys_of(TOKENS), lease_s=1.0)
    assert found.hits == 4
    scheduler.release(found.lease)
    assert scheduler.contains(scheduler.keys_of(TOKENS)[0]) == 0
    assert f"{runtime_dir}/segment" not in Path("/proc/self/maps").read_text()


def test_a_scheduler_finds_a_chunk_of_two_ranks_only_when_both_are_there(pool, open_engine):
    model = model_of(ranks=2)
    scheduler = open_engine(pool, model=model, role="scheduler")
    tensors = new_tensors(8)
    fill(tensors, TOKENS, BLOCKS)
    for rank, hits in ((1, 0), (0, 32)):
        worker = open_engine(pool, model=model, rank=rank, kv_caches=tensors)
        worker.store(TOKENS, slot_mapping=slots_of(BLOCKS))
        worker.get_stats()  # a round trip: the commit before it has arrived
        assert scheduler.lookup(TOKENS) == hits
