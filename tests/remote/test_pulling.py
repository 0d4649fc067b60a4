"""What one host's VRAM has no room for, the donor of another host pulls: real donors, servers and engines, and who dies meanwhile."""

from __future__ import annotations

import os
import secrets
import signal
import threading
from collections.abc import Callable

import pytest

from tests.pool.payloads import load, new_keys, poke, store, until, until_serving
from tests.pool.test_demotion import counted, fill
from tests.remote.conftest import Hosts, is_stopped, until_announced
from tests.remote.stopping_puller import STEPS
from tests.remote.test_faults import HALTING
from vcache.config import VCacheConfig
from vcache.keys import ChunkKey
from vcache.memory.host import HostMemory
from vcache.pool.client import PoolClient
from vcache.pool.donor import Donor
from vcache.server_query import fetch_stats

SERVER = {
    "reservation_timeout": 1.0,
    "liveness_timeout": 3.0,
    "eviction": {"high_watermark": 0.7, "low_watermark": 0.5, "demotion_timeout": 20.0},
}


@pytest.fixture
def two(hosts: Callable[..., Hosts]) -> Callable[..., Hosts]:
    """Two hosts; victims go early, with time enough for a busy machine."""

    def start(**settings) -> Hosts:
        server = {**SERVER, **settings.pop("server", {})}
        return hosts(server=server, transfer={"remote_timeout": 5.0}, **settings)

    return start


def near(both: Hosts) -> VCacheConfig:
    """Of a donor here whose segment stands in for VRAM."""
    return VCacheConfig(**both.here.model_dump() | {"segment": {"tier": "vram"}})


def until_known(both: Hosts, open_client: Callable[..., PoolClient]) -> None:
    """Waits until each host can be told how to read the other's segment."""
    for config in (both.here, both.there):
        until_announced(open_client(config, writes=False))


def segments(both: Hosts) -> int:
    return len(fetch_stats(both.here, timeout_s=60.0).segments)


def test_what_vram_here_has_no_room_for_is_found_on_the_other_host(two, open_client):
    both = two()
    both.donate(near(both), "2MiB")
    both.donate(both.there, "32MiB")
    until_known(both, open_client)
    client, beside = open_client(both.here), open_client(both.there)
    chains = fill(client, 20)
    until(lambda: counted(client, "pulled") >= 40, "they are pulled")
    assert [load(client, keys) for keys in chains] == [4] * 20
    assert client.counters["remote_hits"] >= 40
    assert [load(beside, keys) for keys in chains] == [4] * 20
    assert (
        counted(client, "evicted") == counted(client, "demotion_failed") == counted(client, "demotion_timed_out") == 0
    )


def test_who_has_a_lease_finds_whole_chunks_while_they_are_pulled(two, open_client):
    both = two(server={"shared_index": 0})  # with hints what has just moved is a miss, once
    both.donate(near(both), "2MiB")
    both.donate(both.there, "64MiB")
    until_known(both, open_client)
    client, other = open_client(both.here), open_client(both.here)
    kept = fill(client, 2)
    assert [load(other, keys) for keys in kept] == [4, 4]
    stop, errors = threading.Event(), []

    def churn() -> None:
        try:
            while not stop.is_set():
                store(client, new_keys(4))
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=churn)
    thread.start()
    try:

        def are_pulled() -> bool:
            assert [load(other, keys) for keys in kept] == [4, 4], "never a miss while it goes to the other host"
            return counted(other, "pulled") > 40

        until(are_pulled, "they are pulled")
    finally:
        stop.set()
        thread.join()
    assert errors == []


def test_nothing_is_pulled_where_that_is_switched_off(two, open_client):
    both = two(server={"eviction": {**SERVER["eviction"], "pull": False}})
    both.donate(near(both), "2MiB")
    both.donate(both.there, "32MiB")
    until_known(both, open_client)
    client = open_client(both.here)
    fill(client, 20)
    until(lambda: counted(client, "evicted") > 0, "victims are dropped")
    assert counted(client, "pulled") == 0


