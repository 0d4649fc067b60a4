"""The client: an empty cache while there is no server, a session as soon as there is one, and no late reply mistaken."""

from __future__ import annotations

import os
import threading

import pytest
import zmq

from tests.pool.conftest import QUICK, asking
from tests.pool.payloads import load, new_keys, start_write, store, until
from vcache import protocol
from vcache.config import VCacheConfig
from vcache.errors import ConfigError
from vcache.pool.client import PoolClient
from vcache.pool.locating import locate
from vcache.pool.reading import begin_read
from vcache.protocol import PLACEMENT, Grants, Hits, Located, Outcome, Placements, SegmentInfo, Tier, Welcome

KEYS = b"".join(new_keys(3))


def answers_like_an_empty_cache(client: PoolClient) -> None:
    assert not client.available
    assert client.lookup(KEYS, 1.0).hits == 0
    assert client.acquire(KEYS, 0) is None
    assert client.reserve(KEYS, parent=b"", rank=0, ranks=1, nbytes=4096, tokens=256, tenant=0) is None
    assert client.pin(KEYS, 1.0) == client.unpin(KEYS) == 0
    assert (client.remove(KEYS), client.clear(), client.settle(0.05)) == (None, None, False)
    assert client.stats() is None
    client.commit([2])
    client.abort([4])
    client.touch(KEYS)
    client.release(7, [0])


def test_without_a_server_it_is_an_empty_cache_at_once(runtime_dir, open_client):
    client = open_client(VCacheConfig(runtime_dir=str(runtime_dir), **QUICK), available=False)
    answers_like_an_empty_cache(client)
    assert client.counters["calls"] == 0, "no call may wait for a server known to be away"
    assert client.counters["calls_skipped"] == 9


def test_a_removal_that_is_not_answered_counts_as_timed_out(quick, open_client, monkeypatch):
    monkeypatch.setattr("vcache.pool.client._REMOVAL_EXTRA_S", -2.0)  # a second is left of the liveness deadline
    config, server = quick
    client = open_client(config)
    server.suspend()
    assert client.remove(KEYS) is None
    assert client.counters["calls_timed_out"] == 1
    server.resume()


def test_it_connects_by_itself_once_there_is_a_server(runtime_dir, open_client, open_donor, processes):
    config = VCacheConfig(runtime_dir=str(runtime_dir), **QUICK)
    client = open_client(config, available=False)
    donor = open_donor(config, client, registered=False)
    processes.server(config)
    assert client.wait_available(60)
    assert donor.wait_registered(60)
    keys = new_keys(2)
    assert store(client, keys) == 2
    assert load(client, keys) == 2


def test_closing_twice_is_harmless_and_what_is_closed_answers_like_an_empty_cache(quick, open_client, runtime_dir):
    config, _ = quick
    client = open_client(config)
    assert len(list(runtime_dir.glob("client-*.lock"))) == 1
    client.close()
    client.close()
    answers_like_an_empty_cache(client)
    assert not list(runtime_dir.glob("client-*.lock"))


def test_closing_without_a_server_does_not_wait_for_one(runtime_dir):
    client = PoolClient(VCacheConfig(runtime_dir=str(runtime_dir), **QUICK), device="cpu:0", writes=True)
    client.close()
    assert not list(runtime_dir.glob("client-*.lock"))


def test_only_a_client_that_writes_holds_a_lock_and_may_reserve(quick, open_client, runtime_dir):
    config, _ = quick
    client = open_client(config, writes=False)
    assert not list(runtime_dir.glob("client-*.lock"))
    with pytest.raises(ValueError, match="writes"):
        start_write(client, new_keys(1))


@pytest.mark.parametrize("keys", [b"", b"x" * 15, b"x" * 16 * (protocol.MAX_KEYS_PER_CALL + 1)])
def test_keys_that_are_none_are_an_error_of_the_caller(runtime_dir, open_client, keys):
    client = open_client(VCacheConfig(runtime_dir=str(runtime_dir), **QUICK), available=False)
    for call in (client.lookup, client.touch, client.remove):
        with pytest.raises(ValueError, match="keys: "):
            call(keys)


