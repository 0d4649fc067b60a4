"""What one host stores another reads, byte for byte, through the transfer engine; and when it does not."""

from __future__ import annotations

import json

from tests.engine.conftest import Worker
from tests.engine.kv import CHUNK, model_of
from tests.pool.payloads import copy_out, load, new_keys, payload, poke, store, until
from tests.remote.conftest import until_announced
from vcache.config import VCacheConfig
from vcache.engine import VCacheEngine
from vcache.pool.reading import begin_read

TOKENS = list(range(4 * CHUNK))
HERE, THERE = list(range(8)), [20, 19, 40, 41, 5, 63, 0, 30]


def start_worker(processes, config: VCacheConfig) -> Worker:
    worker = Worker(processes.python("-m", "tests.engine.worker", json.dumps({}), config=config))
    assert json.loads(worker.child.line())["ready"], worker.child.report()
    return worker


def test_what_one_host_stored_the_other_reads(hosts, open_client):
    both = hosts()
    both.donate(both.there)
    writer, reader = open_client(both.there), open_client(both.here)
    until_announced(reader)
    keys = new_keys(20)
    assert store(writer, keys) == 20
    assert load(reader, keys) == 20
    assert load(reader, keys[:7]) == 7
    assert reader.counters["remote_hits"] == 27
    assert reader.counters["remote_read_bytes"] == 27 * 65536
    assert reader.counters["unmapped_hits"] == 0
    assert load(writer, keys) == 20
    assert writer.counters["remote_hits"] == 0, "never through the engine on its own host"


def test_engines_of_two_hosts_share_a_prefix(hosts, processes, open_client):
    both = hosts(segment={"size": "4MiB"})
    both.donate(both.there, "4MiB")
    until_announced(open_client(both.here, writes=False))
    writer, reader = start_worker(processes, both.there), start_worker(processes, both.here)
    assert writer.do("store", tokens=TOKENS, blocks=HERE) == {"stored": 4}
    assert reader.do("lookup", tokens=TOKENS) == {"hits": 32}
    assert reader.do("retrieve", tokens=TOKENS, blocks=THERE) == {"loaded": 32, "wrong": []}
    assert reader.do("stats")["client_remote_hits"] == 4
    assert writer.do("retrieve", tokens=TOKENS, blocks=THERE) == {"loaded": 32, "wrong": []}
    assert writer.do("stats")["client_remote_hits"] == 0


def test_a_run_may_lie_on_both_hosts(hosts, open_client):
    both = hosts()
    for config in (both.here, both.there):
        both.donate(config)
    near, far, reader = (open_client(config) for config in (both.here, both.there, both.here))
    until_announced(reader)
    keys = new_keys(12)
    parent = b""
    for start in range(0, 12, 3):  # by turns
        assert store((near, far)[start // 3 % 2], keys[start : start + 3], parent=parent) == 3
        parent = keys[start + 2]
    assert load(reader, keys) == 12
    assert reader.counters["remote_hits"] == 6


def test_a_run_may_begin_here_go_on_there_and_end_in_the_store(hosts, processes, open_client, tmp_path):
    both = hosts(promotion={"policy": "never"}, store={"files": {"directory": str(tmp_path / "store")}})
    for config in (both.here, both.there):
        both.donate(config, "4MiB")
    until_announced(open_client(both.here, writes=False))
    tokens, blocks, elsewhere = list(range(6 * CHUNK)), list(range(12)), list(range(40, 52))
    reader = start_worker(processes, both.here)
    assert reader.do("store", tokens=tokens, blocks=blocks) == {"stored": 6}
    assert reader.do("flush") == {"flushed": True}
    with VCacheEngine(both.here, model=model_of(), role="scheduler") as engine:
        assert engine.clear() == 6, "now they are in the store alone"
    near, far = start_worker(processes, both.here), start_worker(processes, both.there)
    assert near.do("store", tokens=tokens[: 2 * CHUNK], blocks=blocks[:4]) == {"stored": 2}
    assert far.do("store", tokens=tokens[: 4 * CHUNK], blocks=blocks[:8]) == {"stored": 2}, "two are on the other host"
    assert reader.do("retrieve", tokens=tokens, blocks=elsewhere) == {"loaded": 6 * CHUNK, "wrong": []}
    stats = reader.do("stats")
    assert (stats["hits"], stats["client_remote_hits"], stats["store_hits"]) == (6, 2, 2)


def test_a_prompt_larger_than_staging_memory_is_read_in_rounds(hosts, open_client):
    both = hosts(transfer={"staging_size": "1MiB"})
    both.donate(both.there)
    writer, reader = open_client(both.there), open_client(both.here)
    until_announced(reader)
    keys = new_keys(40)
    assert store(writer, keys, nbytes=100_000) == 40
    assert load(reader, keys) == 40
    assert reader.counters["remote_no_staging"] == 0
    reader.mappings.remote.reader.staging.check_integrity()
    assert reader.mappings.remote.reader.staging.free_bytes == 1 << 20


def test_a_payload_larger_than_staging_memory_is_a_miss(hosts, open_client):
    both = hosts(transfer={"staging_size": "1MiB", "remote_timeout": 1.0})
    both.donate(both.there)
    writer, reader = open_client(both.there), open_client(both.here)
    until_announced(reader)
    keys = new_keys(2)
    assert store(writer, keys[:1]) == 1
    until(lambda: load(reader, keys[:1]) == 1, "the first chunk, once the donor's segment is open")
    assert store(writer, keys[1:], parent=keys[0], nbytes=2 << 20) == 1
    assert load(reader, keys) == 1
    assert reader.counters["remote_no_staging"] == 1
    assert reader.counters["remote_lost_hits"] == 1


def test_without_an_engine_other_hosts_are_misses(hosts, open_client):
    both = hosts(remote="none")
    both.donate(both.there)
    writer, reader = open_client(both.there), open_client(both.here)
    keys = new_keys(3)
    assert store(writer, keys) == 3
    assert load(reader, keys) == 0
    assert reader.counters["unmapped_hits"] == 3
    assert load(writer, keys) == 3


def test_what_is_overwritten_before_the_read_is_found_out(hosts, open_client):
    both = hosts()
    both.donate(both.there)
    writer, reader = open_client(both.there), open_client(both.here)
    until_announced(reader)
    keys = new_keys(5)
    assert store(writer, keys) == 5
    assert load(reader, keys) == 5
    read = begin_read(reader, keys, 0)
    assert read.hits == 5
    use = writer.use_segment(writer.session.info(int(read.placements["segment"][2])))
    row = read.placements[2]
    assert use.segment.retire(int(row["record"]), int(row["generation"]))  # leased or not: as if a lease had run out
    poke(use.segment, int(row["offset"]), bytes(65536))
    copied = copy_out(read)
    assert read.complete() == 2
    assert copied[1] == payload(keys[1])
    assert 2 not in copied, "bytes that are not the chunk's are not even handed on"
    use.release()
    assert reader.counters["invalid_reads"] == 1
    until(lambda: load(reader, keys) == 2, "the server drops what did not validate")
