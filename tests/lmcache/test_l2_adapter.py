"""VCacheL2Adapter against a real metadata server: what LMCache's controllers rely on."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import pytest
import torch
from lmcache.v1.distributed.api import ObjectKey
from lmcache.v1.distributed.internal_api import L2AdapterListener
from lmcache.v1.memory_management import MemoryFormat
from vcache_lmcache import VCacheL2Adapter

from tests.lmcache.conftest import PATIENT
from tests.lmcache.objects import Tasks, content, memory_object, object_key, open_adapter
from tests.pool.payloads import until
from tests.support.processes import Child, Processes
from vcache.config import VCacheConfig
from vcache.errors import ConfigError

OpenAdapter = Callable[..., VCacheL2Adapter]
StartServer = Callable[..., tuple[VCacheConfig, Child]]


@pytest.fixture
def open_l2(runtime_dir) -> Iterator[OpenAdapter]:
    opened: list[VCacheL2Adapter] = []

    def open_one(**options: object) -> VCacheL2Adapter:
        opened.append(open_adapter(**options))
        return opened[-1]

    yield open_one
    for adapter in reversed(opened):
        adapter.close()


def _until_found(tasks: Tasks, keys: list[ObjectKey]) -> None:
    until(lambda: tasks.lookup(keys) == [1] * len(keys), "the server reads the commit")


@pytest.fixture
def adapter(server: Child, open_l2: OpenAdapter) -> VCacheL2Adapter:
    """An adapter that donates the pool's only segment."""
    return open_l2(donate="16MiB")


class Listener(L2AdapterListener):  # type: ignore[misc] # LMCache is not followed by mypy
    def __init__(self) -> None:
        self.said: list[tuple[str, object]] = []

    def on_l2_keys_stored(self, keys, sizes):
        self.said.append(("stored", dict(zip(keys, sizes, strict=True))))

    def on_l2_keys_accessed(self, keys):
        self.said.append(("accessed", keys))

    def on_l2_keys_deleted(self, keys):
        self.said.append(("deleted", keys))


def test_another_process_of_the_pool_loads_what_one_stored_whatever_the_dtype(
    adapter: VCacheL2Adapter, open_l2: OpenAdapter
) -> None:
    ours, others = Tasks(adapter), Tasks(open_l2())
    fds = {adapter.get_store_event_fd(), adapter.get_lookup_and_lock_event_fd(), adapter.get_load_event_fd()}
    assert len(fds) == 3
    dtypes = [(torch.bfloat16, None), (torch.float16, torch.uint8), (torch.float32, None), (torch.uint8, None)]
    for number, (dtype, raw) in enumerate(dtypes):
        keys = [object_key((number, index)) for index in range(5)]
        stored = [memory_object(index, dtype=dtype, raw=raw) for index in range(5)]
        result = ours.store(keys, stored)
        assert result.is_successful() and result.bytes_transferred() == sum(obj.get_size() for obj in stored)
        _until_found(others, keys)
        loaded = [memory_object(dtype=dtype) for _ in keys]
        assert others.load(keys, loaded) == [1] * 5
        assert [content(obj) for obj in loaded] == [content(obj) for obj in stored]


def test_an_object_of_another_form_than_expected_is_a_miss_and_touches_nothing(adapter: VCacheL2Adapter) -> None:
    tasks, key = Tasks(adapter), object_key("chunk")
    tasks.store([key], [memory_object(1)])
    same_size = [
        memory_object(dtype=torch.float16),
        memory_object(shape=(2, 4, 32, 16)),
        memory_object(fmt=MemoryFormat.KV_2TD),
    ]
    for obj in [*same_size, memory_object(shape=(2, 4, 16, 64)), memory_object(shape=(2, 4, 16, 16))]:
        assert tasks.load([key], [obj]) == [0]
        assert not any(content(obj))
    assert tasks.load([key], [memory_object()]) == [1]


@pytest.mark.slow
def test_every_field_of_a_key_tells_objects_apart(adapter: VCacheL2Adapter, open_l2: OpenAdapter) -> None:
    tasks = Tasks(adapter)
    tasks.store([object_key("a")], [memory_object(1)])
    others = [object_key("b"), object_key("a", rank=1), object_key("a", salt="s"), object_key("a", group=1)]
    assert tasks.lookup([*others, object_key("a", model="other")]) == [0] * 5
    assert tasks.lookup([object_key("a")]) == [1]
    assert Tasks(open_l2(namespace="revision 2")).lookup([object_key("a")]) == [0]


