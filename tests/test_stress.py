"""Much at once: many threads, many clients, thousands of tiny chunks, leases that run out while space runs short.

Counts are bounded, and nothing is measured; ``test_chaos.py`` has what dies.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest

from tests.pool import conftest
from tests.pool.payloads import copy_out, load, new_keys, payload, store, until
from vcache.keys import ChunkKey
from vcache.pool.client import PoolClient
from vcache.pool.reading import PendingRead, begin_read
from vcache.protocol import MAX_KEYS_PER_CALL, SegmentStats

open_client, open_donor = conftest.open_client, conftest.open_donor
MIB = 1 << 20
#: Counters of things that nothing here gives a reason for.
NEVER = ("calls_refused", "bad_replies", "unsent_messages", "failures", "unmapped_grants", "refused_marks")


def in_threads(count: int, work: Callable[[int], None]) -> None:
    """Runs ``work(0..count-1)``, all begun together; raises what the first of them raised."""
    together = threading.Barrier(count)

    def begin(index: int) -> None:
        together.wait()
        work(index)

    with ThreadPoolExecutor(count) as threads:
        for done in [threads.submit(begin, index) for index in range(count)]:
            done.result()


def hits(client: PoolClient, keys: Sequence[ChunkKey]) -> int:
    return client.lookup(b"".join(keys)).hits


def check(*clients: PoolClient) -> None:
    for client in clients:
        assert {name: client.counters[name] for name in NEVER} == dict.fromkeys(NEVER, 0)


def segments_of(client: PoolClient) -> list[SegmentStats]:
    stats = client.stats()
    assert stats is not None
    return stats.segments


def all_is_free(client: PoolClient) -> bool:
    return all(
        segment.free_bytes == segment.total_bytes == segment.largest_free_bytes and not segment.records_used
        for segment in segments_of(client)
    )


def until_all_is_free(client: PoolClient) -> None:
    """Everything removed, all space comes back; a write may be committed just after one ``clear``."""
    until(lambda: client.clear() is not None and all_is_free(client), "all space is free")


def test_many_threads_share_a_client(start_server, open_client, open_donor):
    config, _ = start_server(client={"call_timeout": 30.0})
    client = open_client(config)
    open_donor(config, size=16 * MIB)
    shared = new_keys(40)

    def work(index: int) -> None:
        rng = random.Random(index)
        for _ in range(25):
            begin = rng.randrange(len(shared))
            run = shared[begin : begin + rng.randint(1, 8)]
            store(client, run)
            load(client, run)
            if rng.random() < 0.2:
                client.remove(b"".join(run[:2]))
            mine = new_keys(2)
            assert store(client, mine) == 2
            assert load(client, mine) == 2
            assert client.lookup(b"".join(mine)).hits == 2

    in_threads(12, work)
    check(client)
    assert client.counters["calls_timed_out"] == 0
    until_all_is_free(client)


def test_many_clients_share_a_pool(start_server, open_client, open_donor):
    config, _ = start_server(client={"call_timeout": 30.0})
    for _ in range(3):
        open_donor(config, size=4 * MIB)
    clients = [open_client(config, available=False) for _ in range(24)]
    for client in clients:
        assert client.wait_available(60)
    shared = new_keys(60)

    def work(index: int) -> None:
        rng = random.Random(index)
        for _ in range(12):
            begin = rng.randrange(len(shared))
            run = shared[begin : begin + rng.randint(1, 6)]
            store(clients[index], run)
            load(clients[index], run)

    in_threads(len(clients), work)
    check(*clients)
    stats = clients[0].stats()
    assert stats is not None and stats.sessions == len(clients) + 3
    assert stats.counters["failed_messages"] == stats.counters["bad_messages"] == 0
    until_all_is_free(clients[0])


def test_thousands_of_tiny_chunks(start_server, open_client, open_donor):
    config, _ = start_server(segment={"records": 8192}, client={"call_timeout": 30.0})
    client, other = open_client(config), open_client(config)
    open_donor(config, size=40 * MIB)
    keys = new_keys(6000)
    for begin in range(0, len(keys), 2000):
        batch = keys[begin : begin + 2000]  # what is too much to be outstanding at once is declined
        until(lambda batch=batch: store(client, batch, nbytes=100) == 0 == 2000 - hits(client, batch), "all are stored")
    until(lambda: other.lookup(b"".join(keys)).hits == len(keys), "all of them are present")
    assert load(other, keys) == len(keys)
    [segment] = segments_of(client)
    assert segment.records_used == len(keys)
    assert client.remove(b"".join(keys[3000:])) == 3000
    assert load(other, keys) == 3000
    assert client.clear() == 3000
    assert all_is_free(client)
    check(client, other)


def test_a_call_with_as_many_keys_as_it_may_have(start_server, open_client, open_donor):
    config, _ = start_server(client={"call_timeout": 30.0})
    client = open_client(config)
    open_donor(config, size=8 * MIB)
    keys = new_keys(MAX_KEYS_PER_CALL)
    assert client.lookup(b"".join(keys)).hits == 0
    stored = store(client, keys, nbytes=100)
    [segment] = segments_of(client)
    assert stored == segment.records  # one for each record of the segment; the rest is skipped
    assert load(client, keys) == stored
    assert client.remove(b"".join(keys)) == stored
    assert all_is_free(client)
    check(client)


def test_leases_that_run_out_while_their_chunks_are_evicted(start_server, open_client, open_donor):
    config, _ = start_server(
        server={"eviction": {"high_watermark": 0.5, "low_watermark": 0.2}},
        client={"lease": 0.02, "call_timeout": 30.0},
    )
    writer, reader = open_client(config), open_client(config)
    open_donor(config, size=2 * MIB)
    has_ended = threading.Event()

    def is_evicted(read: PendingRead) -> bool:
        """Looks into memory: a lookup would count as a use, and keep the chunks."""
        [segment] = read.segments
        return any(segment.generation(row["record"]) != row["generation"] for row in read.placements)

    def read_slowly() -> None:
        """Holds each run until its lease has run out and something else may lie where it was."""
        while reader.counters["invalid_reads"] <= 20:
            keys = new_keys(4)
            store(reader, keys)
            read = begin_read(reader, keys, 0)
            if read.hits:
                until(partial(is_evicted, read), "an eviction")
            copied = copy_out(read)
            valid = read.complete()
            assert all(copied[chunk] == payload(keys[chunk]) for chunk in range(valid))

    def write() -> None:
        while not has_ended.is_set():
            store(writer, new_keys(3))

    def work(index: int) -> None:
        if index:
            write()
            return
        try:
            read_slowly()
        finally:
            has_ended.set()

    in_threads(3, work)
    check(writer, reader)
    until_all_is_free(writer)


@pytest.mark.parametrize("closers", [1, 4])
def test_clients_that_come_and_go(start_server, open_donor, runtime_dir, closers: int):
    """Closing from several threads, with calls and copies under way in others, neither hangs nor raises nor leaks."""
    config, _ = start_server(server={"heartbeat_interval": 0.1, "liveness_timeout": 2.0})
    donor = open_donor(config, size=4 * MIB)
    shared = new_keys(8)

    def live(client: PoolClient) -> None:
        while client.available:
            store(client, shared)
            load(client, shared)
            client.remove(b"".join(shared[:1]))

    def until_busy(client: PoolClient) -> None:
        until(lambda: client.counters["calls"] > 20, "some calls")

    for _ in range(8):
        client = PoolClient(config, device="cpu:0", writes=True)
        assert client.wait_available(60)
        with ThreadPoolExecutor() as threads:
            users = [threads.submit(live, client) for _ in range(3)]
            until_busy(client)
            for closed in [threads.submit(client.close) for _ in range(closers)]:
                closed.result()
            for user in users:
                user.result()
        check(client)
        assert not client.available
    assert donor.registered
    client = PoolClient(config, device="cpu:0", writes=True)
    try:
        assert client.wait_available(60)
        until_all_is_free(client)
    finally:
        client.close()
    assert [path.name for path in runtime_dir.glob("client-*")] == []