def test_a_forked_child_has_an_empty_cache_and_cannot_end_its_parents(quick, open_client, open_donor):
    config, _ = quick
    client = open_client(config)
    open_donor(config, client)
    keys = new_keys(1)
    assert store(client, keys) == 1
    child = os.fork()
    if child == 0:
        try:
            answers_like_an_empty_cache(client)
            client.close()
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == 0
    assert load(client, keys) == 1
    assert not client.runtime.is_dead(client.session.id)


def test_many_threads_share_a_client(quick, open_client, open_donor):
    config, _ = quick
    client = open_client(config)
    open_donor(config, client, size=64 << 20)  # with more records than the threads need: nothing is evicted
    failures = []

    def work():
        try:
            for _ in range(20):
                keys = new_keys(2)
                assert store(client, keys, nbytes=4096) == 2
                assert load(client, keys) == 2
        except BaseException as error:
            failures.append(error)
            raise

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    until(lambda: (stats := client.stats()) and not stats.reservations and not stats.leases, "all given back")
    assert client.counters["stale_replies"] == 0


def test_a_silent_server_costs_one_deadline_and_then_none_until_it_answers(quick, open_client, open_donor):
    config, server = quick
    client = open_client(asking(config))
    open_donor(config, client)
    keys = new_keys(1)
    assert store(client, keys) == 1
    server.suspend()
    assert load(client, keys) == 0
    before = client.counters["calls"]
    for _ in range(100):
        assert load(client, keys) == 0
    assert client.counters["calls"] == before
    server.resume()
    until(lambda: client.available, "the server is found again")
    until(lambda: load(client, keys) == 1, "the entry is there still")


def test_bad_curve_keys_fail_at_construction_and_leave_nothing(runtime_dir):
    config = VCacheConfig(
        runtime_dir=str(runtime_dir),
        server={
            "endpoint": "tcp://10.0.0.1:5555",
            "curve": {"server_public_key_file": "/nowhere.key", "client_secret_key_file": "/nowhere.key_secret"},
        },
    )
    with pytest.raises(ConfigError, match="client_secret_key_file"):
        PoolClient(config, device="cpu:0", writes=True)
    assert not list(runtime_dir.glob("client-*.lock"))


class ScriptedServer:
    """A ROUTER on the pool's endpoint that answers as a test says: a real server cannot be made to answer late or wrongly."""

    def __init__(self, config: VCacheConfig) -> None:
        self._context: zmq.Context = zmq.Context()
        self.socket = self._context.socket(zmq.ROUTER)
        self.socket.linger = 0
        self.socket.bind(config.endpoint)
        self.term = 1
        self.received: list[protocol.AnyRequest] = []
        self.held: list[tuple[bytes, protocol.AnyRequest]] = []
        self.hold: tuple[type, ...] = ()
        self.info = SegmentInfo(5, b"s" * 16, 1, Tier.DRAM, b"h" * 16, "cpu:9", 1 << 20, b"", "elsewhere")
        self._lock = threading.Lock()  # a socket is used by one thread at a time
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.wait(0.001):
            with self._lock:
                if not self.socket.poll(10):
                    continue
                sender, message = self.socket.recv_multipart()
            request = protocol.decode_request(message)
            self.received.append(request)
            if isinstance(request, self.hold):
                self.held.append((sender, request))
            else:
                self.answer(sender, request)

    def answer(self, sender: bytes, request: protocol.AnyRequest) -> None:
        if isinstance(request, protocol.Hello):
            reply: protocol.AnyReply = Welcome(request.id, self.term, 0.05, 2.0, [self.info])
        elif isinstance(request, protocol.Heartbeat):
            reply = protocol.Orders(request.id, self.term, [], [], [], [], [], [], [])
        elif isinstance(request, protocol.Lookup):
            reply = Hits(request.id, request.term, 1, 11)
        elif isinstance(request, protocol.Acquire):
            reply = Placements(request.id, request.term, 12, PLACEMENT.pack(5, 0, 2, 4096, 4096), [])
        elif isinstance(request, protocol.Locate):
            reply = Located(request.id, request.term, b"\1\0\1", 12)
        elif isinstance(request, protocol.Allocate):
            placement = PLACEMENT.pack(5, 1, 102, 8192, request.nbytes)
            reply = Grants(request.id, request.term, bytes([Outcome.GRANTED]), placement, [])
        elif isinstance(request, protocol.Reserve):
            placement = PLACEMENT.pack(5, 1, 102, 8192, request.nbytes)
            reply = Grants(request.id, request.term, bytes([Outcome.GRANTED, *[Outcome.EXISTS] * 2]), placement, [])
        else:
            return
        self.send(sender, protocol.encode(reply))

    def send(self, recipient: bytes, message: bytes) -> None:
        with self._lock:
            self.socket.send_multipart([recipient, message])

    def of(self, kind: type) -> list:
        return [request for request in list(self.received) if isinstance(request, kind)]

    def close(self) -> None:
        self._stop.set()
        self._thread.join()
        self.socket.close()
        self._context.term()


