"""A donor and its server: registration, handover page by page, orders, and what a segment keeps when they part and meet again."""

from __future__ import annotations

import signal
import threading
import time
from itertools import pairwise

import pytest

from tests.pool.conftest import QUICK, asking
from tests.pool.payloads import copy_out, fill, load, new_keys, start_write, store, until, until_serving
from vcache import protocol
from vcache.config import VCacheConfig
from vcache.errors import CapacityError
from vcache.memory.host import HostMemory
from vcache.pool.donor import REFUSED_WAIT_S, Donor, State
from vcache.pool.reading import begin_read

MIB = 1 << 20


@pytest.fixture
def pool(quick, open_client, open_donor):
    config, server = quick
    client = open_client(config)
    return config, server, client, open_donor(config)


def again(processes, config, server):
    """The server, killed and started anew."""
    server.kill()
    return processes.server(config)


def test_a_segment_is_in_the_pool_once_it_is_registered(pool):
    _, _, client, donor = pool
    stats = client.stats()
    assert stats is not None
    [segment] = stats.segments
    assert (segment.segment_id, segment.label, segment.device, segment.tier, segment.state) == (
        donor.segment.segment_id.hex(), "test", "cpu:0", "dram", "serving",
    )  # fmt: skip
    assert segment.records == donor.segment.records
    assert segment.total_bytes == segment.free_bytes == donor.segment.nbytes - donor.segment.data_offset


@pytest.mark.parametrize("code", [protocol.ErrorCode.FAILED, protocol.ErrorCode.REFUSED])
def test_a_page_that_the_server_failed_on_is_handed_over_again(quick, open_donor, monkeypatch, code):
    config, _ = quick
    answers = []
    on_page = Donor._on_page

    def first_fails(donor, reply):
        answers.append(reply)
        on_page(donor, reply if len(answers) > 1 else protocol.Error(reply.id, code, "it raised"))

    monkeypatch.setattr(Donor, "_on_page", first_fails)
    donor = open_donor(config)
    assert donor.state is State.SERVING
    assert len(answers) == 2


def test_closing_takes_the_segment_and_its_entries_back(pool, runtime_dir):
    _, _, client, donor = pool
    keys = new_keys(3)
    assert store(client, keys) == 3
    assert donor.close()
    assert donor.close()
    assert donor.state is State.CLOSED
    assert not list(runtime_dir.glob("segment-*"))
    until(lambda: (stats := client.stats()) and not stats.segments, "the server forgets it")
    assert load(client, keys) == 0
    assert store(client, keys) == 0
    until(lambda: not client.mappings.mapped(), "the mapping is closed")


def test_closing_waits_for_leases_and_gives_no_new_ones(pool, quick, open_client):
    config, _, _, donor = pool
    client = open_client(asking(config))
    keys = new_keys(2)
    assert store(client, keys) == 2
    read = begin_read(client, keys, 0)
    closing = threading.Thread(target=donor.close, args=(60.0,))
    closing.start()
    until(lambda: client.lookup(b"".join(keys)).hits == 0, "no hits while it drains")
    assert closing.is_alive()
    assert set(copy_out(read)) == {0, 1}
    assert read.complete() == 2
    closing.join(60)
    assert not closing.is_alive()


def test_closing_does_not_wait_longer_than_it_was_told(pool, open_client):
    config, _, _, donor = pool
    client = open_client(asking(config))
    keys = new_keys(1)
    assert store(client, keys) == 1
    read = begin_read(client, keys, 0)
    assert not donor.close(0.2)
    assert read.complete() == 0


def test_what_closing_waits_for_has_one_deadline(pool, open_client, monkeypatch):
    config, _, _, donor = pool
    client = open_client(asking(config))
    keys = new_keys(1)
    assert store(client, keys) == 1
    read = begin_read(client, keys, 0)
    mappings, waits = donor._client.mappings, []
    give_up = mappings.give_up
    monkeypatch.setattr(mappings, "give_up", lambda segment, wait_s: waits.append(wait_s) or give_up(segment, wait_s))
    assert not donor.close(0.2)
    assert waits == [0.0], "all of it went into waiting for the lease"
    assert read.complete() == 0


def test_closing_does_not_wait_for_a_server_that_died(pool, open_client):
    config, server, _, donor = pool
    client = open_client(asking(config))
    keys = new_keys(1)
    assert store(client, keys) == 1
    read = begin_read(client, keys, 0)
    closing = threading.Thread(target=donor.close, args=(3600.0,))
    closing.start()
    until(lambda: client.lookup(keys[0]).hits == 0, "it drains")
    server.kill()
    closing.join(60)
    assert not closing.is_alive()
    assert donor.state is State.CLOSED
    assert read.complete() == 0


