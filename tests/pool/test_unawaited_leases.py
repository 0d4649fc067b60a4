"""Leases asked for behind a lookup in shared memory, under a name of the client's own: held and given back like any other."""

from __future__ import annotations

import pytest

from tests.pool.conftest import MIB
from tests.pool.payloads import load, new_keys, store, until
from vcache.pool.client import PoolClient

LEASE_S = 60.0


@pytest.fixture
def reader(quick, open_client):
    return open_client(quick[0], writes=False)


def look_up(client: PoolClient, keys) -> tuple[int, int]:
    found = client.lookup(b"".join(keys), LEASE_S, waits=False)
    return found.hits, found.lease


def leases(client: PoolClient) -> int:
    stats = client.stats()
    assert stats is not None
    return stats.leases


def test_it_costs_no_call_and_keeps_what_was_found(quick, open_client, open_donor, reader):
    writer = open_client(quick[0])
    open_donor(quick[0], size=1 * MIB)
    kept = new_keys(3)
    assert store(writer, kept) == 3
    calls = reader.counters["calls"]
    hits, lease = look_up(reader, [*kept, *new_keys(2)])
    assert hits == 3 and lease
    assert reader.counters["calls"] == calls and reader.counters["server_lookups"] == 0
    until(lambda: leases(writer) == 1, "the server has read of it")
    others = [new_keys(1) for _ in range(60)]  # several times what there is room for
    assert sum(store(writer, keys) for keys in others) > 20, "the others make room for each other"
    assert load(writer, kept) == 3
    reader.release(lease)
    until(lambda: leases(writer) == 0, "it is given back")
    reader.release(lease)
    assert reader.counters["stale_replies"] == 0


def test_what_is_not_there_is_not_asked_for(quick, open_donor, reader):
    open_donor(quick[0])
    assert look_up(reader, new_keys(2)) == (0, 0)


def test_one_given_back_before_it_is_granted_is_gone_right_after_it(quick, open_client, open_donor, reader):
    config, server = quick
    writer = open_client(config)
    open_donor(config)
    keys = new_keys(2)
    assert store(writer, keys) == 2 == reader.lookup(b"".join(keys)).hits
    server.suspend()
    try:
        hits, lease = look_up(reader, keys)
        assert hits == 2 and lease
        reader.release(lease)
    finally:
        server.resume()
    assert reader.wait_available(60) and writer.wait_available(60)
    stats = reader.stats()  # behind both messages
    assert stats is not None and (stats.leases, stats.counters["leases"]) == (0, 1), "granted, and given back"


def test_those_of_a_server_that_died_are_forgotten(quick, processes, open_client, open_donor, reader):
    config, server = quick
    writer = open_client(config)
    open_donor(config)
    keys = new_keys(2)
    assert store(writer, keys) == 2
    (_, answered), (_, unanswered) = look_up(reader, keys), look_up(reader, keys)
    until(lambda: leases(writer) == 2, "both are held")
    server.kill()
    processes.server(config)
    until(lambda: look_up(reader, keys)[0] == 2, "the chunks are back")
    before = leases(reader)
    for lease in (answered, unanswered):
        reader.release(lease)
    assert leases(reader) == before > 0, "no later lease is ended by their names"
