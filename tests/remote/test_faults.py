"""Donors on other hosts that die, hang, come back, or overwrite while they are read: bounded waits, misses, no wrong byte."""

from __future__ import annotations

import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.pool.payloads import load, new_keys, poke, store, until, until_serving
from tests.remote.conftest import Hosts, companions_of, is_stopped, remote_segments, until_announced

MIB = 1 << 20
HALTING = "tests.remote.halting_reading_process"


def reading_process(reader):
    return reader.mappings.remote.reader._companion.pid


def until_opened(reader):
    """Waits until every segment of another host that the reader was told of can be read."""
    remote = reader.mappings.remote
    until(lambda: len(remote.use(remote_segments(reader))) == len(remote_segments(reader)), "open remote segments")


@pytest.fixture
def two(hosts, open_client):
    """A donor there, a writer beside it, a reader here that has opened its segment."""

    def start(**settings):
        both = hosts(**settings)
        donor = both.donate(both.there, "64MiB")
        writer, reader = open_client(both.there), open_client(both.here)
        until_announced(reader)
        until_opened(reader)
        return both, donor, writer, reader

    return start


def test_what_is_overwritten_while_it_is_read_is_found_out(two, monkeypatch):
    monkeypatch.setattr("vcache.remote.reader.READING_MODULE", HALTING)
    _, _, writer, reader = two()
    keys = new_keys(5)
    assert store(writer, keys) == 5
    victim = writer.acquire(b"".join(keys), 0).placements[2]
    use = writer.use_segment(writer.session.info(int(victim["segment"])))
    with ThreadPoolExecutor(1) as pool:
        loaded = pool.submit(load, reader, keys)
        until(lambda: is_stopped(reading_process(reader)), "payloads read, records not yet")
        use.segment.retire(int(victim["record"]), int(victim["generation"]))
        poke(use.segment, int(victim["offset"]), bytes(65536))
        os.kill(reading_process(reader), signal.SIGCONT)
        assert loaded.result(60) == 2
    use.release()
    assert reader.counters["invalid_reads"] == 1
    assert reader.counters["remote_failures"] == 0


@pytest.mark.parametrize("fault", ["killed", "suspended"])
def test_a_donor_that_goes_during_a_read_is_a_miss_within_the_deadline(two, monkeypatch, fault):
    monkeypatch.setattr("vcache.remote.reader.READING_MODULE", HALTING)
    both, donor, writer, reader = two(transfer={"remote_timeout": 3.0}, server={"liveness_timeout": 60.0})
    keys = new_keys(5)
    assert store(writer, keys) == 5
    offering = companions_of(donor)
    with ThreadPoolExecutor(1) as pool:
        loaded = pool.submit(load, reader, keys)
        until(lambda: is_stopped(reading_process(reader)), "payloads read, records not yet")
        if fault == "killed":
            donor.kill()
            until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in offering), "its companion ends with it")
        else:
            both.suspend(donor)
        os.kill(reading_process(reader), signal.SIGCONT)
        assert loaded.result(60) == 0
    assert reader.counters["remote_failures"] == 1
    assert reader.counters["remote_lost_hits"] == 5
    assert reader.counters["invalid_reads"] == 0, "nobody says that the placements are bad"


@pytest.mark.slow
def test_a_donor_killed_in_the_middle_of_payloads_is_a_miss_and_never_wrong_bytes(two):
    _, donor, writer, reader = two(transfer={"remote_timeout": 3.0, "staging_size": "128MiB"})
    keys = new_keys(24)
    assert store(writer, keys, nbytes=2 * MIB) == 24
    assert load(reader, keys) == 24
    killer = threading.Timer(0.01, donor.kill)
    killer.start()
    for _ in range(3):
        load(reader, keys)
    killer.join()
    assert load(reader, keys) == 0
    until(lambda: not reader.mappings.remote.identities(), "the mapping is dropped, once the server has noticed")


def test_a_hung_donor_costs_one_deadline_and_not_one_per_call(two):
    both, donor, writer, reader = two(transfer={"remote_timeout": 2.0}, server={"liveness_timeout": 60.0})
    keys = new_keys(5)
    assert store(writer, keys) == 5
    assert load(reader, keys) == 5
    both.suspend(donor)
    assert load(reader, keys) == 0
    assert reader.counters["remote_lost_hits"] == 5
    started = time.monotonic()
    calls = 100
    for _ in range(calls):
        assert load(reader, keys) == 0
    each_s = (time.monotonic() - started) / calls
    assert each_s < 2.0 / 2, "the later calls do not wait for it"
    assert reader.counters["remote_lost_hits"] == 5
    assert reader.counters["unmapped_hits"] == 5 * calls
    both.resume()
    until(lambda: load(reader, keys) == 5, "the donor is found again")


@pytest.mark.slow
def test_a_donor_that_hung_before_it_was_ever_read_holds_up_nobody(hosts, open_client):
    both: Hosts = hosts(transfer={"remote_timeout": 2.0}, server={"liveness_timeout": 120.0})
    hung = both.donate(both.there)
    writer = open_client(both.there)
    bystander = open_client(both.here)
    until_announced(bystander)
    stuck = new_keys(3)
    assert store(writer, stuck) == 3
    both.suspend(hung)
    reader = open_client(both.here)  # has never met it
    assert load(reader, stuck) == 0
    well = both.donate(both.there, "32MiB")  # and is preferred: it has more room
    keys = new_keys(3)
    until_announced(reader, 2)
    assert store(writer, keys) == 3
    until(lambda: load(reader, keys) == 3, "the other donor's chunks, in far less than the hung one's minute", 30)
    assert load(reader, stuck) == 0
    assert well.running


@pytest.mark.slow
def test_the_readers_companion_may_be_killed_at_any_time(two):
    _, _, writer, reader = two()
    keys = new_keys(5)
    assert store(writer, keys) == 5
    assert load(reader, keys) == 5
    os.kill(reading_process(reader), signal.SIGKILL)
    until(lambda: load(reader, keys) == 5, "a new companion")
    assert reader.counters["remote_failures"] == 0, "that was nobody's donor's doing"


@pytest.mark.slow
def test_a_companion_of_the_reader_that_hangs_is_replaced(two):
    _, _, writer, reader = two(transfer={"remote_timeout": 1.0})
    keys = new_keys(5)
    assert store(writer, keys) == 5
    assert load(reader, keys) == 5
    os.kill(reading_process(reader), signal.SIGSTOP)
    assert load(reader, keys) == 0
    until(lambda: load(reader, keys) == 5, "a new companion")


@pytest.mark.slow
def test_the_donors_companion_may_be_killed_at_any_time(two):
    _, donor, writer, reader = two(transfer={"remote_timeout": 2.0})
    keys = new_keys(5)
    assert store(writer, keys) == 5
    assert load(reader, keys) == 5
    for pid in companions_of(donor):
        os.kill(pid, signal.SIGKILL)
    assert load(writer, keys) == 5
    until(lambda: load(reader, keys) == 5, "announced anew")


@pytest.mark.slow
def test_a_restarted_server_learns_how_other_hosts_read_the_segment(two):
    both, _, writer, reader = two()
    keys = new_keys(5)
    assert store(writer, keys) == 5
    assert load(reader, keys) == 5
    both.server.kill()
    both.processes.server(both.here)
    assert reader.wait_available(60)
    until_serving(reader)
    until(lambda: load(reader, keys) == 5, "the same chunks under the new term")
