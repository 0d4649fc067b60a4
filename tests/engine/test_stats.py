"""``get_stats``: documented names, and figures that follow what was done."""

from __future__ import annotations

import re
import time

import numpy as np

from tests.engine.kv import CHUNK, fill, model_of, new_tensors, slots_of
from tests.support.processes import REPOSITORY
from vcache.config import VCacheConfig
from vcache.engine import VCacheEngine

TOKENS = list(range(4 * CHUNK))
HERE = list(range(8))


def documented():
    text = (REPOSITORY / "docs" / "python-api.md").read_text().split("## `get_stats()`")[1]
    return re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)


def test_the_documentation_has_every_key_and_no_other(runtime_dir):
    with VCacheEngine(VCacheConfig(client={"connect_timeout": "10ms"}), model=model_of()) as engine:
        assert sorted(engine.get_stats()) == sorted(documented())


def test_a_store_adds_the_counters_of_its_own_page_and_no_other(runtime_dir, tmp_path):
    page = (REPOSITORY / "docs" / "stores.md").read_text().split("## Counters")[1].split("Of Mooncake:")[0]
    of_store = re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)
    config = VCacheConfig(client={"connect_timeout": "10ms"}, store={"files": {"directory": str(tmp_path)}})
    for role in ("worker", "scheduler"):
        with VCacheEngine(config, model=model_of(), role=role) as engine:
            assert sorted(engine.get_stats()) == sorted(documented() + of_store)


def test_keys_are_the_same_with_and_without_a_server(pool, open_engine):
    engine = open_engine(pool)
    with_server = engine.get_stats()
    engine.close()
    assert list(with_server) == list(engine.get_stats())


def test_figures_follow_what_was_done(pool, open_engine):
    tensors = new_tensors(64)
    fill(tensors, TOKENS, HERE)
    engine = open_engine(pool, kv_caches=tensors)
    before = engine.get_stats()
    assert before["server_available"] is True
    assert (before["server_segments"], before["pool_dram_bytes"] > 0, before["pool_vram_bytes"]) == (1, True, 0)

    engine.lookup(TOKENS)
    engine.retrieve(TOKENS, slot_mapping=slots_of(HERE))
    engine.store(TOKENS[:16], slot_mapping=slots_of(HERE[:4]))
    engine.store(TOKENS, slot_mapping=slots_of(HERE))
    engine.lookup(TOKENS)
    engine.retrieve(TOKENS, slot_mapping=slots_of(HERE))
    after = engine.get_stats()

    payload = 2 * 256 * len(tensors)
    expected = {
        "lookup_calls": 2,
        "lookup_chunks": 8,
        "lookup_hits": 4,
        "retrieve_calls": 2,
        "hits": 4,
        "misses": 4,
        "store_calls": 2,
        "stored": 4,
        "store_exists": 2,
        "store_lost": 0,
        "validation_failures": 0,
        "failures": 0,
        "dram_written_bytes": 4 * payload,
        "dram_read_bytes": 4 * payload,
        "vram_read_bytes": 0,
        "server_entries": 4,
        "evictions": 0,
    }
    assert {name: after[name] for name in expected} == expected
    for name in ("lookup_seconds", "retrieve_seconds", "store_seconds", "dram_read_seconds", "dram_written_seconds"):
        assert after[name] > 0
    assert after["pool_dram_used_bytes"] >= 4 * payload


def test_what_a_caller_does_between_asking_and_copying_is_not_time_spent_storing(pool, open_engine):
    tensors = new_tensors(64)
    fill(tensors, TOKENS, HERE)
    engine = open_engine(pool, kv_caches=tensors)
    began = time.perf_counter()
    pending = engine.reserve_store(engine.keys_of(TOKENS))
    paused = time.perf_counter()
    time.sleep(0.05)  # the forward pass, in a serving engine
    pause = time.perf_counter() - paused
    pending.copy_from(np.reshape(HERE, (4, -1)))
    assert pending.complete() == 4
    stats = engine.get_stats()
    assert stats["dram_written_seconds"] == stats["store_seconds"]
    assert 0 < stats["store_seconds"] < time.perf_counter() - began - pause