def test_a_donor_in_the_process_that_uses_it_is_not_freed_under_its_user(quick, open_client, open_donor):
    config, _ = quick
    client = open_client(config)
    donor = open_donor(config, client)
    keys = new_keys(2)
    assert store(client, keys) == 2
    read = begin_read(client, keys, 0)
    assert read.segments == [donor.segment], "a process uses its own segment where it is"
    assert not donor.close(0.1)
    copy_out(read)
    read.complete()


def test_a_segment_larger_than_the_memory_there_is_is_refused_and_registers_nothing(quick, open_client):
    config, _ = quick
    client = open_client(config)
    with pytest.raises(CapacityError, match=r"1024TiB was asked for, .* are free"):
        HostMemory.create(client.runtime, b"x" * 16, 1 << 50)
    stats = client.stats()
    assert stats is not None
    assert stats.segments == []


def test_a_segment_without_room_for_data_is_refused_and_registers_nothing(start_server, open_client):
    config, _ = start_server(**QUICK, segment={"records": 1 << 20})
    client = open_client(config)
    memory = HostMemory.create(client.runtime, b"x" * 16, MIB)
    with pytest.raises(CapacityError, match="no room for data"):
        Donor(config, client, memory, b"x" * 16)
    memory.close()
    stats = client.stats()
    assert stats is not None
    assert stats.segments == []


def test_a_registration_that_is_refused_is_not_repeated_at_once(quick, open_client, open_donor):
    config, _ = quick
    client = open_client(config)
    request = client.background.request
    refused: list[float] = []
    takes = threading.Event()

    def refuse(make, on_reply):
        if takes.is_set() or not isinstance(make(1, b"s" * 16, 1), protocol.RegisterSegment):
            return request(make, on_reply)
        refused.append(time.monotonic())
        return on_reply(protocol.Error(1, protocol.ErrorCode.BAD_REQUEST, "no such field"))

    client.background.request = refuse
    donor = open_donor(config, client, registered=False)
    until(lambda: len(refused) == 3, "three attempts")
    takes.set()
    assert all(later - earlier >= REFUSED_WAIT_S for earlier, later in pairwise(refused))
    assert donor.wait_registered(60)


def test_a_restarted_server_gets_everything_back_page_by_page(runtime_dir, processes, open_client, open_donor):
    settings = {**QUICK["server"], "max_message_bytes": "512KiB", "reservation_timeout": 60.0}
    config = VCacheConfig(
        runtime_dir=str(runtime_dir), server=settings, client=QUICK["client"], segment={"records": 5000}
    )
    server = processes.server(config)
    client = open_client(config)
    donor = open_donor(config, size=64 * MIB)
    keys = new_keys(4000)  # two pages of 512 KiB
    for start in range(0, 4000, 500):
        part, parent = keys[start : start + 500], keys[start - 1] if start else b""
        assert store(client, part, parent=parent, nbytes=4096) == 500
    incarnation = donor.segment.incarnation
    term = client.term
    again(processes, config, server)
    until(lambda: client.term > term and donor.term > term and donor.registered, "the donor has handed over")
    assert load(client, keys) == 4000
    assert donor.segment.incarnation == incarnation
    stats = client.stats()
    assert stats is not None
    assert (stats.entries, stats.counters["handed_over"]) == (4000, 4000)
    until_serving(client)
    assert store(client, new_keys(5)) == 5
    donor.segment.check_integrity()


def test_what_was_removed_stays_gone_when_the_server_restarts(pool, processes):
    config, server, client, donor = pool
    keys = new_keys(6)
    assert store(client, keys) == 6
    assert client.remove(b"".join(keys[3:])) == 3
    term = client.term
    again(processes, config, server)
    until(lambda: client.term > term and donor.term > term and donor.registered, "the donor has handed over")
    assert load(client, keys) == 3
    assert [client.lookup(key).hits for key in keys] == [1, 1, 1, 0, 0, 0]


def test_what_was_evicted_stays_gone_when_the_server_restarts(quick, processes, open_client, open_donor):
    config, server = quick
    client = open_client(config)
    donor = open_donor(config, size=1 * MIB)
    first = new_keys(4)
    assert store(client, first) == 4
    until(lambda: store(client, new_keys(3)) >= 0 and not load(client, first[:1]), "the oldest are evicted")
    gone = [key for key in first if not client.lookup(key).hits]
    until(lambda: not {item.key for item in donor.segment.scan()} & set(gone), "they are retired in memory")
    term = client.term
    again(processes, config, server)
    until(lambda: client.term > term and donor.term > term and donor.registered, "the donor has handed over")
    assert [client.lookup(key).hits for key in gone] == [0] * len(gone)
    donor.segment.check_integrity()


