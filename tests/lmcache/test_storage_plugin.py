"""VCacheBackend inside a real LMCacheEngine: what one process stored, another loads, and what fails is a miss."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from lmcache.v1.memory_management import MemoryFormat
from lmcache.v1.storage_backend.storage_manager import StorageManager
from vcache_lmcache.keys import layout_word
from vcache_lmcache.storage_plugin import Forms

from tests.lmcache.engines import CHUNK_TOKENS, PROMPT, Engine, metadata, plugin_config
from tests.pool.payloads import until
from tests.support.processes import Child, Processes
from vcache.config import VCacheConfig
from vcache.protocol import ServerStats

OpenEngine = Callable[..., Engine]


@pytest.fixture
def open_engine(runtime_dir, monkeypatch: pytest.MonkeyPatch) -> Iterator[OpenEngine]:
    monkeypatch.setenv("PYTHONHASHSEED", "0")
    opened: list[Engine] = []

    def open_one(options: dict[str, object] | None = None, **settings: object) -> Engine:
        opened.append(Engine(f"engine {len(opened)}", options or {}, **settings))
        return opened[-1]

    yield open_one
    for engine in reversed(opened):
        engine.close()


@pytest.fixture
def two_engines(server: Child, open_engine: OpenEngine) -> tuple[Engine, Engine]:
    """The first donates the pool's only segment; neither keeps anything of its own."""
    return open_engine({"donate": "16MiB"}), open_engine()


def test_what_one_engine_stored_another_retrieves_bit_by_bit(two_engines: tuple[Engine, Engine]) -> None:
    one, two = two_engines
    kv = one.store(PROMPT)
    assert one.lmcache.lookup(PROMPT) == len(PROMPT)
    until(lambda: two.lmcache.lookup(PROMPT) == len(PROMPT), "the server reads the commit")
    assert two.lmcache.lookup([*PROMPT[: 2 * CHUNK_TOKENS], *range(2 * CHUNK_TOKENS)]) == 2 * CHUNK_TOKENS
    for engine in (one, two):
        loaded, found = engine.retrieve(PROMPT)
        assert loaded == len(PROMPT) and torch.equal(found, kv)
        assert engine.objects_in_use() == 0
    assert two.retrieve([7] * len(PROMPT))[0] == 0


@pytest.mark.slow
def test_what_left_the_local_cache_comes_back_from_the_pool(server: Child, open_engine: OpenEngine) -> None:
    engine = open_engine({"donate": "16MiB"}, local_cpu=True)
    kv = engine.store(PROMPT)
    engine.plugin.batched_contains(engine_keys(engine))  # the put is done
    assert engine.lmcache.clear(locations=["LocalCPUBackend"])
    loaded, found = engine.retrieve(PROMPT)
    assert loaded == len(PROMPT) and torch.equal(found, kv)


@pytest.mark.slow
def test_a_partial_last_chunk_comes_back_with_its_own_length(server: Child, open_engine: OpenEngine) -> None:
    engine = open_engine({"donate": "16MiB"}, save_unfull_chunk=True)
    tokens = PROMPT[: 2 * CHUNK_TOKENS + 5]
    kv = engine.store(tokens)
    loaded, found = engine.retrieve(tokens)
    assert loaded == len(tokens) and torch.equal(found[:, :, :loaded], kv[:, :, :loaded])


def test_a_batch_is_looked_up_and_loaded_without_a_call_to_the_server(two_engines: tuple[Engine, Engine]) -> None:
    engine, _ = two_engines
    engine.store(PROMPT)
    keys = engine_keys(engine)
    assert engine.plugin.batched_contains(keys) == len(keys)
    calls = engine.plugin._pool.client.counters
    before = calls["calls"]
    assert engine.plugin.batched_contains(keys) == len(keys)
    assert calls["calls"] == before
    for obj in engine.plugin.batched_get_blocking(keys):
        assert obj is not None and obj.get_ref_count() == 1
        obj.ref_count_down()
    assert calls["calls"] == before


@pytest.mark.slow
def test_the_asynchronous_calls_answer_the_leading_run(two_engines: tuple[Engine, Engine]) -> None:
    engine, _ = two_engines
    engine.store(PROMPT)
    keys = engine_keys(engine)
    engine.plugin.remove(keys[2])
    assert asyncio.run(engine.plugin.batched_async_contains("lookup", keys, pin=True)) == 2
    objs = asyncio.run(engine.plugin.batched_get_non_blocking("lookup", keys))
    assert len(objs) == 2 == engine.objects_in_use()
    for obj in objs:
        obj.ref_count_down()
    assert engine.objects_in_use() == 0


@pytest.mark.slow
def test_pinned_chunks_outlive_the_pressure_that_evicts_the_others(server: Child, open_engine: OpenEngine) -> None:
    engine = open_engine({"donate": "1MiB", "segment": {"records": 64}})

    def server_stats() -> ServerStats:
        stats = engine.plugin._pool.stats()
        assert stats is not None
        return stats

    pinned, leased = PROMPT[:CHUNK_TOKENS], PROMPT[CHUNK_TOKENS : 2 * CHUNK_TOKENS]
    unpinned = PROMPT[2 * CHUNK_TOKENS : 3 * CHUNK_TOKENS]
    for tokens in (pinned, leased, unpinned):
        engine.store(tokens)
    (key,) = engine_keys(engine, pinned)
    assert engine.plugin.pin(key)
    assert engine.lmcache.lookup(leased, lookup_id="request", pin=True) == CHUNK_TOKENS
    fillers = itertools.count()

    def has_pressed() -> bool:
        start = next(fillers)
        engine.store(list(range(start, start + CHUNK_TOKENS)))
        return server_stats().counters["evicted"] > 0  # the least recently used first

    until(has_pressed, "pressure")
    assert engine.lmcache.lookup(pinned) == engine.lmcache.lookup(leased) == CHUNK_TOKENS
    assert engine.lmcache.lookup(unpinned) == 0
    engine.lmcache.lookup_unpin("request")
    until(lambda: server_stats().leases == 0, "the end of the lookup's lease")
    assert engine.plugin.unpin(key) and not engine.plugin.unpin(key)
    assert server_stats().pins == 0


