"""Lookups in the server's shared memory: they say what the socket says, whatever comes and goes, and otherwise it is asked."""

from __future__ import annotations

import random

import pytest

from tests.pool.conftest import MIB, QUICK, asking
from tests.pool.payloads import copy_out, fill, load, new_keys, start_write, store, until
from tests.support.processes import host_directory
from vcache.config import VCacheConfig
from vcache.pool.client import PoolClient
from vcache.pool.reading import begin_read
from vcache.pool.session import Session
from vcache.protocol import PLACEMENT, SegmentInfo, Tier, Welcome


@pytest.fixture
def reader(quick, open_client):
    """A client that writes nothing, so that shared memory answers each of its lookups."""
    return open_client(quick[0], writes=False)


@pytest.fixture
def asker(quick, open_client):
    """A client that asks the server each time."""
    return open_client(asking(quick[0]), writes=False)


def hits(client: PoolClient, keys) -> int:
    return client.lookup(b"".join(keys)).hits


def asked(client: PoolClient) -> tuple[int, int]:
    """Lookups in shared memory, lookups by the server."""
    return client.counters["index_lookups"], client.counters["server_lookups"]


def indexes(runtime_dir) -> list[str]:
    return [path.name for path in runtime_dir.glob("index-*")]


def test_a_lookup_without_a_lease_asks_nobody(quick, open_client, open_donor, reader, asker):
    writer = open_client(quick[0])
    open_donor(quick[0])
    keys = new_keys(5)
    assert store(writer, keys) == 5
    calls = reader.counters["calls"]
    assert hits(reader, keys) == 5 == hits(asker, keys)
    assert hits(reader, [*keys[:3], *new_keys(1), *keys[3:]]) == 3
    assert hits(reader, new_keys(2)) == 0
    assert reader.counters["calls"] == calls and asked(reader) == (3, 0) and asked(asker) == (0, 1)
    leased = reader.lookup(b"".join(keys), lease_s=5.0)
    assert leased.hits == 5 and leased.lease
    assert asked(reader) == (3, 1)
    reader.release(leased.lease)


def test_a_read_asks_nobody(quick, open_client, open_donor, reader, asker):
    config, server = quick
    writer = open_client(config)
    open_donor(config)
    keys = new_keys(5)
    assert store(writer, keys) == 5
    assert load(reader, keys) == 5 == load(asker, keys)
    calls = reader.counters["calls"]
    server.suspend()
    assert load(reader, keys) == 5
    assert load(reader, [*keys[:3], *new_keys(1), *keys[3:]]) == 3
    assert load(reader, new_keys(2)) == 0
    server.resume()
    assert reader.counters["calls"] == calls and reader.counters["index_acquires"] >= 3
    assert asker.counters["index_acquires"] == 0
    until(
        lambda: (stats := asker.stats()) is not None and stats.leases == 0,
        "the leases that were asked for are given back",
    )


def test_what_goes_while_it_is_read_by_what_memory_said_is_not_loaded(quick, open_client, open_donor, reader):
    config, _ = quick
    writer = open_client(config)
    open_donor(config)
    keys = new_keys(4)
    assert store(writer, keys) == 4
    assert load(reader, keys) == 4
    read = begin_read(reader, keys, 0)
    assert read.hits == 4 and reader.counters["index_acquires"] >= 1
    assert writer.remove(keys[2]) == 1
    copy_out(read)
    assert read.complete() == 2
    assert reader.counters["invalid_reads"] == 1
    assert load(reader, keys) == 2


def test_a_client_finds_what_it_has_just_committed(quick, open_client, open_donor):
    writer = open_client(quick[0])
    open_donor(quick[0])
    for _ in range(50):
        keys = new_keys(2)
        write = start_write(writer, keys)
        fill(write, keys)
        assert write.complete() == 2
        assert hits(writer, keys) == 2
        assert hits(writer, keys) == 2
    assert asked(writer) == (50, 50), "once by the server, which has then read the commit; from then on from memory"


def test_a_client_that_reported_a_record_does_not_find_it_any_more(quick, open_client, open_donor):
    config, _ = quick
    writer, other = open_client(config), open_client(config, writes=False)
    open_donor(config)
    keys = new_keys(3)
    assert store(writer, keys) == 3
    acquired = other.acquire(b"".join(keys), 0)
    assert acquired is not None and hits(other, keys) == 3
    other.release(acquired.lease, invalid=[int(acquired.placements["generation"][1])])
    assert hits(other, keys) == 1


