"""What LMCache stored on one host, LMCache on another loads, through the transfer engine."""

from __future__ import annotations

import pytest
import torch
from vcache_lmcache import VCacheL2Adapter

from tests.lmcache.objects import Tasks, content, memory_object, object_key
from tests.pool.payloads import until
from tests.remote.conftest import Hosts, hosts, other_runtime_dir, until_announced  # noqa: F401 - fixtures
from vcache.config import VCacheConfig

pytestmark = pytest.mark.slow


def adapter_on(config: VCacheConfig) -> VCacheL2Adapter:
    return VCacheL2Adapter(config.model_dump(include={"runtime_dir", "server", "transfer", "client"}))


def test_an_adapter_loads_what_one_on_another_host_stored_and_no_other_form(hosts) -> None:  # noqa: F811
    both: Hosts = hosts()
    both.donate(both.there)
    there, here = adapter_on(both.there), adapter_on(both.here)
    try:
        until_announced(here._pool.client)
        keys = [object_key(index) for index in range(6)]
        stored = [memory_object(index) for index in range(6)]
        assert Tasks(there).store(keys, stored).is_successful()
        tasks = Tasks(here)
        until(lambda: tasks.lookup(keys) == [1] * 6, "the server reads the commit")
        loaded = [memory_object() for _ in keys]
        assert tasks.load(keys, loaded) == [1] * 6
        assert [content(obj) for obj in loaded] == [content(obj) for obj in stored]
        assert here._pool.client.counters["remote_hits"] == 6

        mixed = [memory_object(), memory_object(dtype=torch.float16), *(memory_object() for _ in keys[2:])]
        assert tasks.load(keys, mixed) == [1, 0, 1, 1, 1, 1]
        assert not any(content(mixed[1]))
    finally:
        here.close()
        there.close()
