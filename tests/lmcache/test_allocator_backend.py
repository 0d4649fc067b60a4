"""VCacheAllocatorBackend inside a real LMCacheEngine: chunks are computed into the segment and read out of it, and nothing goes wrong."""

from __future__ import annotations

import asyncio
import itertools
import random
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from lmcache.utils import CacheEngineKey
from lmcache.v1.storage_backend.storage_manager import StorageManager
from vcache_lmcache import VCacheAllocatorBackend, VCacheBackend
from vcache_lmcache.segment_objects import SegmentObject

from tests.lmcache.conftest import PATIENT
from tests.lmcache.engines import CHUNK_TOKENS, PROMPT, Engine, metadata, plugin_config
from tests.pool.payloads import until
from tests.support.processes import Child
from vcache.config import VCacheConfig

OpenEngine = Callable[..., Engine]


def settings(options: dict[str, Any]) -> dict[str, Any]:
    """The plugin under the name that makes it LMCache's allocator."""
    return {
        "max_local_cpu_size": 0,
        "storage_plugins": "LocalCPUBackend",
        "extra_config": {
            "storage_plugin.LocalCPUBackend.module_path": "vcache_lmcache",
            "storage_plugin.LocalCPUBackend.class_name": "VCacheAllocatorBackend",
            "vcache": {**PATIENT, **options},
        },
    }


@pytest.fixture
def open_engine(runtime_dir, monkeypatch: pytest.MonkeyPatch) -> Iterator[OpenEngine]:
    monkeypatch.setenv("PYTHONHASHSEED", "0")
    opened: list[Engine] = []

    def open_one(options: dict[str, Any] | None = None, *, is_allocator: bool = True, **more: Any) -> Engine:
        own = settings(options or {"donate": "16MiB"}) if is_allocator else {}
        opened.append(Engine(f"engine {len(opened)}", options or {}, **{**own, **more}))
        return opened[-1]

    yield open_one
    for engine in reversed(opened):
        engine.close()


def backend(engine: Engine) -> VCacheAllocatorBackend:
    found = engine.manager.allocator_backend
    assert isinstance(found, VCacheAllocatorBackend)
    return found


def keys_of(engine: Engine, tokens: list[int] = PROMPT) -> list[Any]:
    return [key for _, _, key in engine.lmcache.token_database.process_tokens(tokens=tokens)]


def addresses(engine: Engine) -> range:
    segment = backend(engine)._pool.donor.segment  # type: ignore[union-attr] # it donates
    return range(segment.memory.address, segment.memory.address + segment.nbytes)


def is_idle(engine: Engine) -> bool:
    """Nothing is held, and what is reserved is spare."""
    own = backend(engine)
    assert own._pool.donor is not None and own._space is not None
    stats = own._pool.stats()
    spare = sum(len(extents) for extents in own._space._spare.values())
    return not len(own._pool.donor.holds) and stats is not None and (stats.reservations, stats.leases) == (spare, 0)


def test_what_was_computed_into_the_segment_is_retrieved_by_every_engine(
    server: Child, open_engine: OpenEngine
) -> None:
    engine, other = open_engine(), open_engine(is_allocator=False)
    assert list(engine.manager.storage_backends) == ["LocalCPUBackend"]
    kv = engine.store(PROMPT)
    assert engine.lmcache.lookup(PROMPT) == len(PROMPT)
    until(lambda: other.lmcache.lookup(PROMPT) == len(PROMPT), "the server reads the commit")
    for each in (engine, other):
        loaded, found = each.retrieve(PROMPT)
        assert loaded == len(PROMPT) and torch.equal(found, kv)
    assert engine.retrieve([7] * len(PROMPT))[0] == 0
    until(lambda: is_idle(engine), "every reference is given back")


def test_a_chunk_is_read_where_it_was_computed(server: Child, open_engine: OpenEngine) -> None:
    engine = open_engine()
    own = backend(engine)
    shapes, dtypes = metadata().get_shapes(), metadata().get_dtypes()
    objs = own.batched_allocate(shapes, dtypes, 2)
    assert objs is not None
    for at, obj in enumerate(objs):
        obj.tensor.fill_(at + 1)
    before = [obj.data_ptr for obj in objs]
    assert all(address in addresses(engine) for address in before)
    keys = keys_of(engine)[:2]
    own.batched_submit_put_task(keys, objs)
    assert own.batched_contains(keys) == 2
    found = own.batched_get_blocking(keys)
    assert [obj.data_ptr for obj in found if obj is not None] == before
    assert [obj.get_ref_count() for obj in found if obj is not None] == [1, 1]
    assert [float(obj.tensor.float().mean()) for obj in found if obj is not None] == [1.0, 2.0]
    assert own._pool.donor is not None and len(own._pool.donor.holds) == 2
    assert objs[0].get_ref_count() == 1, "LMCache has not let go of what it has put"
    for obj in [*found, *objs]:
        assert obj is not None
        obj.ref_count_down()
    assert is_idle(engine)


