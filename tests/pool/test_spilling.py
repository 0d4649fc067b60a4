"""Victims that a donor writes to a real Mooncake before their space is reused, and a master that dies or hangs meanwhile."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.pool.conftest import QUICK
from tests.pool.payloads import NBYTES, load, new_keys, payload, store, until
from tests.pool.test_demotion import SERVER, counted
from tests.store.conftest import mooncake  # noqa: F401 - a fixture
from tests.store.mooncake import Mooncake, await_ready
from vcache.config import VCacheConfig
from vcache.keys import ChunkKey
from vcache.pool.client import PoolClient
from vcache.store import Got, Shard, open_store
from vcache.store.guard import GuardedStore

#: The donor's segment has room for about 30 chunks, and keeps half of them.
SIZE = "2MiB"


@pytest.fixture
def spilling(start_server, processes, mooncake: Mooncake) -> VCacheConfig:  # noqa: F811
    """A donor that writes its victims to the test's Mooncake, which has not been started yet."""
    config, _ = start_server(**{**QUICK, "server": SERVER})
    donor_config = VCacheConfig(
        runtime_dir=config.runtime_dir,
        server=SERVER,
        client=QUICK["client"],
        store={
            "write_policy": "evicted",
            "staging_size": "4MiB",
            "mooncake": {"master": mooncake.address},
            "guard": {"probe_interval": 0.1, "max_probe_interval": 0.5},
        },
    )
    donor = processes.python("-m", "vcache.cli", "donate", "--device", "cpu:0", "--size", SIZE, config=donor_config)
    donor.expect("donating")
    return donor_config


@pytest.fixture
def open_below() -> Iterator[Callable[[VCacheConfig], GuardedStore]]:
    """Opens the store that a donor writes to, as another process does."""
    stores: list[GuardedStore] = []

    def open_one(config: VCacheConfig) -> GuardedStore:
        below = open_store(config.store)
        assert below is not None
        stores.append(below)
        await_ready(below)
        return below

    yield open_one
    for below in stores:
        below.close(timeout_s=5.0)


def found_below(below: GuardedStore, keys: list[ChunkKey]) -> int:
    """How many of ``keys`` the store delivers; every byte is compared."""
    found = 0
    for key in keys:
        with below.load([Shard(key, 0)], [NBYTES]) as loaded:
            if loaded.results == [Got.LOADED]:
                assert loaded.buffer(0).numpy().tobytes() == payload(key), "WRONG BYTES in the store"
                found += 1
    return found


def store_more(client: PoolClient, keys: list[ChunkKey], count: int = 1) -> None:
    """Stores chunks, each as soon as the pool has room for it."""
    for _ in range(count):
        keys.extend(new_keys(1))
        until(lambda: store(client, keys[-1:]) == 1, "room in the pool")


def store_until(client: PoolClient, keys: list[ChunkKey], counter: str, least: int) -> None:
    """Stores chunks, which push others out, until the server has counted so many."""

    def is_counted() -> bool:
        store_more(client, keys)
        return counted(client, counter) >= least

    until(is_counted, counter)


def test_victims_are_in_mooncake_before_their_space_is_reused(spilling, mooncake, open_client, open_below):  # noqa: F811
    mooncake.start_master()
    mooncake.start_owner()
    client, below = open_client(spilling), open_below(spilling)
    keys: list[ChunkKey] = []
    store_until(client, keys, "spilled", 1)
    lost = counted(client, "demotion_failed")  # before the donor's own way to Mooncake was open
    store_until(client, keys, "spilled", 40)
    gone = [key for key in keys if not load(client, [key])]
    assert found_below(below, gone) >= len(gone) - lost
    assert counted(client, "demotion_failed") == lost
    assert counted(client, "demotion_timed_out") == 0


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["killed", "hung"])
def test_a_master_that_goes_while_victims_are_written_costs_these_and_nothing_else(
    spilling,
    mooncake,  # noqa: F811
    open_client,
    open_below,
    fault,
):
    master = mooncake.start_master()
    mooncake.start_owner()
    client, below = open_client(spilling), open_below(spilling)
    keys: list[ChunkKey] = []
    store_until(client, keys, "spilled", 10)
    failed, spilled = counted(client, "demotion_failed"), counted(client, "spilled")
    if fault == "killed":
        master.kill()
    else:
        master.suspend()
    store_until(client, keys, "demotion_failed", failed + 20)
    assert counted(client, "demotion_timed_out") == 0, "no victim waits for the store until its deadline"
    assert load(client, keys[-1:]) == 1
    if fault == "killed":
        mooncake.start_master()
    else:
        master.resume()
    before = len(keys)
    store_until(client, keys, "spilled", spilled + 20)
    await_ready(below)
    gone = [key for key in keys[before:] if not load(client, [key])]
    assert found_below(below, gone) > 0, "what it writes since is there"
    store_more(client, keys, 5)
    assert load(client, keys[-1:]) == 1


def staging_files() -> set[str]:
    """The descriptors by which this process has staging memory open."""
    found = set()
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed since
            if "vcache-staging" in os.readlink(entry):
                found.add(entry.name)
    return found


def test_a_store_that_cannot_be_opened_is_told_once_and_costs_no_memory(
    start_server, open_client, open_donor, monkeypatch, caplog
):
    monkeypatch.setitem(sys.modules, "mooncake", None)  # not installed
    before = staging_files()
    config, _ = start_server(**{**QUICK, "server": SERVER})
    store_settings = {"write_policy": "evicted", "staging_size": "4MiB", "mooncake": {"master": "127.0.0.1:1"}}
    open_donor(
        VCacheConfig(runtime_dir=config.runtime_dir, server=SERVER, client=QUICK["client"], store=store_settings),
        size=2 << 20,
    )
    client = open_client(config)
    keys: list[ChunkKey] = []
    store_until(client, keys, "demotion_failed", 40)
    assert caplog.text.count("Mooncake is not installed") == 1
    assert staging_files() <= before