@pytest.fixture
def scripted(runtime_dir):
    config = VCacheConfig(
        runtime_dir=str(runtime_dir), server=QUICK["server"], client={"call_timeout": 0.2, "lease": 30.0}
    )
    server = ScriptedServer(config)
    yield config, server
    server.close()


def reserve(client: PoolClient):
    return client.reserve(KEYS, parent=b"", rank=0, ranks=1, nbytes=4096, tokens=256, tenant=0)


def allocate(client: PoolClient):
    return client.ask(
        Grants,
        lambda id_, session, term: protocol.Allocate(id_, session, term, 5, 1, 4096, 0),
        lambda reply: reply,
    )


@pytest.mark.parametrize(("kind", "ask"), [(protocol.Reserve, reserve), (protocol.Allocate, allocate)])
def test_grants_that_come_too_late_are_given_back_at_once(scripted, open_client, kind, ask):
    config, server = scripted
    client = open_client(config)
    server.hold = (kind,)
    assert ask(client) is None
    server.hold = ()
    server.answer(*server.held.pop())
    until(lambda: client.available, "a heartbeat is answered")
    assert client.lookup(KEYS).hits == 1
    until(lambda: server.of(protocol.Abort), "the abort")
    assert server.of(protocol.Abort)[0].generations == [102]
    assert client.counters["stale_replies"] == 1
    assert client.session.evidence() == (102, [])


@pytest.mark.parametrize(
    ("kind", "ask"),
    [
        (protocol.Acquire, lambda client: client.acquire(KEYS, 0)),
        (protocol.Locate, lambda client: locate(client, KEYS, 1.0)),
    ],
)
def test_leases_that_come_too_late_are_released(scripted, open_client, kind, ask):
    config, server = scripted
    client = open_client(config)
    server.hold = (kind,)
    assert ask(client) is None
    server.hold = ()
    server.answer(*server.held.pop())
    until(lambda: client.available, "a heartbeat is answered")
    assert client.lookup(KEYS).hits == 1
    until(lambda: server.of(protocol.Release), "the release")
    assert server.of(protocol.Release)[0].lease == 12


def test_replies_of_an_earlier_term_are_no_replies(scripted, open_client):
    config, server = scripted
    client = open_client(config)
    late = reserve(client)
    assert late is not None
    generation = int(late.placements["generation"][0])
    assert client.session.evidence() == (102, [generation])
    epoch = client.session.epoch
    server.term = 2
    client.background.end_session(epoch)
    until(lambda: client.available and client.term == 2, "a session in the new term")
    [hello] = [hello for hello in server.of(protocol.Hello) if hello.outstanding]
    assert hello.term == 0
    said = hello.outstanding[0]
    assert (said.generation, said.key, said.parent, said.record, said.offset) == (102, KEYS[:16], b"", 1, 8192)
    assert (said.segment_id, said.incarnation) == (b"s" * 16, 1)
    server.term = 1  # the request was answered before the restart, and its reply comes after the hello
    assert (
        client.session.granted(
            server.of(protocol.Reserve)[0], Grants(9, 1, b"\0\1\1", PLACEMENT.pack(5, 3, 104, 0, 1), []), 3
        )
        is None
    )
    assert not client.session.leased(1, 99)
    assert client.session.evidence() == (0, [102])


