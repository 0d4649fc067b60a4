"""Where the pool's run ends the engine goes on in the store; what it stores is written there; a store that fails costs its part."""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.engine.conftest import NUM_BLOCKS, eventually
from tests.engine.kv import BLOCK, CHUNK, fill, model_of, new_tensors, slots_of, wrong_blocks
from tests.store.mooncake import Mooncake
from vcache.config import VCacheConfig
from vcache.engine import VCacheEngine
from vcache.store.files import FileStore

TOKENS = list(range(4 * CHUNK))
HERE, THERE = list(range(8)), [20, 19, 40, 41, 5, 63, 0, 30]
PAYLOAD = 2 * 256 * 3


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "shared" / "store"


@pytest.fixture
def configured(pool: VCacheConfig, directory: Path) -> Callable[..., VCacheConfig]:
    """The test's pool with a directory below it, and settings of the store."""
    directory.parent.mkdir()

    def configure(**settings) -> VCacheConfig:
        return VCacheConfig(
            runtime_dir=pool.runtime_dir,
            store={"files": {"directory": str(directory)}, **settings},
            promotion={"policy": "never"},
        )

    return configure


@pytest.fixture
def engine(configured, open_engine):
    return open_engine(configured())


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Open until the test closes it: writes to a directory wait before it."""
    event, put_from = threading.Event(), FileStore.put_from
    event.set()

    def wait_first(self, shards, buffers):
        event.wait()
        return put_from(self, shards, buffers)

    monkeypatch.setattr(FileStore, "put_from", wait_first)
    yield event
    event.set()


def store(engine: VCacheEngine, tokens=TOKENS, *, rank: int = 0) -> None:
    tensors = new_tensors(NUM_BLOCKS)
    blocks = HERE[: len(tokens) // BLOCK]
    fill(tensors, tokens, blocks, rank=rank)
    engine.store(tokens, kvcaches=tensors, slot_mapping=slots_of(blocks))


def store_below(engine: VCacheEngine, tokens=TOKENS) -> None:
    """Afterwards the store alone has them."""
    store(engine, tokens)
    assert engine.flush()
    assert engine.clear() == len(tokens) // CHUNK


def retrieve(engine: VCacheEngine, *, rank: int = 0) -> int:
    """How many tokens came back; every byte is compared, of the blocks left alone too."""
    tensors = new_tensors(NUM_BLOCKS)
    loaded = engine.retrieve(TOKENS, kvcaches=tensors, slot_mapping=slots_of(THERE)).tolist()
    assert wrong_blocks(tensors, TOKENS, THERE, loaded, rank=rank) == []
    return sum(loaded)


def files(directory: Path) -> list[Path]:
    return sorted(directory.rglob("*.kv"))


# --- what holds when all is well ---------------------------------------------------------------------------------------


def test_what_the_pool_lost_comes_back_from_the_store(engine):
    store_below(engine)
    assert engine.lookup(TOKENS) == 32
    assert engine.lookup_keys(engine.keys_of(TOKENS)) == (0, 4, 0)
    assert [engine.contains(key) for key in engine.keys_of(TOKENS)] == [1] * 4
    assert retrieve(engine) == 32
    stats = engine.get_stats()
    expected = {
        "hits": 4,
        "store_hits": 4,
        "misses": 0,
        "failures": 0,
        "store_read_bytes": 4 * PAYLOAD,
        "store_written_bytes": 4 * PAYLOAD,
        "dram_read_bytes": 0,
        "store_written": 4,
        "store_queue_items": 0,
    }
    assert {name: stats[name] for name in expected} == expected
    assert stats["store_read_seconds"] > 0
    assert stats["store_written_seconds"] > 0


def test_a_run_begins_in_the_pool_and_goes_on_in_the_store(engine, directory):
    store_below(engine)
    store(engine, TOKENS[:16])
    keys = engine.keys_of(TOKENS)
    assert engine.lookup_keys(keys)[:2] == (2, 2)
    assert [engine.contains(key) for key in keys] == [0, 0, 1, 1]
    assert retrieve(engine) == 32
    assert engine.get_stats()["store_hits"] == 2
    assert len(files(directory)) == 4


def test_chunks_that_the_pool_loses_while_they_are_read_are_read_from_the_store(engine):
    store(engine)
    assert engine.flush()
    tensors = new_tensors(NUM_BLOCKS)
    engine.register_kv_caches(tensors)
    keys = engine.keys_of(TOKENS)
    pending = engine.begin_retrieve(keys, [THERE[:2], THERE[2:4], THERE[4:6], THERE[6:]])
    assert [read.hits for read, _ in pending.reads] == [4]
    assert engine.clear() == 4
    assert pending.complete() == 4
    assert wrong_blocks(tensors, TOKENS, THERE, [True] * 32) == []
    stats = engine.get_stats()
    assert (stats["validation_failures"], stats["store_hits"]) == (4, 4)


def test_a_prompt_larger_than_staging_memory_comes_in_rounds(configured, open_engine):
    chunks, at_once = 150, 50
    tensors = new_tensors(2 * chunks)
    engine = open_engine(configured(staging_size="1MiB"), kv_caches=tensors)
    tokens, blocks = list(range(chunks * CHUNK)), list(range(2 * chunks))
    fill(tensors, tokens, blocks)
    keys, table = engine.keys_of(tokens), [blocks[2 * chunk : 2 * chunk + 2] for chunk in range(chunks)]
    for start in range(0, chunks, at_once):
        part = slice(start, start + at_once)
        assert engine.begin_store(keys[part], table[part], keys[start - 1] if start else None).complete() == at_once
        assert engine.flush()
        engine.clear()
    loaded = new_tensors(2 * chunks)
    engine.register_kv_caches(loaded)
    assert engine.begin_retrieve(keys, table).complete() == chunks
    assert wrong_blocks(loaded, tokens, blocks, [True] * len(tokens)) == []
    assert engine.get_stats()["store_no_staging"] > 0


def test_two_ranks_make_a_hit_only_together(configured, open_engine):
    model = model_of(ranks=2)
    ranks = [open_engine(configured(), model=model, rank=rank) for rank in range(2)]
    scheduler = open_engine(configured(), model=model, role="scheduler")
    store(ranks[0])
    assert ranks[0].flush()
    assert ranks[0].get_stats()["store_written"] == 4
    assert scheduler.lookup(TOKENS) == 0
    assert retrieve(ranks[0]) == 0
    store(ranks[1], TOKENS[:16], rank=1)
    assert ranks[1].flush()
    scheduler.clear()
    assert scheduler.lookup(TOKENS) == 16
    assert [retrieve(engine, rank=rank) for rank, engine in enumerate(ranks)] == [16, 16]


def test_removing_takes_chunks_from_the_store_too(engine, directory):
    store(engine)
    keys = engine.keys_of(TOKENS)
    assert engine.remove_keys(keys[2:]) == 2
    assert engine.flush()
    assert len(files(directory)) == 2
    assert engine.lookup(TOKENS) == 16


def test_the_policy_none_reads_and_does_not_write(configured, open_engine, engine, directory):
    reader = open_engine(configured(write_policy="none"))
    store(reader)
    assert reader.flush()
    assert files(directory) == []
    assert reader.clear() == 4
    store_below(engine)
    assert retrieve(reader) == 32


def test_closing_writes_what_is_queued(configured, open_engine, engine, gate, directory):
    gate.clear()
    store(engine)
    assert not engine.flush(0.01)
    threading.Timer(0.05, gate.set).start()
    engine.close()
    engine.close()
    assert len(files(directory)) == 4
    open_engine(configured()).clear()
    other = open_engine(configured())
    assert retrieve(other) == 32


# --- what a store that fails costs -------------------------------------------------------------------------------------


def test_a_full_queue_drops_and_counts_and_keeps_nobody_waiting(configured, open_engine, gate):
    engine = open_engine(configured(queue_items=2))
    gate.clear()
    store(engine, TOKENS[:16])
    store(engine)
    stats = engine.get_stats()
    assert (stats["store_offered"], stats["store_dropped_queue"], stats["stored"]) == (4, 2, 4)
    gate.set()
    assert engine.flush()
    assert engine.get_stats()["store_written"] == 2
    assert engine.lookup_keys(engine.keys_of(TOKENS))[:2] == (4, 0)
    assert engine.clear() == 4
    assert retrieve(engine) == 16


def test_what_the_pool_lost_before_its_turn_is_not_written(engine, gate, directory):
    gate.clear()
    other = list(range(1000, 1000 + CHUNK))
    store(engine, other)
    store(engine)
    assert engine.clear() == 5
    gate.set()
    assert engine.flush()
    stats = engine.get_stats()
    assert stats["store_dropped_lost"] + stats["store_written"] == 5
    assert stats["store_dropped_lost"] >= 4
    assert retrieve(engine) == 0


def test_a_flipped_bit_is_a_miss_and_the_file_is_removed(engine, directory):
    store_below(engine)
    key = engine.keys_of(TOKENS)[2].hex()
    (file,) = directory.rglob(f"{key}*.kv")
    with file.open("r+b") as opened:
        opened.seek(-1, os.SEEK_END)
        last = opened.read(1)
        opened.seek(-1, os.SEEK_END)
        opened.write(bytes([last[0] ^ 1]))
    assert retrieve(engine) == 16
    assert not file.exists()
    stats = engine.get_stats()
    assert (stats["store_invalid"], stats["misses"], stats["failures"]) == (1, 2, 0)
    assert engine.lookup(TOKENS) == 16


def test_what_a_store_delivers_before_it_hangs_is_served(configured, open_engine, monkeypatch):
    engine = open_engine(configured(guard={"timeout": "300ms"}))
    store_below(engine)
    goes_on, get_into = threading.Event(), FileStore.get_into

    def hang_in_between(self, shards, buffers, arrived):
        results = list(get_into(self, shards[:2], buffers[:2]))
        arrived([0, 1])
        goes_on.wait()
        return results + list(get_into(self, shards[2:], buffers[2:]))

    monkeypatch.setattr(FileStore, "get_into", hang_in_between)
    try:
        assert retrieve(engine) == 16
    finally:
        goes_on.set()
    stats = engine.get_stats()
    assert (stats["store_hits"], stats["store_overdue_calls"], stats["store_failed_reads"]) == (2, 1, 2)


@pytest.mark.parametrize("lost", ["store", "mount"])
def test_a_directory_that_is_gone_is_an_empty_store(engine, directory, lost):
    store_below(engine)
    eventually(lambda: engine.get_stats()["store_sweeps"] == 1, "the sweep that the first write begins")
    shutil.rmtree(directory if lost == "store" else directory.parent)
    assert engine.lookup(TOKENS) == 0
    assert retrieve(engine) == 0
    store(engine)
    assert engine.flush()
    assert retrieve(engine) == 32, "the pool's copies are as good as ever"
    stats = engine.get_stats()
    assert (stats["failures"], stats["store_dropped_failed"]) == (0, 0 if lost == "store" else 4)


def test_a_disk_that_is_read_only_is_read(pool, open_engine, small_disk):
    config = VCacheConfig(runtime_dir=pool.runtime_dir, store={"files": {"directory": str(small_disk / "store")}})
    engine = open_engine(config)
    store_below(engine, TOKENS[:16])
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    store(engine)
    assert engine.flush()
    stats = engine.get_stats()
    assert (stats["store_present"], stats["store_dropped_failed"], stats["store_failed_writes"]) == (2, 2, 2)
    assert engine.lookup_keys(engine.keys_of(TOKENS))[:2] == (4, 0), "the pool's copies are as they were"
    assert retrieve(engine) == 32
    engine.clear()
    assert retrieve(engine) == 16


def test_a_store_whose_circuit_is_open_costs_nothing(configured, open_engine, monkeypatch, directory):
    engine = open_engine(configured(guard={"failures": 1, "probe_interval": "60s", "max_probe_interval": "60s"}))
    store_below(engine)

    def fail(self, shards):
        raise TimeoutError("the mount is gone")

    monkeypatch.setattr(FileStore, "contains", fail)
    assert engine.lookup(TOKENS) == 0
    made = engine.get_stats()["store_made_calls"]
    assert (engine.lookup(TOKENS), engine.contains(engine.keys_of(TOKENS)[0]), retrieve(engine)) == (0, -1, 0)
    store(engine)
    assert engine.flush()
    stats = engine.get_stats()
    assert (stats["store_circuit"], stats["store_available"], stats["store_made_calls"]) == ("open", False, made)
    assert stats["store_dropped_down"] == 4
    assert retrieve(engine) == 32


def test_without_a_server_the_store_serves(configured, open_engine, engine, tmp_path):
    store_below(engine)
    elsewhere = tmp_path / "host"
    config = VCacheConfig(
        runtime_dir=str(elsewhere), store=configured().store.model_dump(), client={"connect_timeout": "10ms"}
    )
    alone = open_engine(config)
    assert alone.lookup(TOKENS) == 32
    assert retrieve(alone) == 32


# --- processes ---------------------------------------------------------------------------------------------------------


def test_the_store_outlives_writer_donor_and_server(
    start_server, start_donor, start_worker, processes, runtime_dir, tmp_path, device
):
    config, server = start_server(store={"files": {"directory": str(tmp_path / "store")}})
    donor = start_donor(config, device=device)
    writer = start_worker(config, device=device)
    assert writer.do("store", tokens=TOKENS, blocks=HERE) == {"stored": 4}
    assert writer.do("flush") == {"flushed": True}
    for child in (writer.child, donor, server):
        child.kill()
    processes.server(config)
    reader = start_worker(config, device=device)
    assert reader.do("lookup", tokens=TOKENS) == {"hits": 32}
    assert reader.do("retrieve", tokens=TOKENS, blocks=THERE) == {"loaded": 32, "wrong": []}
    assert reader.do("stats")["store_hits"] == 4


@pytest.mark.slow
def test_mooncake_outlives_writer_and_donor(start_server, start_donor, start_worker, processes, device):
    mooncake = Mooncake(processes)
    mooncake.start_master()
    mooncake.start_owner()
    config, _ = start_server(store={"mooncake": {"master": mooncake.address}, "staging_size": "64MiB"})
    donor = start_donor(config, device=device)
    writer, reader = start_worker(config, device=device), start_worker(config, device=device)
    assert writer.do("store", tokens=TOKENS, blocks=HERE) == {"stored": 4}
    assert writer.do("flush") == {"flushed": True}
    assert writer.do("stats")["store_written"] == 4
    writer.child.kill()
    donor.kill()
    assert reader.do("retrieve", tokens=TOKENS, blocks=THERE) == {"loaded": 32, "wrong": []}
