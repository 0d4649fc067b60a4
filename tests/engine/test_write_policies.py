"""What is written to the store by policy; what flush and removals promise."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.engine.conftest import NUM_BLOCKS
from tests.engine.kv import CHUNK, fill, new_tensors, slots_of, wrong_blocks
from vcache.config import VCacheConfig
from vcache.engine import VCacheEngine
from vcache.store.files import FileStore

TOKENS = list(range(4 * CHUNK))
HERE, THERE = list(range(8)), [20, 19, 40, 41, 5, 63, 0, 30]


@pytest.fixture
def configured(pool: VCacheConfig, tmp_path: Path) -> Callable[..., VCacheConfig]:
    def configure(**settings) -> VCacheConfig:
        return VCacheConfig(
            runtime_dir=pool.runtime_dir,
            store={"files": {"directory": str(tmp_path / "store")}, **settings},
            promotion={"policy": "never"},
            client={"call_timeout": "20s"},
        )

    return configure


def store(engine: VCacheEngine) -> None:
    tensors = new_tensors(NUM_BLOCKS)
    fill(tensors, TOKENS, HERE)
    engine.store(TOKENS, kvcaches=tensors, slot_mapping=slots_of(HERE))


def retrieve(engine: VCacheEngine, tokens=TOKENS) -> int:
    tensors, blocks = new_tensors(NUM_BLOCKS), THERE[: len(tokens) // 4]
    loaded = engine.retrieve(tokens, kvcaches=tensors, slot_mapping=slots_of(blocks)).tolist()
    assert wrong_blocks(tensors, tokens, blocks, loaded) == []
    return sum(loaded)


def written(engine: VCacheEngine) -> int:
    assert engine.flush()
    return int(engine.get_stats()["store_written"])


def test_hot_chunks_are_written_at_their_nth_hit_and_come_back(configured, open_engine):
    engine = open_engine(configured(write_policy="hot", hot_hits=2))
    store(engine)
    assert retrieve(engine, TOKENS[:16]) == 16
    assert written(engine) == 0
    assert retrieve(engine) == 32
    assert written(engine) == 2
    assert retrieve(engine) == 32
    assert written(engine) == 4
    assert engine.clear() == 4
    assert retrieve(engine) == 32
    assert engine.get_stats()["store_hits"] == 4


def test_hits_of_what_another_engine_stored_count_and_what_the_store_has_is_not_written_again(configured, open_engine):
    writer, reader = (open_engine(configured(write_policy="hot", hot_hits=1)) for _ in range(2))
    store(writer)
    assert writer.flush()
    assert retrieve(reader) == 32
    assert written(reader) == 4
    assert retrieve(writer) == 32
    assert written(writer) == 0
    assert writer.get_stats()["store_present"] == 4


def test_a_hot_chunk_that_was_dropped_has_another_chance(configured, open_engine, monkeypatch):
    engine = open_engine(configured(write_policy="hot", hot_hits=1, guard={"failures": 1000}))
    put_from = FileStore.put_from

    def fail(self, shards, buffers):
        raise OSError("no such mount")

    monkeypatch.setattr(FileStore, "put_from", fail)
    store(engine)
    assert retrieve(engine) == 32
    assert written(engine) == 0
    assert engine.get_stats()["store_dropped_failed"] == 4
    monkeypatch.setattr(FileStore, "put_from", put_from)
    assert retrieve(engine) == 32
    assert written(engine) == 4


def test_workers_write_nothing_of_what_donors_write_when_it_is_evicted(configured, open_engine):
    engine = open_engine(configured(write_policy="evicted"))
    store(engine)
    assert [retrieve(engine) for _ in range(3)] == [32] * 3
    assert written(engine) == 0
    assert engine.get_stats()["store_offered"] == 0


def test_after_a_flush_any_other_client_finds_what_was_stored(configured, open_engine):
    engine, other = (open_engine(configured(kind="none")) for _ in range(2))
    for _ in range(50):
        store(engine)
        assert engine.flush()
        assert other.lookup(TOKENS) == 32
        assert other.clear() == 4


def test_a_removal_that_the_store_does_not_confirm_says_so(configured, open_engine, monkeypatch):
    engine = open_engine(configured())
    store(engine)
    assert engine.flush()

    def fail(self, shards):
        raise OSError("no such mount")

    with monkeypatch.context() as broken:
        broken.setattr(FileStore, "remove", fail)
        assert engine.remove_keys(engine.keys_of(TOKENS)) == -1
    assert engine.get_stats()["unconfirmed_removals"] == 1
    assert retrieve(engine) == 32, "the store has them still"
    assert engine.remove_keys(engine.keys_of(TOKENS)) == 0
    assert retrieve(engine) == 0
    assert engine.get_stats()["unconfirmed_removals"] == 1


def test_a_removal_from_a_read_only_directory_says_that_it_is_not_confirmed(pool, open_engine, small_disk):
    engine = open_engine(
        VCacheConfig(
            runtime_dir=pool.runtime_dir,
            store={"files": {"directory": str(small_disk / "store")}},
            promotion={"policy": "never"},
            client={"call_timeout": "20s"},
        )
    )
    store(engine)
    assert engine.flush()
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    assert engine.remove_keys(engine.keys_of(TOKENS)) == -1
    assert engine.lookup_keys(engine.keys_of(TOKENS))[:2] == (0, 4), "the store has them still"
    assert retrieve(engine) == 32
    subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
    assert engine.remove_keys(engine.keys_of(TOKENS)) == 0
    assert retrieve(engine) == 0
