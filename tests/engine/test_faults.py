"""Server and donors killed, suspended and started again under an engine at work: misses, never exceptions or wrong bytes."""

from __future__ import annotations

import logging
import threading

import vcache.transfer
from tests.engine.conftest import eventually, serving_segments
from tests.engine.kv import CHUNK, fill, new_tensors, slots_of, wrong_blocks
from vcache.config import VCacheConfig
from vcache.server_query import fetch_stats

HERE, THERE = list(range(8)), [20, 19, 40, 41, 5, 63, 0, 30]
PROMPTS = [[own] * (4 * CHUNK) for own in range(8)]
#: More chunks than a segment of 1 MiB has records for.
MANY = [[own] * (4 * CHUNK) for own in range(100, 120)]
QUICK = {
    "server": {"heartbeat_interval": "100ms", "liveness_timeout": "1s"},
    "client": {"connect_timeout": "2s", "call_timeout": "300ms"},
}


def store(engine, tokens, device="cpu"):
    tensors = new_tensors(64, device=device)
    fill(tensors, tokens, HERE)
    engine.store(tokens, kvcaches=tensors, slot_mapping=slots_of(HERE))


def loaded(engine, tokens, device="cpu"):
    """Tokens loaded; every byte is checked."""
    tensors = new_tensors(64, device=device)
    result = engine.retrieve(tokens, kvcaches=tensors, slot_mapping=slots_of(THERE)).tolist()
    count = sum(result)
    assert result == [True] * count + [False] * (len(result) - count)
    assert set(wrong_blocks(tensors, tokens, THERE, [True] * 32)).isdisjoint(range(count // 4))
    return count


class Load:
    """Stores and loads all prompts over and over, in a thread, until stopped; keeps the first error."""

    def __init__(self, engine):
        self.engine, self.stopping, self.error, self.rounds = engine, threading.Event(), None, 0
        self.thread = threading.Thread(target=self.run)

    def run(self):
        try:
            while not self.stopping.is_set():
                for tokens in PROMPTS:
                    store(self.engine, tokens)
                    assert self.engine.lookup(tokens) in (0, 8, 16, 24, 32)
                    loaded(self.engine, tokens)
                self.rounds += 1
        except BaseException as error:
            self.error = error

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.stopping.set()
        self.thread.join()
        assert self.error is None, self.error

    def await_rounds(self, more):
        target = self.rounds + more
        eventually(lambda: self.rounds >= target or self.error is not None, "the load goes on")


def test_a_server_killed_and_restarted_under_load(start_server, start_donor, open_engine, processes, caplog):
    config, server = start_server(**QUICK)
    start_donor(config)
    engine = open_engine(config)
    with caplog.at_level(logging.WARNING, logger="vcache"), Load(engine) as load:
        load.await_rounds(2)
        server.kill()
        load.await_rounds(2)
        assert not engine.get_stats()["server_available"]
        processes.server(config)
        eventually(lambda: serving_segments(config) == 1, "the donor hands its segment over")
        eventually(lambda: engine.get_stats()["server_available"], "the engine reconnects")
        load.await_rounds(2)
    assert engine.get_stats()["server_entries"] == 4 * len(PROMPTS)
    assert all(loaded(engine, tokens) == 32 for tokens in PROMPTS)
    assert len(caplog.records) < 40, "one line per cause per interval"


def test_entries_are_back_after_the_server_restarted(start_server, start_donor, open_engine, processes, device):
    config, server = start_server(**QUICK)
    start_donor(config, device=device)
    engine = open_engine(config, device=device)
    for tokens in PROMPTS:
        store(engine, tokens, device)
    eventually(lambda: fetch_stats(config, timeout_s=5).entries == 32, "all commits arrive")
    gone = engine.keys_of(PROMPTS[0])
    assert engine.remove_keys(gone) == 4
    server.kill()
    processes.server(config)
    eventually(lambda: engine.lookup(PROMPTS[1]) == 32, "entries come back")
    eventually(lambda: serving_segments(config) == 1, "the segment is whole")
    assert [loaded(engine, tokens, device) for tokens in PROMPTS] == [0] + [32] * 7


def test_a_server_that_hangs_costs_misses_and_comes_back(start_server, start_donor, open_engine):
    config, server = start_server(**QUICK)
    start_donor(config)
    engine = open_engine(config)
    store(engine, PROMPTS[0])
    server.suspend()
    assert engine.lookup(PROMPTS[0]) == 0
    assert loaded(engine, PROMPTS[0]) == 0
    store(engine, PROMPTS[1])
    assert engine.get_stats()["client_calls_skipped"] > 0
    server.resume()
    eventually(lambda: engine.lookup(PROMPTS[0]) == 32, "the engine finds the server again")
    assert loaded(engine, PROMPTS[0]) == 32


def test_a_donor_killed_under_load(start_server, start_donor, open_engine, runtime_dir):
    config, _ = start_server(**QUICK)
    doomed = start_donor(config)
    engine = open_engine(config)
    with Load(engine) as load:
        load.await_rounds(2)
        doomed.kill()
        eventually(lambda: serving_segments(config) == 0, "the dead donor's segment is dropped")
        load.await_rounds(1)
        assert engine.get_stats()["server_entries"] == 0
        start_donor(config)
        load.await_rounds(2)
    assert all(loaded(engine, tokens) == 32 for tokens in PROMPTS)
    assert len(list(runtime_dir.glob("segment-*"))) == 1


def test_a_reader_slower_than_its_lease_reports_a_miss(start_server, start_donor, open_engine, monkeypatch, device):
    config, _ = start_server(**{**QUICK, "client": {**QUICK["client"], "lease": "100ms"}})
    start_donor(config, size="1MiB", device=device)
    reader, other = open_engine(config, device=device), open_engine(config, device=device)
    store(other, PROMPTS[0], device)
    other.get_stats()  # a round trip: the commit before it has arrived
    real, found = vcache.transfer.scatter, []

    def overtaken(kv, block_ids, segment, offsets, **named):
        """The extents go to others between the lease and the copy."""
        before = [bytes(segment[offset : offset + 16].tolist()) for offset in offsets.tolist()]
        eventually(lambda: other.get_stats()["server_leases"] == 0, "the lease runs out")
        assert other.clear() == 4
        for tokens in MANY:
            store(other, tokens, device)
        after = [bytes(segment[offset : offset + 16].tolist()) for offset in offsets.tolist()]
        found.extend(now != then for now, then in zip(after, before, strict=True))
        real(kv, block_ids, segment, offsets, **named)

    monkeypatch.setattr("vcache.transfer.scatter", overtaken)
    assert loaded(reader, PROMPTS[0], device) == 0
    assert found == [True] * 4, "the extents were overwritten, as this test needs"
    stats = reader.get_stats()
    assert (stats["hits"], stats["misses"], stats["validation_failures"], stats["failures"]) == (0, 4, 4, 0)
    monkeypatch.undo()
    assert all(loaded(reader, tokens, device) in (0, 8, 16, 24, 32) for tokens in [*PROMPTS, *MANY])


def test_errors_in_the_pool_become_misses_and_one_line(pool, open_engine, monkeypatch, caplog):
    """What no test can provoke from outside: the copy itself fails."""
    engine = open_engine(pool)
    store(engine, PROMPTS[0])

    def broken(*_, **__):
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr("vcache.transfer.scatter", broken)
    monkeypatch.setattr("vcache.transfer.gather", broken)
    with caplog.at_level(logging.WARNING, logger="vcache.engine"):
        for _ in range(3):
            assert loaded(engine, PROMPTS[0]) == 0
            store(engine, PROMPTS[1])
    assert engine.get_stats()["failures"] == 6
    assert len([record for record in caplog.records if "illegal memory access" in record.getMessage()]) == 2
    monkeypatch.undo()
    assert loaded(engine, PROMPTS[0]) == 32
    assert engine.lookup(PROMPTS[1]) == 0
    store(engine, PROMPTS[1])
    assert loaded(engine, PROMPTS[1]) == 32


def test_a_server_restarted_twice_in_a_row_loses_nothing(start_server, start_donor, open_engine, processes):
    config, server = start_server(**QUICK)
    start_donor(config)
    engine = open_engine(config)
    for tokens in PROMPTS:
        store(engine, tokens)
    for _ in range(2):
        server.kill()
        server = processes.server(config)
    eventually(lambda: serving_segments(config) == 1, "the segment is whole")
    eventually(lambda: engine.get_stats()["server_available"], "the engine reconnects")
    assert [loaded(engine, tokens) for tokens in PROMPTS] == [32] * 8


def test_a_flush_waits_for_the_store_only_as_long_as_it_has_not_waited_for_the_server(
    runtime_dir, tmp_path, open_engine, monkeypatch
):
    config = VCacheConfig(store={"files": {"directory": str(tmp_path)}}, client={"connect_timeout": "100ms"})
    engine = open_engine(config, kv_caches=new_tensors(64))
    waits = []
    flush = engine._below.flush
    monkeypatch.setattr(engine._below, "flush", lambda wait_s: waits.append(wait_s) or flush(wait_s))
    assert not engine.flush(0.05)
    assert waits == [0.0], "all of it went into waiting for a server that is not there"