def test_a_commit_without_a_session_is_told_with_the_next_one(scripted, open_client):
    config, server = scripted
    client = open_client(config)
    assert reserve(client) is not None
    server.hold = (protocol.Hello,)
    # Not told to the thread that says hello: it finds out a moment later.
    assert client.session.end(client.session.epoch)
    client.commit([102])
    server.term = 2
    until(lambda: server.held, "a hello")
    assert server.held[0][1].outstanding == [], "what is committed in memory is the donor's to tell of"
    assert not server.of(protocol.Commit)
    server.hold = ()
    until(lambda: server.of(protocol.Commit), "the commit")
    commit = server.of(protocol.Commit)[0]
    assert (commit.term, commit.generations) == (2, [102])
    until(lambda: client.session.evidence() == (0, []), "nothing is outstanding")


def test_a_server_that_answers_hellos_late_is_given_longer(scripted, open_client):
    config, server = scripted
    server.hold = (protocol.Hello,)
    client = open_client(config, available=False)
    timers: list[threading.Timer] = []

    def answer_in_time_of_a_longer_wait() -> bool:
        held = list(server.held)
        timers.append(
            threading.Timer(1.5 * config.client.call_timeout, lambda: [server.answer(*hello) for hello in held])
        )
        timers[-1].start()
        until(lambda: client.available or len(server.held) > len(held), "its answer, or another hello")
        return bool(client.available)

    until(answer_in_time_of_a_longer_wait, "a session")
    for timer in timers:
        timer.join()


def test_an_error_about_an_earlier_session_does_not_end_the_present_one(scripted, open_client):
    config, _ = scripted
    client = open_client(config)
    epoch = client.session.epoch
    client.background.end_session(epoch)
    until(lambda: client.available, "the second session")
    client.background.end_session(epoch)
    assert client.available
    assert client.counters["sessions_lost"] == 1


def test_garbage_from_a_server_is_counted_and_survived(scripted, open_client):
    config, server = scripted
    client = open_client(config)
    server.hold = (protocol.Lookup,)
    thread = threading.Thread(target=client.lookup, args=(KEYS,))
    thread.start()
    until(lambda: server.held, "the call")
    sender, request = server.held.pop()
    for garbage in (b"", b"\xc1", b"\x93\x01\x02\x03", os.urandom(200)):
        server.send(sender, garbage)
    server.hold = ()
    server.answer(sender, request)
    thread.join()
    assert client.counters["bad_replies"] == 4
    assert client.counters["calls_timed_out"] == 0


def test_a_client_that_closes_with_a_grant_outstanding_is_neither_gone_nor_dead(scripted, open_client):
    config, server = scripted
    client = open_client(config)
    assert reserve(client) is not None
    client.close()
    assert not server.of(protocol.Goodbye)
    assert not client.runtime.is_dead(client.session.id)
    client.abort([102])
    assert client.runtime.is_dead(client.session.id), "its last write has ended"


def test_a_placement_in_a_segment_nobody_told_of_is_a_miss_not_an_error(scripted, open_client):
    config, server = scripted
    client = open_client(config)
    client.session.forget(5)
    read = begin_read(client, [KEYS[:16]], 0)
    assert (read.hits, read.complete()) == (0, 0)
    write = start_write(client, [KEYS[:16], KEYS[16:32], KEYS[32:]], nbytes=4096)
    assert (len(write.granted), write.outcomes[0], write.complete()) == (0, Outcome.DECLINED, 0)
    until(lambda: server.of(protocol.Abort) and server.of(protocol.Release), "lease and grant are given back")
    assert client.session.evidence() == (102, [])
    assert client.counters["unmapped_hits"] == client.counters["unmapped_grants"] == 1
