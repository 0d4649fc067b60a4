"""How an engine begins and ends: without a server, closed twice, closed under load, with and without a segment."""

from __future__ import annotations

import threading
import weakref

import numpy as np
import pytest

from tests.engine.conftest import eventually
from tests.engine.kv import CHUNK, fill, model_of, new_tensors, slots_of, wrong_blocks
from vcache.config import VCacheConfig
from vcache.engine import VCacheEngine
from vcache.errors import CapacityError
from vcache.server_query import fetch_stats

TOKENS = list(range(4 * CHUNK))
HERE, THERE = list(range(8)), list(range(20, 28))


def stored(engine, tokens=TOKENS):
    tensors = new_tensors(64)
    fill(tensors, tokens, HERE)
    engine.store(tokens, kvcaches=tensors, slot_mapping=slots_of(HERE))


def loaded(engine, tokens=TOKENS):
    """Tokens loaded; every byte is checked."""
    tensors = new_tensors(64)
    result = engine.retrieve(tokens, kvcaches=tensors, slot_mapping=slots_of(THERE))
    assert wrong_blocks(tensors, tokens, THERE, result.tolist()) == []
    return int(result.sum())


def test_without_a_server_an_engine_is_an_empty_cache_until_one_comes(runtime_dir, processes):
    config = VCacheConfig(client={"connect_timeout": "50ms"}, server={"heartbeat_interval": "100ms"})
    with VCacheEngine(config, model=model_of(), donate="2MiB") as engine:
        assert engine.get_stats()["server_available"] is False
        stored(engine)
        assert engine.lookup(TOKENS) == 0
        assert loaded(engine) == 0
        assert engine.contains(engine.keys_of(TOKENS)[0]) == -1
        assert (engine.remove_keys(engine.keys_of(TOKENS)), engine.clear()) == (-1, -1)
        assert engine.get_stats()["unconfirmed_removals"] == 2
        assert not engine.flush(0.05)
        processes.server(config)
        eventually(
            lambda: fetch_stats(config, timeout_s=5).segments != [], "the engine gives its segment to the new server"
        )
        eventually(lambda: stored(engine) or engine.lookup(TOKENS) == 32, "the engine stores")
        assert loaded(engine) == 32


def test_closing_twice_is_harmless_and_leaves_an_empty_cache(pool):
    engine = VCacheEngine(pool, model=model_of())
    stored(engine)
    engine.close()
    engine.close()
    stored(engine)
    assert (engine.lookup(TOKENS), loaded(engine), engine.contains(bytes(16))) == (0, 0, -1)
    assert engine.get_stats()["server_available"] is False


def test_a_closed_engine_takes_calls_about_tensors_it_has_let_go_of(pool):
    tensors = new_tensors(64)
    alive = weakref.ref(tensors["layer.0"])
    engine = VCacheEngine(pool, model=model_of(), kv_caches=tensors)
    slots = slots_of(HERE)
    engine.store(TOKENS, slot_mapping=slots)
    engine.close()
    del tensors
    assert alive() is None
    engine.store(TOKENS, slot_mapping=slots)
    assert not engine.retrieve(TOKENS, slot_mapping=slots).any()
    assert engine.begin_retrieve(engine.keys_of(TOKENS), HERE).complete() == 0
    assert engine.begin_store(engine.keys_of(TOKENS), HERE).complete() == 0
    assert engine.prefetch(TOKENS).wait(5) == 0
    with pytest.raises(ValueError, match="slot_mapping"):
        engine.store(TOKENS, slot_mapping=slots + 1)


def test_a_closed_engine_leaves_nothing_behind(config, server, runtime_dir):
    with VCacheEngine(config, model=model_of(), donate="2MiB") as engine:
        stored(engine)
        assert len(list(runtime_dir.glob("segment-*"))) == 1
        assert len(list(runtime_dir.glob("client-*"))) == 1
    assert list(runtime_dir.glob("segment-*")) == []
    assert list(runtime_dir.glob("client-*")) == []
    stats = fetch_stats(config, timeout_s=5)
    assert (stats.entries, stats.sessions, stats.segments) == (0, 0, [])


def test_closing_while_others_call_ends_their_calls_well(pool):
    engine = VCacheEngine(pool, model=model_of())
    stored(engine)
    begun = threading.Barrier(5)
    problems = []

    def read():
        begun.wait()
        try:
            counts = [loaded(engine) for _ in range(50)]
            assert set(counts) <= {0, 32}
            assert counts == sorted(counts, reverse=True)
        except BaseException as error:
            problems.append(error)

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    begun.wait()
    engine.close()
    for thread in threads:
        thread.join()
    assert problems == []


def test_a_load_that_is_never_completed_keeps_the_session_and_nothing_else(config, server, runtime_dir, start_donor):
    start_donor(config)
    with VCacheEngine(config, model=model_of()) as other:
        stored(other)
    tensors = new_tensors(64)
    engine = VCacheEngine(config, model=model_of(), kv_caches=tensors, donate="2MiB")
    pending = engine.begin_retrieve(engine.keys_of(TOKENS), np.reshape(THERE, (4, 2)))
    assert [read.hits for read, _ in pending.reads] == [4]
    engine.close(1.0)
    assert engine.lookup(TOKENS) == 0
    assert len(list(runtime_dir.glob("segment-*"))) == 1, "the stand-alone donor's"
    assert len(list(runtime_dir.glob("client-*"))) == 1
    assert pending.complete() == 4
    assert wrong_blocks(tensors, TOKENS, THERE, [True] * 32) == []
    engine.close()
    assert list(runtime_dir.glob("client-*")) == []


def test_a_store_that_is_completed_after_its_engine_has_closed_is_harmless(config, server, runtime_dir):
    tensors = new_tensors(64)
    fill(tensors, TOKENS, HERE)
    engine = VCacheEngine(config, model=model_of(), kv_caches=tensors, donate="2MiB")
    pending = engine.reserve_store(engine.keys_of(TOKENS))
    assert [len(write.granted) for write in pending.writes] == [4]
    engine.close(1.0)
    pending.copy_from(
        np.reshape(HERE, (4, 2))
    )  # into the donated segment, which stays as long as somebody writes to it
    assert pending.complete() in (0, 4)
    engine.close()
    assert list(runtime_dir.glob("client-*")) == []


def test_a_segment_larger_than_memory_is_refused_with_both_numbers(config, server, runtime_dir):
    with pytest.raises(CapacityError, match=r"\d+.*\d+"):
        VCacheEngine(config, model=model_of(), donate=1 << 50)
    assert list(runtime_dir.glob("segment-*")) == []
    assert list(runtime_dir.glob("client-*")) == []
    assert fetch_stats(config, timeout_s=5).segments == []


@pytest.mark.parametrize(("level", "said"), [("DEBUG", True), (None, False)])
def test_the_log_level_of_the_environment_reaches_the_engine_s_log(pool, processes, level, said):
    program = (
        "from tests.engine.kv import model_of\n"
        "from vcache.engine import VCacheEngine\n"
        "with VCacheEngine(model=model_of(), role='scheduler') as engine:\n"
        "    engine.lookup([1] * 8)\n"
    )
    child = processes.python("-c", program, config=pool, extra={"VCACHE_LOG_LEVEL": level} if level else None)
    assert child.wait() == 0, child.report()
    assert ("lookup: 0 of 1 chunks" in child.log.read_text()) is said