def test_a_lookup_answers_for_each_key_by_itself_and_locks_what_is_there(adapter: VCacheL2Adapter) -> None:
    tasks = Tasks(adapter)
    rank_0, rank_1 = ([object_key(chunk, rank=rank) for chunk in range(4)] for rank in (0, 1))
    tasks.store(rank_0[:2] + rank_0[3:] + rank_1[:3], [memory_object(index) for index in range(6)])
    calls = adapter._pool.client.counters["calls"]
    assert tasks.lookup(rank_0 + rank_1) == [1, 1, 0, 1, 1, 1, 1, 0]
    assert adapter._pool.client.counters["calls"] == calls + 1
    assert adapter.report_status()["locked_keys"] == 6
    loaded = [memory_object() for _ in range(8)]
    assert tasks.load(rank_0 + rank_1, loaded) == [1, 1, 0, 1, 1, 1, 1, 0]
    adapter.submit_unlock(rank_0[1:] + rank_1)
    until(lambda: adapter.report_status()["locked_keys"] == 1, "the unlock")
    stats = adapter._pool.stats()
    assert stats is not None and stats.leases == 1, "one lease for the batch, while one of it is locked"
    adapter.submit_unlock(rank_0)
    until(lambda: (found := adapter._pool.stats()) is not None and found.leases == 0, "the end of the lease")


def test_a_batch_of_any_objects_of_one_form_is_stored_by_one_call(adapter: VCacheL2Adapter) -> None:
    """Of several prompts, ranks and salts: nothing says that one follows the other."""
    tasks = Tasks(adapter)
    keys = [object_key(at, rank=at % 2, salt="b" * (at % 3)) for at in range(4)]
    calls = adapter._pool.client.counters["calls"]
    assert tasks.store(keys[:1] + keys[3:], [memory_object(at) for at in range(2)]).is_successful()
    assert adapter._pool.client.counters["calls"] == calls + 1
    assert tasks.store(keys, [memory_object(at) for at in range(4)]).is_successful()
    donor = adapter._pool.donor
    assert donor is not None
    records = list(donor.segment.scan())
    assert len(records) == 4 and {record.parent for record in records} == {b""}


@pytest.mark.slow
def test_a_locked_object_outlives_the_pressure_that_evicts_the_others(adapter: VCacheL2Adapter) -> None:
    tasks, locked = Tasks(adapter), object_key("locked")
    big = (2, 4, 64, 1024)  # 1 MiB each
    stored = memory_object(7, shape=big)
    tasks.store([locked], [stored])
    assert tasks.lookup([locked]) == [1]
    fillers = itertools.count()

    def has_pressed() -> bool:
        index = next(fillers)
        tasks.store([object_key(("filler", index))], [memory_object(index, shape=big)])
        stats = adapter._pool.stats()
        return stats is not None and stats.counters["evicted"] > 0  # the least recently used first

    until(has_pressed, "pressure")
    loaded = memory_object(shape=big)
    assert tasks.load([locked], [loaded]) == [1] and content(loaded) == content(stored)
    assert tasks.lookup([object_key(("filler", 0))]) == [0]
    assert adapter.report_status()["locked_keys"] == 1
    adapter.submit_unlock([locked])
    until(lambda: adapter.report_status()["locked_keys"] == 0, "the unlock")


def test_listeners_usage_listing_and_deletion_agree(adapter: VCacheL2Adapter) -> None:
    tasks, listener = Tasks(adapter), Listener()
    adapter.register_listener(listener)
    keys = [object_key(index, salt="tenant") for index in range(5)]
    nbytes = memory_object().get_size()
    tasks.store(keys, [memory_object(index) for index in range(5)])
    assert tasks.store(keys[:2], [memory_object(index) for index in range(2)]).bytes_transferred() == 0
    assert listener.said == [("stored", dict.fromkeys(keys, nbytes))]

    usage = adapter.get_usage()
    assert usage.bytes_by_cache_salt == {"tenant": 5 * nbytes}
    assert 5 * nbytes <= usage.total_bytes_used < usage.total_capacity_bytes <= 16 << 20

    first = adapter.list_l2_keys(page_size=3)
    second = adapter.list_l2_keys(page_size=3, cursor=first.next_page_token)
    assert [entry.key.to_object_key() for entry in first.entries + second.entries] == keys
    assert second.next_page_token is None and {entry.size_bytes for entry in first.entries} == {nbytes}
    assert not adapter.list_l2_keys(model_name="other").entries
    with pytest.raises(ValueError, match="cursor = 'x'"):
        adapter.list_l2_keys(cursor="x")

    tasks.load(keys[:1], [memory_object()])
    adapter.delete([keys[0], object_key("unknown")])
    assert listener.said[1:] == [("accessed", keys[:1]), ("deleted", keys[:1])]
    assert tasks.lookup(keys[:1]) == [0] and tasks.lookup(keys[1:]) == [1] * 4
    assert adapter.get_usage().bytes_by_cache_salt == {"tenant": 4 * nbytes}


