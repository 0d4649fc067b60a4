"""Fixtures of the stores' tests: a directory store, a guard with deadlines fit for tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.store.mooncake import Mooncake
from tests.support.processes import Processes
from vcache.config import VCacheConfig
from vcache.store import open_store
from vcache.store.base import Store
from vcache.store.files import FileStore
from vcache.store.guard import GuardedStore
from vcache.store.staging import Staging
from vcache.store_config import GuardConfig

#: Hangs of tests are as long as the test wants, so this need not be short for the test to be quick, only for the fault to show.
DEADLINE_S = 0.3
STAGING_BYTES = 8 << 20


@pytest.fixture
def file_store(tmp_path: Path) -> Iterator[FileStore]:
    store = FileStore(tmp_path / "store", size_limit=1 << 30)
    yield store
    store.close()


@pytest.fixture
def guarded() -> Iterator[Callable[..., GuardedStore]]:
    """Puts a guard with short deadlines around a store; closed afterwards."""
    guards: list[GuardedStore] = []

    def guard(store: Store, **settings: Any) -> GuardedStore:
        defaults = {
            "timeout": DEADLINE_S,
            "write_timeout": DEADLINE_S,
            "retry_delay": 0.001,
            "probe_interval": 0.02,
            "max_probe_interval": 0.1,
        }
        guards.append(GuardedStore(store, Staging(STAGING_BYTES), GuardConfig(**defaults | settings), name="test"))
        return guards[-1]

    yield guard
    for each in guards:
        each.close(timeout_s=5.0)


@pytest.fixture
def mooncake(processes: Processes) -> Mooncake:
    return Mooncake(processes)


@pytest.fixture
def opened(mooncake: Mooncake) -> Iterator[Callable[..., GuardedStore]]:
    """Opens stores on the test's Mooncake as an engine would; closed afterwards."""
    stores: list[GuardedStore] = []

    def open_one(guard: dict[str, Any] | None = None, **settings: Any) -> GuardedStore:
        quick = {"probe_interval": 0.1, "max_probe_interval": 0.5} | (guard or {})
        config = VCacheConfig(
            store={"mooncake": {"master": mooncake.address} | settings, "guard": quick, "staging_size": "64MiB"}
        )
        store = open_store(config.store)
        assert store is not None
        stores.append(store)
        return store

    yield open_one
    for store in stores:
        store.close(timeout_s=5.0)