def test_clear_removes_what_lmcache_stored_of_this_model_and_nothing_else(
    server: Child, open_engine: OpenEngine
) -> None:
    one, other = open_engine({"donate": "16MiB"}), open_engine({"namespace": "other revision"})
    one.store(PROMPT)
    other.store(PROMPT)
    assert one.lmcache.lookup(PROMPT) == other.lmcache.lookup(PROMPT) == len(PROMPT)
    assert one.lmcache.clear(PROMPT[:CHUNK_TOKENS]) == 1
    assert one.lmcache.lookup(PROMPT) == 0
    assert one.manager.clear(["vcache"]) == len(PROMPT) - CHUNK_TOKENS
    assert other.lmcache.lookup(PROMPT) == len(PROMPT)


def test_a_removal_that_was_not_confirmed_is_no_removal_of_nothing(
    runtime_dir, open_engine: OpenEngine, caplog: pytest.LogCaptureFixture
) -> None:
    engine = open_engine({"client": {"connect_timeout": "10ms"}})  # and no server
    keys = engine_keys(engine)
    assert engine.plugin.batched_remove(keys) == 0
    assert "remove failed (UnavailableError: not confirmed by all" in caplog.text
    assert engine.plugin.clear() == 0
    assert "clear failed (UnavailableError: not confirmed by all" in caplog.text


@pytest.mark.parametrize(
    ("use_mla", "kv", "fmt"), [(False, 2, MemoryFormat.KV_2LTD), (True, 1, MemoryFormat.KV_MLA_FMT)]
)
def test_a_payload_is_known_by_its_size_and_layout_word(use_mla: bool, kv: int, fmt: MemoryFormat) -> None:
    forms = Forms(replace(metadata(), use_mla=use_mla, kv_shape=(3, kv, CHUNK_TOKENS, 1, 8)))
    for tokens in (CHUNK_TOKENS, 5):
        shape = torch.Size([kv, 3, tokens, 8])
        word = layout_word([shape], [torch.bfloat16], fmt)
        assert forms.of(shape.numel() * 2, word) == ([shape], [torch.bfloat16], fmt)
        assert forms.of(shape.numel() * 2, word + 1) is None
        assert forms.of(shape.numel() * 2 + 1, word) is None


@pytest.mark.slow
def test_payloads_of_another_form_are_misses(server: Child, open_engine: OpenEngine) -> None:
    engine = open_engine({"donate": "16MiB"})
    engine.store(PROMPT)
    keys = engine_keys(engine)
    engine.plugin._forms._metadata = metadata(torch.float16)  # the same size, other numbers
    assert engine.plugin.batched_get_blocking(keys) == [None] * len(keys)
    assert engine.objects_in_use() == 0


@pytest.mark.slow
def test_without_a_server_everything_is_a_miss(open_engine: OpenEngine) -> None:
    engine = open_engine({"client": {"connect_timeout": "10ms"}, "donate": "16MiB"})
    engine.store(PROMPT)
    assert engine.lmcache.lookup(PROMPT) == 0 and engine.retrieve(PROMPT)[0] == 0
    assert engine.lmcache.clear() == 0
    until(lambda: engine.objects_in_use() == 0, "the put gives its references back")


@pytest.mark.slow
def test_a_donor_killed_between_lookup_and_retrieve_costs_a_miss(
    server: Child, open_engine: OpenEngine, config: VCacheConfig, processes: Processes
) -> None:
    donor = processes.python("-m", "vcache.cli", "donate", "--device", "cpu:0", "--size", "16MiB", config=config)
    donor.expect("donating")
    engine = open_engine()
    engine.store(PROMPT)
    assert engine.lmcache.lookup(PROMPT) == len(PROMPT)
    donor.kill()
    until(lambda: engine.retrieve(PROMPT)[0] == 0, "the server misses the donor")
    assert engine.objects_in_use() == 0


@pytest.mark.parametrize(
    ("options", "settings", "named"),
    [
        ({"runtime_dirr": "/dev/shm/x"}, {}, "runtime_dirr"),
        ({"donate": "64TiB"}, {}, "64TiB|memory|bytes"),
        ({}, {"use_layerwise": True}, "use_layerwise = true"),
    ],
)
def test_what_cannot_work_ends_the_process_although_lmcache_only_logs_it(
    runtime_dir, options: dict[str, object], settings: dict[str, object], named: str
) -> None:
    from lmcache.v1.event_manager import EventManager

    with pytest.raises(SystemExit, match=named):
        StorageManager(plugin_config(options, **settings), metadata(), EventManager())


def engine_keys(engine: Engine, tokens: list[int] = PROMPT) -> list[object]:
    return [key for _, _, key in engine.lmcache.token_database.process_tokens(tokens=tokens)]