def test_it_says_what_the_server_says_whatever_comes_and_goes(quick, open_client, open_donor, reader, asker):
    config, _ = quick
    writers = [open_client(config), open_client(config)]
    donor = open_donor(config, size=2 * MIB)  # 30 chunks or so: the server evicts
    chooser = random.Random(5)
    chains = [new_keys(6) for _ in range(12)]
    seen = 0
    for _ in range(150):
        chain, writer = chooser.choice(chains), chooser.choice(writers)
        match chooser.randrange(6):
            case 0 | 1 | 2:
                store(writer, chain[: chooser.randint(1, 6)])
            case 3:
                assert writer.remove(chooser.choice(chain)) is not None
                assert writer.settle(60)
            case 4:
                load(writer, chain)
            case _:
                if not chooser.randrange(8):
                    assert writer.clear() is not None
        for keys in chooser.sample(chains, 4):
            # What the tick evicts between the two is in neither afterwards: then both are asked again.
            until(lambda keys=keys: hits(reader, keys) == hits(asker, keys), "they agree")
            seen += hits(reader, keys)
    assert seen > 0 and asked(reader)[0] > 600
    stats = asker.stats()
    assert stats is not None and stats.counters["evicted"] > 0 and stats.counters["removed"] > 0
    donor.segment.check_integrity()


@pytest.mark.parametrize("how", ["remove", "clear", "clear_tenant"])
def test_what_the_server_says_is_removed_is_not_found(quick, open_client, open_donor, reader, how):
    writer = open_client(quick[0])
    open_donor(quick[0])
    keys = new_keys(8)
    for _ in range(20):
        assert store(writer, keys) == 8
        assert hits(reader, keys) == 8
        if how == "remove":
            assert writer.remove(b"".join(keys[2:4])) == 2
            assert hits(reader, keys) == 2
            assert writer.remove(b"".join(keys)) == 6
        else:
            assert writer.clear(None if how == "clear" else 0) == 8
        assert all(hits(reader, [name]) == 0 for name in keys)
    assert asked(reader)[0] > 0


def test_what_lives_too_long_is_not_found(quick, open_client, open_donor, reader, asker):
    writer = open_client(quick[0])
    open_donor(quick[0])
    brief, lasting = new_keys(2), new_keys(2)
    assert store(writer, brief, ttl_s=1) == 2 == store(writer, lasting)
    until(lambda: not hits(asker, brief), "they have ended")
    assert hits(reader, brief) == 0 and hits(reader, lasting) == 2


def test_a_killed_donor_takes_its_chunks_along(quick, processes, open_client, open_donor, reader, asker):
    config, _ = quick
    open_donor(config)
    child = processes.python("-m", "vcache.cli", "donate", "--device", "cpu:1", "--size", "32MiB", config=config)
    child.expect("donating")
    near, far = open_client(config), open_client(config, device="cpu:1")
    safe, doomed = new_keys(4), new_keys(4)
    assert store(near, safe) == store(far, doomed) == 4
    assert hits(reader, safe) == hits(reader, doomed) == 4
    child.kill()
    until(lambda: not hits(asker, doomed), "the server has noticed")
    assert hits(reader, doomed) == 0 and hits(reader, safe) == 4


def test_a_killed_server_is_noticed_at_once_and_its_successor_found(
    quick, processes, open_client, open_donor, reader, runtime_dir
):
    config, server = quick
    writer = open_client(config)
    open_donor(config)
    keys = new_keys(4)
    assert store(writer, keys) == 4 == hits(reader, keys)
    left = indexes(runtime_dir)
    assert len(left) == 1
    server.kill()
    assert hits(reader, keys) == 0 and asked(reader)[0] == 1, "it asked the dead server rather than its memory"
    processes.server(config)
    assert len(indexes(runtime_dir)) == 1 and indexes(runtime_dir) != left, "what the dead one left is removed"
    until(lambda: hits(reader, keys) == 4, "the chunks are back")
    until(lambda: hits(reader, keys) == 4 and asked(reader)[0] > 1, "they are found in memory again")


def test_a_suspended_server_s_memory_answers_until_its_silence_is_noticed(quick, open_client, open_donor, reader):
    config, server = quick
    writer = open_client(config)
    open_donor(config)
    keys = new_keys(4)
    assert store(writer, keys) == 4 == hits(reader, keys)
    server.suspend()
    try:
        until(lambda: not reader.available, "the heartbeats go unanswered")
        assert hits(reader, keys) == 0
    finally:
        server.resume()
    assert reader.wait_available(60)
    assert hits(reader, keys) == 4