def test_what_is_referenced_stays_what_it_is_though_it_is_evicted(server: Child, open_engine: OpenEngine) -> None:
    engine = open_engine({"donate": "1MiB", "segment": {"records": 64}})
    own = backend(engine)
    kv = engine.store(PROMPT[:CHUNK_TOKENS])
    key = keys_of(engine, PROMPT[:CHUNK_TOKENS])[0]
    obj = own.get_blocking(key)
    assert isinstance(obj, SegmentObject)
    fillers = itertools.count()

    def is_evicted() -> bool:
        start = next(fillers)
        engine.store(list(range(start, start + CHUNK_TOKENS)), seed=start + 2)
        return own.batched_contains([key]) == 0

    until(is_evicted, "pressure")
    for _ in range(64):  # whatever is written now is written elsewhere
        is_evicted()
    assert torch.equal(obj.tensor, kv[:, :, :CHUNK_TOKENS])
    obj.ref_count_down()
    until(lambda: is_idle(engine), "it is retired")


def test_what_this_process_stored_is_read_without_a_call_and_what_is_gone_is_not_found(
    server: Child, open_engine: OpenEngine
) -> None:
    engine, other = open_engine(), open_engine(is_allocator=False)
    own, keys = backend(engine), keys_of(engine)
    engine.store(PROMPT)
    assert own.batched_contains(keys) == len(keys)
    before = own._pool.client.counters["calls"]
    for obj in own.batched_get_blocking(keys):
        assert obj is not None
        obj.ref_count_down()
    assert own._pool.client.counters["calls"] == before
    assert other.plugin.remove(keys[1])
    found = own.batched_get_blocking(keys)
    assert [obj is not None for obj in found] == [True, False, True, True]
    for obj in found:
        if obj is not None:
            obj.ref_count_down()
    assert other.lmcache.clear() == 3 * CHUNK_TOKENS
    assert own.batched_get_blocking(keys) == [None] * 4
    until(lambda: is_idle(engine), "every reference is given back")


def test_what_lies_in_another_segment_is_copied(server: Child, open_engine: OpenEngine) -> None:
    kv = open_engine({"donate": "16MiB"}, is_allocator=False).store(PROMPT)
    reader = open_engine()
    until(lambda: reader.lmcache.lookup(PROMPT) == len(PROMPT), "the server reads the commit")
    loaded, found = reader.retrieve(PROMPT)
    assert loaded == len(PROMPT) and torch.equal(found, kv)
    until(lambda: is_idle(reader), "every reference is given back")


@pytest.mark.slow
def test_the_asynchronous_calls_answer_the_leading_run(server: Child, open_engine: OpenEngine) -> None:
    engine = open_engine()
    engine.store(PROMPT)
    own, keys = backend(engine), keys_of(engine)
    own.remove(keys[2])
    assert asyncio.run(own.batched_async_contains("lookup", keys, pin=True)) == 2
    objs = asyncio.run(own.batched_get_non_blocking("lookup", keys))
    assert len(objs) == 2
    for obj in objs:
        obj.ref_count_down()
    until(lambda: is_idle(engine), "every reference is given back")
    assert own.calculate_chunk_budget() > len(PROMPT) // CHUNK_TOKENS and engine.manager.memcheck()


@pytest.mark.slow
def test_pins_clear_and_partial_chunks_work_as_without(server: Child, open_engine: OpenEngine) -> None:
    engine = open_engine(save_unfull_chunk=True)
    own, tokens = backend(engine), PROMPT[: 2 * CHUNK_TOKENS + 5]
    kv = engine.store(tokens)
    loaded, found = engine.retrieve(tokens)
    assert loaded == len(tokens) and torch.equal(found[:, :, :loaded], kv[:, :, :loaded])
    assert engine.lmcache.lookup(tokens, lookup_id="request", pin=True) == len(tokens)
    engine.lmcache.lookup_unpin("request")
    (first, *_) = keys_of(engine, tokens)
    assert own.pin(first) and own.unpin(first)
    assert engine.lmcache.clear() == 3 * CHUNK_TOKENS, "in whole chunks"
    assert engine.lmcache.lookup(tokens) == 0
    until(lambda: is_idle(engine), "every reference is given back")


def test_after_a_clear_it_stores_again(server: Child, open_engine: OpenEngine) -> None:
    engine = open_engine()
    for _ in range(3):
        engine.store(PROMPT)
        assert engine.lmcache.lookup(PROMPT) == len(PROMPT)
        assert engine.lmcache.clear() == len(PROMPT)


def test_what_is_put_stays_what_it_is_while_lmcache_refers_to_it(server: Child, open_engine: OpenEngine) -> None:
    """Stored or not."""
    engine = open_engine()
    own, (key, *_) = backend(engine), keys_of(engine)
    objs = []
    for at in range(3):
        obj = own.allocate(metadata().get_shapes(), metadata().get_dtypes())
        assert obj is not None
        obj.tensor.fill_(at)
        own.batched_submit_put_task([key], [obj])
        objs.append(obj)
    assert own.batched_contains([key]) == 1
    removed: list[bool] = []
    removing = threading.Thread(target=lambda: removed.append(own.remove(key)))
    removing.start()
    until(lambda: own.batched_contains([key]) == 0, "it is removed")
    engine.store(PROMPT)
    assert not removed, "memory has it still"
    assert [float(obj.tensor.float().mean()) for obj in objs] == [0.0, 1.0, 2.0]
    for obj in objs:
        obj.ref_count_down()
    removing.join(60)
    assert removed == [True]
    until(lambda: is_idle(engine), "it is retired")