@pytest.mark.slow
def test_what_the_pool_lost_is_reported_deleted_by_the_lookup_that_misses_it(
    adapter: VCacheL2Adapter, open_l2: OpenAdapter
) -> None:
    tasks, other, listener = Tasks(adapter), open_l2(), Listener()
    adapter.register_listener(listener)
    tasks.store([object_key("a")], [memory_object(1)])
    _until_found(Tasks(other), [object_key("a")])
    other.delete([object_key("a")])
    assert tasks.lookup([object_key("a")]) == [0]
    assert listener.said[-1] == ("deleted", [object_key("a")])
    assert not adapter.list_l2_keys().entries


@pytest.mark.slow
def test_a_full_pool_fails_the_task_and_says_so(adapter: VCacheL2Adapter) -> None:
    too_large = memory_object(1, shape=(2, 4, 64, 32 * 1024))  # 32 MiB
    assert not Tasks(adapter).store([object_key("a")], [too_large]).is_successful()


def test_without_a_server_stores_fail_and_lookups_miss_at_once(runtime_dir) -> None:
    adapter = open_adapter(client={"connect_timeout": "10ms"}, donate="16MiB")
    try:
        tasks, key = Tasks(adapter), object_key("a")
        assert not tasks.store([key], [memory_object(1)]).is_successful()
        assert tasks.lookup([key]) == [0] and tasks.load([key], [memory_object()]) == [0]
        adapter.submit_unlock([key])
        adapter.delete([key])
        assert adapter.get_usage().total_bytes_used == 0
        assert adapter.report_status()["is_healthy"] is False
    finally:
        adapter.close()


@pytest.mark.slow
def test_a_killed_donor_makes_its_objects_misses(
    server: Child, open_l2: OpenAdapter, config: VCacheConfig, processes: Processes
) -> None:
    donor = processes.python("-m", "vcache.cli", "donate", "--device", "cpu:0", "--size", "16MiB", config=config)
    donor.expect("donating")
    adapter = open_l2()
    tasks, keys = Tasks(adapter), [object_key(index) for index in range(3)]
    assert tasks.store(keys, [memory_object(index) for index in range(3)]).is_successful()
    assert tasks.lookup(keys) == [1] * 3
    donor.kill()
    until(lambda: tasks.lookup(keys) == [0] * 3, "the server misses the donor")
    loaded = [memory_object() for _ in keys]
    assert tasks.load(keys, loaded) == [0] * 3


@pytest.mark.slow
def test_a_restarted_server_finds_again_what_donors_hold(
    start_server: StartServer, open_l2: OpenAdapter, processes: Processes
) -> None:
    config, first = start_server(**PATIENT)
    donor = processes.python("-m", "vcache.cli", "donate", "--device", "cpu:0", "--size", "16MiB", config=config)
    donor.expect("donating")
    tasks, keys = Tasks(open_l2()), [object_key(index) for index in range(3)]
    stored = [memory_object(index) for index in range(3)]
    assert tasks.store(keys, stored).is_successful()
    first.kill()
    assert tasks.lookup(keys) == [0] * 3
    start_server(**PATIENT)
    _until_found(tasks, keys)
    loaded = [memory_object() for _ in keys]
    assert tasks.load(keys, loaded) == [1] * 3
    assert [content(obj) for obj in loaded] == [content(obj) for obj in stored]


def test_a_narrowed_object_keeps_its_length(adapter: VCacheL2Adapter) -> None:
    tasks, key, stored, loaded = Tasks(adapter), object_key("serde"), memory_object(1), memory_object()
    stored.set_used_size(1000)
    tasks.store([key], [stored])
    assert tasks.load([key], [loaded]) == [1]
    assert loaded.get_size() == 1000 and bytes(loaded.byte_array) == content(stored)[:1000]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"chunk_sise": 128}, "chunk_sise"),
        ({"client": {"call_timeout": "soon"}}, "client.call_timeout"),
        ({"donate": "much"}, "donate = 'much'"),
        ({"chunk_size": 128}, "adapter_params.chunk_size: does not apply"),
        ({"store": {"kind": "files"}}, "adapter_params.store: does not apply"),
        ({"namespace": 3}, "adapter_params.namespace = 3"),
        ({"device": "tpu:0"}, "device = 'tpu:0'"),
    ],
)
def test_a_bad_option_fails_the_construction_and_is_named(runtime_dir, options: dict[str, object], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        VCacheL2Adapter(options)