def test_a_server_that_ends_leaves_no_index(start_server, open_client, runtime_dir):
    config, server = start_server(**QUICK)
    client = open_client(config)
    hits(client, new_keys(1))
    assert len(indexes(runtime_dir)) == 1 and asked(client) == (1, 0)
    assert server.stop() == 0
    assert indexes(runtime_dir) == []
    hits(client, new_keys(1))
    assert asked(client)[0] == 1


#: More than the smallest table takes, in one segment.
MANY, AT_ONCE = 11_000, 500
ROOMY = {"segment": {"records": 12_000}}


def test_it_grows_under_its_readers(start_server, open_client, open_donor, runtime_dir):
    config, _ = start_server(**ROOMY)
    writer, reader = open_client(config), open_client(config, writes=False)
    open_donor(config, size=64 * MIB)
    names = new_keys(MANY)
    [before] = [path.stat().st_size for path in runtime_dir.glob("index-*")]
    for end in range(AT_ONCE, MANY + 1, AT_ONCE):
        part = names[end - AT_ONCE : end]
        assert store(writer, part, nbytes=4096) == AT_ONCE
        assert hits(reader, part) == AT_ONCE and hits(reader, names[:end]) == end
    [after] = [path.stat().st_size for path in runtime_dir.glob("index-*")]
    assert after > before and asked(reader)[1] == 0


def test_an_index_beyond_its_limit_is_given_up_and_the_server_asked(start_server, open_client, open_donor, runtime_dir):
    config, server = start_server(**ROOMY, server={"shared_index": "400KiB"})
    writer, reader = open_client(config), open_client(config, writes=False)
    open_donor(config, size=64 * MIB)
    names = new_keys(MANY)
    for end in range(AT_ONCE, MANY + 1, AT_ONCE):
        assert store(writer, names[end - AT_ONCE : end], nbytes=4096) == AT_ONCE
        assert hits(reader, names[:end]) == end
    assert asked(reader) == (20, 2)
    assert indexes(runtime_dir) == [] and "the index in shared memory ends" in server.log.read_text()


def test_without_the_setting_there_is_none(start_server, open_client, runtime_dir):
    config, _ = start_server(**{**QUICK, "server": {**QUICK["server"], "shared_index": 0}})
    client = open_client(config)
    assert hits(client, new_keys(1)) == 0
    assert asked(client) == (0, 1) and indexes(runtime_dir) == []


def test_a_client_on_another_host_asks_the_server(runtime_dir, processes, open_client, open_donor):
    endpoint = f"ipc://{runtime_dir}/server.sock"
    config = VCacheConfig(
        runtime_dir=str(runtime_dir), **{**QUICK, "server": {**QUICK["server"], "endpoint": endpoint}}
    )
    processes.server(config)
    writer = open_client(config)
    open_donor(config)
    keys = new_keys(3)
    assert store(writer, keys) == 3
    with host_directory() as elsewhere:
        far = PoolClient(config.model_copy(update={"runtime_dir": str(elsewhere)}), device="cpu:0", writes=False)
        try:
            assert far.wait_available(60)
            assert hits(far, keys) == 3 and asked(far) == (0, 1)
        finally:
            far.close()


def test_a_lookup_after_close_finds_nothing(quick, open_client, open_donor, reader):
    writer = open_client(quick[0])
    open_donor(quick[0], size=4 * MIB)
    keys = new_keys(2)
    assert store(writer, keys) == 2 == hits(reader, keys)
    reader.close()
    assert hits(reader, keys) == 0


HERE, THERE = b"h" * 16, b"t" * 16
GPU = "6c1b9f4e-0000-0000-0000-000000000000"


@pytest.mark.parametrize(
    ("host", "device", "handle", "may_be_read"),
    [
        (HERE, "cpu:0", b"segment", True),
        (HERE, GPU, b"vmm 2097152 segment.sock", True),
        (HERE, GPU, b"ipc " + bytes(64), False),
        (THERE, "cpu:0", b"segment", False),
    ],
)
def test_without_a_lease_that_is_known_to_be_held_nothing_is_read_that_its_donor_may_free(
    host: bytes, device: str, handle: bytes, may_be_read: bool
) -> None:
    session = Session(b"s" * 16, host=HERE)
    info = SegmentInfo(3, b"i" * 16, 1, Tier.VRAM, host, device, 1 << 21, handle, "")
    session.open(Welcome(1, 7, 1.0, 10.0, [info], "index"))
    found = session.found(7, PLACEMENT.pack(3, 0, 2, 4096, 4096), name=5)
    assert (found is not None) is may_be_read
    assert session.released(-5) is may_be_read, "a lease that is not asked for is not held"