def test_a_chunk_that_is_there_already_is_not_stored_again(server: Child, open_engine: OpenEngine) -> None:
    engine = open_engine()
    kv = engine.store(PROMPT)
    assert engine.lmcache.lookup(PROMPT) == len(PROMPT)
    engine.store(PROMPT, seed=2)
    loaded, found = engine.retrieve(PROMPT)
    assert loaded == len(PROMPT) and torch.equal(found, kv)
    until(lambda: is_idle(engine), "every reference is given back")


@pytest.mark.slow
def test_without_a_server_nothing_is_stored_and_nothing_waits(open_engine: OpenEngine) -> None:
    engine = open_engine({"client": {"connect_timeout": "10ms"}, "donate": "16MiB"})
    engine.store(PROMPT)
    assert engine.lmcache.lookup(PROMPT) == 0 and engine.retrieve(PROMPT)[0] == 0


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"extra_config": {}}, "extra_config.vcache.donate"),
        ({"extra_config": {"device": "cuda:0", "donate": "16MiB"}}, "device = 'cuda:0'"),
        ({"max_local_cpu_size": 1.0}, "max_local_cpu_size = 1.0"),
        ({"storage_plugins": "vcache"}, "under the name LocalCPUBackend"),
    ],
)
def test_what_cannot_work_ends_the_process(runtime_dir, change: dict[str, Any], named: str) -> None:
    from lmcache.v1.event_manager import EventManager

    own = settings({"donate": "16MiB"})
    if "extra_config" in change:
        change = {"extra_config": {**own["extra_config"], "vcache": change["extra_config"]}}
    if "storage_plugins" in change:
        extra = {name.replace("LocalCPUBackend", "vcache"): value for name, value in own["extra_config"].items()}
        change = {**change, "extra_config": extra}
    with pytest.raises(SystemExit, match=named):
        StorageManager(plugin_config({}, **{**own, **change}), metadata(), EventManager())


def test_a_schedulers_process_donates_nothing_and_looks_things_up(server: Child, open_engine: OpenEngine) -> None:
    from lmcache.v1.event_manager import EventManager

    engine = open_engine()
    engine.store(PROMPT)
    assert engine.lmcache.lookup(PROMPT) == len(PROMPT)
    scheduler = StorageManager(
        plugin_config({}, **settings({"donate": "16MiB"})), replace(metadata(), role="scheduler"), EventManager()
    )
    try:
        found = scheduler.storage_backends["LocalCPUBackend"]
        assert found._pool.donor is None
        until(lambda: scheduler.batched_contains(keys_of(engine))[0] == 4, "the server reads the commit")
        assert found.batched_get_blocking(keys_of(engine)) == [None] * 4
    finally:
        scheduler.close()


@pytest.mark.slow
def test_no_byte_of_a_referenced_chunk_changes_under_pressure_removal_and_restart(
    start_server: Callable[..., tuple[VCacheConfig, Child]], open_engine: OpenEngine
) -> None:
    """Threads that store and read, in a segment with fewer records than chunks; writes of another client come in between."""
    _, server = start_server(**PATIENT)
    engine, other = open_engine({"donate": "1MiB", "segment": {"records": 64}}), open_engine(is_allocator=False)
    own, foreign = backend(engine), other.plugin
    form = metadata().get_shapes(), metadata().get_dtypes()
    names = [CacheEngineKey("model", 1, 0, at, torch.bfloat16) for at in range(96)]
    checked = [0] * 4
    wrong: list[int] = []
    over = threading.Event()

    def put(into: VCacheBackend, at: int) -> None:
        obj = into.get_allocator_backend().allocate(*form, busy_loop=False)
        if obj is not None:
            obj.tensor.fill_(at)
            into.batched_submit_put_task([names[at]], [obj])
            obj.ref_count_down()

    def work(number: int) -> None:
        draw = random.Random(number)
        while not over.is_set():
            at = draw.randrange(len(names))
            if draw.random() < 0.4:
                put(foreign if number == 3 else own, at)
                continue
            run = [at, draw.randrange(len(names))]
            found = own.batched_get_blocking([names[each] for each in run])
            for _ in range(draw.randrange(3)):
                put(own, draw.randrange(len(names)))
            for each, obj in zip(run, found, strict=True):
                if obj is not None:
                    checked[number] += 1
                    if not bool((obj.tensor == each).all()):
                        wrong.append(each)
                    obj.ref_count_down()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    until(lambda: min(checked) > 100, "every thread has read")
    foreign.batched_remove(names[:48])
    server.kill()
    start_server(**PATIENT)
    before = list(checked)
    until(lambda: all(now > then + 100 for now, then in zip(checked, before, strict=True)), "and reads again")
    over.set()
    for thread in threads:
        thread.join()
    assert not wrong
    until(lambda: is_idle(engine), "every reference is given back")
