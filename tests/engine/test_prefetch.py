"""``prefetch`` brings a prefix from the store into the pool: waited for, awaited, cancelled, or cut short by a close."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.engine.conftest import NUM_BLOCKS
from tests.engine.kv import CHUNK, fill, model_of, new_tensors, slots_of, wrong_blocks
from tests.pool.payloads import until
from tests.store.mooncake import Mooncake
from vcache.config import VCacheConfig
from vcache.engine import VCacheEngine
from vcache.store.files import FileStore

TOKENS = list(range(4 * CHUNK))
HERE, THERE = list(range(8)), [20, 19, 40, 41, 5, 63, 0, 30]


@pytest.fixture
def configured(pool: VCacheConfig, tmp_path: Path) -> Callable[..., VCacheConfig]:
    def configure(**promotion) -> VCacheConfig:
        return VCacheConfig(
            runtime_dir=pool.runtime_dir,
            store={"files": {"directory": str(tmp_path / "store")}},
            promotion={"policy": "never", **promotion},
            client={"call_timeout": "20s"},
        )

    return configure


@pytest.fixture
def engine(configured, open_engine) -> VCacheEngine:
    engine: VCacheEngine = open_engine(configured(), kv_caches=new_tensors(NUM_BLOCKS))
    return engine


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Open until the test closes it: reads from a directory wait before it."""
    event, get_into = threading.Event(), FileStore.get_into
    event.set()

    def wait_first(self, shards, buffers, *arrived):
        event.wait()
        return get_into(self, shards, buffers, *arrived)

    monkeypatch.setattr(FileStore, "get_into", wait_first)
    yield event
    event.set()