def test_a_source_overwritten_while_it_is_pulled_is_not_committed(two, open_client, monkeypatch):
    """Between the payloads' way over the network and their records'."""
    monkeypatch.setattr("vcache.remote.reader.READING_MODULE", HALTING)
    both = two()
    both.donate(near(both), "2MiB")
    puller = open_client(both.there)
    segment_id = secrets.token_bytes(16)
    donor = Donor(both.there, puller, HostMemory.create(puller.runtime, segment_id, 32 << 20), segment_id)
    try:
        assert donor.wait_registered(60)
        until_known(both, open_client)
        client = open_client(both.here)
        keys: list[ChunkKey] = []

        def reading_process() -> int:
            companion = puller.mappings.remote.reader._companion
            return companion.pid if companion is not None else 0

        def is_halted() -> bool:
            return bool(reading_process()) and is_stopped(reading_process())

        store_until(client, keys, is_halted, "payloads read, records not yet")
        there = [key for key in keys if client.lookup(key).hits]
        for key in there:
            (row,) = client.acquire(key, 0).placements
            use = client.use_segment(client.session.info(int(row["segment"])))
            assert use.segment.retire(int(row["record"]), int(row["generation"]))  # as if its lease had run out
            poke(use.segment, int(row["offset"]), bytes(int(row["nbytes"])))
            use.release()
        os.kill(reading_process(), signal.SIGCONT)
        until(lambda: counted(client, "demotion_failed") > 0, "it is found out")
        assert counted(client, "pulled") == 0
        assert not list(donor.segment.scan()), "nothing of it was even reserved"
    finally:
        if reading_process():
            os.kill(reading_process(), signal.SIGCONT)
        donor.close(1.0)


def store_until(client: PoolClient, keys: list[ChunkKey], condition: Callable[[], bool], what: str) -> None:
    def is_so() -> bool:
        keys.extend(new_keys(1))
        store(client, keys[-1:])
        return condition()

    until(is_so, what)


@pytest.mark.slow
@pytest.mark.parametrize("step", STEPS)
def test_a_donor_killed_while_it_pulls_costs_nothing_that_was_not_its_own(two, processes, open_client, step):
    both = two(server={"eviction": {**SERVER["eviction"], "demotion_timeout": 1.0}})
    both.donate(near(both), "2MiB")
    dying = processes.python("-m", "tests.remote.stopping_puller", step, "32MiB", config=both.there)
    dying.expect("donating")
    until_known(both, open_client)
    client = open_client(both.here)
    keys: list[ChunkKey] = []
    store_until(client, keys, lambda: not dying.running, "it pulls")
    until(lambda: segments(both) == 1, "its segment is gone")
    until(lambda: (stats := client.stats()) and not stats.reservations, "what it had reserved is given back")
    assert [load(client, [key]) in (0, 1) for key in keys] == [True] * len(keys), "every byte is checked"
    assert [load(client, chain) for chain in fill(client, 1)] == [4]
    both.donate(both.there, "32MiB")
    before = counted(client, "pulled")
    store_until(client, keys, lambda: counted(client, "pulled") > before, "another one pulls")


@pytest.mark.slow
def test_a_source_killed_while_it_is_pulled_from_leaves_what_has_arrived(two, open_client):
    both = two(server={"eviction": {**SERVER["eviction"], "demotion_timeout": 2.0}})
    source = both.donate(near(both), "2MiB")
    both.donate(both.there, "32MiB")
    until_known(both, open_client)
    client = open_client(both.here)
    keys: list[ChunkKey] = []
    store_until(client, keys, lambda: counted(client, "pulled") >= 5, "some are pulled")
    source.kill()
    until(lambda: segments(both) == 1, "its segment is gone")
    until(lambda: (stats := client.stats()) and not stats.reservations, "all is settled")
    left = [key for key in keys if load(client, [key])]
    assert len(left) >= 5
    assert counted(client, "failed_messages") == 0


@pytest.mark.slow
def test_a_server_killed_while_chunks_are_pulled_finds_them_all_again(two, open_client):
    both = two()
    server = both.server
    both.donate(near(both), "2MiB")
    both.donate(both.there, "64MiB")
    until_known(both, open_client)
    client = open_client(both.here)
    chains = fill(client, 6)
    for _ in range(2):
        term = client.term
        server.kill()
        server = both.processes.server(both.here)
        until(lambda before=term: client.term > before and segments(both) == 2, "all are back")
        until_serving(client)
        chains += fill(client, 6)
    until(lambda: counted(client, "pulled") > 0, "it goes on")
    until(
        lambda: [load(client, keys) for keys in chains] == [4] * len(chains), "every chunk, from one host or the other"
    )
    assert counted(client, "evicted") == 0