def test_a_donor_that_was_dropped_for_silence_comes_back_empty(quick, processes, open_client):
    """Entries may have been removed while nobody could ask it to retire them."""
    config, _ = quick
    client = open_client(config)
    child = processes.python("-m", "vcache.cli", "donate", "--device", "cpu:0", "--size", "8MiB", config=config)
    child.expect("donating")
    keys = new_keys(3)
    until(lambda: store(client, keys) == 3, "stored")
    child.suspend()
    until(lambda: (stats := client.stats()) and not stats.segments, "it is dropped")
    assert load(client, keys) == 0
    assert client.remove(b"".join(keys[1:])) == 0
    child.resume()
    until(lambda: (stats := client.stats()) and [s.state for s in stats.segments] == ["serving"], "it is back")
    assert [client.lookup(key).hits for key in keys] == [0, 0, 0]
    until(lambda: store(client, keys) == 3, "it is written to again")
    assert load(client, keys) == 3
    assert child.stop() == 0


def test_a_donor_suspended_over_a_restart_comes_back_empty(quick, processes, open_client):
    """The old server may have dropped it, and removed entries, before it died: the new one cannot know."""
    config, server = quick
    client = open_client(config)
    child = processes.python("-m", "vcache.cli", "donate", "--device", "cpu:0", "--size", "8MiB", config=config)
    child.expect("donating")
    keys = new_keys(2)
    until(lambda: store(client, keys) == 2, "stored")
    child.suspend()
    until(lambda: (stats := client.stats()) and not stats.segments, "it is dropped")
    again(processes, config, server)
    child.resume()
    until(lambda: (stats := client.stats()) and [s.state for s in stats.segments] == ["serving"], "it is back")
    assert load(client, keys) == 0


def test_a_write_under_way_when_its_donor_is_dropped_does_not_come_back_from_the_dead(pool):
    """The donor begins a new incarnation; the writer commits into it all the same, and is told no."""
    _, _, client, donor = pool
    keys = new_keys(2)
    write = start_write(client, keys)
    fill(write, keys)
    before = donor.segment.incarnation
    donor_client = donor._client
    donor_client.background.end_session(donor_client.session.epoch)
    until(lambda: donor.segment.incarnation > before and donor.registered, "a new incarnation is registered")
    write.complete()
    until(lambda: not list(donor.segment.scan()), "its records are retired")
    assert load(client, keys) == 0
    until(lambda: store(client, keys) == 2, "the keys are free")
    assert load(client, keys) == 2


def test_a_corrupt_record_is_retired_instead_of_handed_over(pool, processes):
    config, server, client, donor = pool
    keys = new_keys(3)
    assert store(client, keys) == 3
    words = donor.segment.memory.words
    record = begin_read(client, keys, 0).placements["record"][1]
    word = (4096 + int(record) * 128) // 8 + 5
    words.store(word, words.load(word) ^ 1 << 20)
    term = client.term
    again(processes, config, server)
    until(lambda: client.term > term and donor.term > term and donor.registered, "the donor has handed over")
    assert load(client, keys) == 1
    until_serving(client)
    assert store(client, keys) == 1
    assert load(client, keys) == 3


def test_a_killed_donors_entries_are_gone_and_its_memory_is_removed(quick, processes, open_client, runtime_dir):
    config, _ = quick
    client = open_client(config)
    child = processes.python("-m", "vcache.cli", "donate", "--device", "cpu:0", "--size", "8MiB", config=config)
    child.expect("donating")
    keys = new_keys(4)
    until(lambda: store(client, keys) == 4, "stored")
    assert load(client, keys) == 4
    child.kill()
    until(lambda: load(client, keys) == 0, "its entries are gone")
    until(lambda: not client.mappings.mapped(), "its mapping is closed")
    until(lambda: not list(runtime_dir.glob("segment-*")), "its file is removed by whoever lives")
    assert child.popen.returncode == -signal.SIGKILL


def test_a_donor_killed_while_the_server_is_away_is_unmapped_all_the_same(quick, processes, open_client, runtime_dir):
    config, server = quick
    client = open_client(config)
    child = processes.python("-m", "vcache.cli", "donate", "--device", "cpu:0", "--size", "8MiB", config=config)
    child.expect("donating")
    keys = new_keys(1)
    until(lambda: store(client, keys) == 1, "stored")
    server.kill()
    child.kill()
    processes.server(config)
    assert client.wait_available(60)
    until(lambda: not client.mappings.mapped(), "its mapping is closed")
    assert load(client, keys) == 0