def store_below(engine: VCacheEngine, tokens=TOKENS, *, salt: str = "") -> None:
    tensors = new_tensors(NUM_BLOCKS)
    fill(tensors, tokens, HERE, salt=salt)
    engine.store(tokens, kvcaches=tensors, slot_mapping=slots_of(HERE[: len(tokens) // 4]), salt=salt)
    assert engine.flush()
    assert engine.clear() == len(tokens) // CHUNK


def retrieve(engine: VCacheEngine, tokens=TOKENS, *, salt: str = "") -> int:
    tensors = new_tensors(NUM_BLOCKS)
    loaded = engine.retrieve(tokens, kvcaches=tensors, slot_mapping=slots_of(THERE), salt=salt).tolist()
    assert wrong_blocks(tensors, tokens, THERE, loaded, salt=salt) == []
    return sum(loaded)


def test_a_prefetched_prompt_is_found_in_the_pool_by_any_client(configured, open_engine, engine):
    store_below(engine)
    handle = engine.prefetch(TOKENS)
    assert handle.wait() == 4
    assert handle.done
    other = open_engine(configured())
    assert other.lookup_keys(other.keys_of(TOKENS))[:2] == (4, 0)
    assert retrieve(other) == 32
    assert other.get_stats()["store_hits"] == 0


def test_it_goes_on_after_the_pools_run_and_ends_where_the_store_does(engine):
    store_below(engine, TOKENS[:24])
    assert engine.prefetch(TOKENS[:8]).wait() == 1
    assert engine.prefetch(TOKENS).wait() == 3
    stats = engine.get_stats()
    assert (stats["promoted_from_store"], stats["promotion_lost"]) == (3, 1)
    assert stats["server_reservations"] == 0


def test_what_nobody_has_is_not_kept_from_being_stored(engine):
    """No reservation is taken for a chunk that the store has not."""
    assert engine.prefetch(TOKENS).wait() == 0
    store_below(engine)
    stats = engine.get_stats()
    assert (stats["stored"], stats["store_exists"]) == (4, 0)


def test_it_can_be_awaited(engine):
    store_below(engine)

    async def fetch():
        return await engine.prefetch(TOKENS)

    assert asyncio.run(fetch()) == 4


def test_it_ends_where_a_broken_device_has_no_stream_to_give(engine, monkeypatch):
    store_below(engine)

    def broken(device):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with monkeypatch.context() as breaking:
        breaking.setattr("vcache.promotion.aside_on", broken)
        assert engine.prefetch(TOKENS).wait(60) == 0
    handle = engine.prefetch(TOKENS)
    assert handle.wait(60) == 4, "the thread goes on"
    stats = engine.get_stats()
    assert (stats["promotion_lost"], stats["promotion_waiting"]) == (4, 0)


def test_prefetch_goes_before_promotion_and_keeps_its_tenant(engine):
    store_below(engine, salt="one")
    assert engine.prefetch(TOKENS, salt="one").wait() == 4
    assert engine.clear(salt="") == 0
    assert retrieve(engine, salt="one") == 32
    assert engine.clear(salt="one") == 4


def test_cancelled_before_its_turn_it_moves_nothing(engine, gate):
    other = list(range(1000, 1000 + 4 * CHUNK))
    store_below(engine)
    store_below(engine, other)
    gate.clear()
    first, second = engine.prefetch(TOKENS), engine.prefetch(other)
    second.cancel()
    assert (first.wait(0.01), first.done) == (0, False)
    gate.set()
    assert (first.wait(), second.wait()) == (4, 0)
    stats = engine.get_stats()
    assert (stats["promotion_dropped"], stats["promotion_waiting"]) == (4, 0)
    second.cancel()
    first.cancel()
    assert not first.cancelled


def test_what_the_queue_has_no_room_for_is_not_fetched(configured, open_engine):
    engine = open_engine(configured(queue_items=2), kv_caches=new_tensors(NUM_BLOCKS))
    store_below(engine)
    assert engine.prefetch(TOKENS).wait() == 2
    assert engine.get_stats()["promotion_dropped"] == 2


def test_closing_ends_every_handle(configured, open_engine, gate):
    engine = open_engine(configured(), kv_caches=new_tensors(NUM_BLOCKS))
    store_below(engine, salt="closing")  # the keys of what is being moved at the end stay taken for a while
    gate.clear()
    handles = [engine.prefetch(TOKENS, salt="closing") for _ in range(3)]
    engine.close(timeout_s=0.2)
    gate.set()
    for handle in handles:
        assert handle.wait() == 0
        assert handle.done
    assert engine.prefetch(TOKENS, new_tensors(NUM_BLOCKS)).wait() == 0


def test_without_store_or_server_it_ends_at_once(runtime_dir, open_engine):
    config = VCacheConfig(runtime_dir=str(runtime_dir), client={"connect_timeout": "10ms"})
    engine = open_engine(config, kv_caches=new_tensors(NUM_BLOCKS))
    handle = engine.prefetch(TOKENS)
    assert handle.done
    assert handle.wait() == 0


def test_it_needs_to_know_the_form_of_the_tensors(configured, open_engine):
    engine = open_engine(configured())
    with pytest.raises(ValueError, match="kvcaches must be given"):
        engine.prefetch(TOKENS)
    scheduler = open_engine(configured(), role="scheduler")
    with pytest.raises(ValueError, match="role='worker'"):
        scheduler.prefetch(TOKENS)
    store_below(engine)
    assert engine.prefetch(TOKENS, new_tensors(NUM_BLOCKS)).wait() == 4


@pytest.mark.slow
def test_from_mooncake_whose_owner_then_dies(start_server, start_donor, open_engine, processes):
    mooncake = Mooncake(processes)
    mooncake.start_master()
    owner = mooncake.start_owner()
    config, _ = start_server(
        store={"mooncake": {"master": mooncake.address}, "staging_size": "64MiB"}, client={"call_timeout": "20s"}
    )
    start_donor(config)
    engine = open_engine(config, model=model_of(), kv_caches=new_tensors(NUM_BLOCKS))
    until(lambda: engine.get_stats()["store_process_joins"], "Mooncake's process has joined its store")
    tensors = new_tensors(NUM_BLOCKS)
    fill(tensors, TOKENS, HERE)

    def is_in_the_store_alone() -> bool:
        engine.store(TOKENS, kvcaches=tensors, slot_mapping=slots_of(HERE))
        return bool(engine.flush() and engine.clear() == 4 and engine.lookup(TOKENS) == 32)

    until(is_in_the_store_alone, "the chunks are in the store, once its circuit is closed")
    assert engine.prefetch(TOKENS).wait() == 4
    owner.kill()
    assert retrieve(engine) == 32
    assert engine.get_stats()["store_hits"] == 0
