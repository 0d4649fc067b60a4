"""Interleavings that chaos runs and reviews have found, each as small as it can be made."""

from __future__ import annotations

import ctypes
import os
import re
import secrets
import signal
import threading
from pathlib import Path

from tests.pool import conftest
from tests.pool.payloads import PATIENCE_S, fill, load, new_keys, start_write, store, until
from tests.support.processes import processes_using
from vcache import protocol
from vcache.config import VCacheConfig
from vcache.memory.host import HostMemory
from vcache.pool.runtime_dir import RuntimeDir
from vcache.protocol import PLACEMENT, Done, Outcome
from vcache.server_query import fetch_stats
from vram_metadata_server.integrity import check_integrity
from vram_metadata_server.service import Service
from vram_metadata_server.settings import ServiceSettings

open_client, open_donor, quick = conftest.open_client, conftest.open_donor, conftest.quick
HOST = b"the-one-host-016"
DATA = 1 << 20
_TGKILL = 234  # x86-64's system call: a signal for one thread of another process


def segments_of(config: VCacheConfig) -> list[protocol.SegmentStats]:
    return fetch_stats(config, timeout_s=PATIENCE_S).segments


class Conversation:
    """A state machine with one donor ("d") and one writer ("w"), talked to message by message."""

    def __init__(self) -> None:
        self.service = Service(ServiceSettings(), term=1000)
        self.next_id = 0
        self.now = 0.0
        for name, writes in (("d", False), ("w", True)):
            self.ask(name, protocol.Hello, protocol.PROTOCOL_VERSION, HOST, name, "cpu:0", writes, [], term=0)
        registered = self.ask(
            "d",
            protocol.RegisterSegment,
            b"s" * 16,
            1,
            protocol.Tier.DRAM,
            "cpu:0",
            DATA + 4096,
            4096,
            64,
            b"h",
            "",
            [],
        )
        self.number = registered.number
        self.ask("d", protocol.Handover, self.number, [], True)

    def tell(self, name: str, kind: type, *fields, term: int = 1000) -> int:
        self.next_id += 1
        message = kind(self.next_id, name.encode() * 16, term, *fields)
        self.out = self.service.handle(name.encode(), message, self.now)
        check_integrity(self.service)
        return self.next_id

    def ask(self, name: str, kind: type, *fields, term: int = 1000):
        """The reply to a request; None when it is not answered yet."""
        request = self.tell(name, kind, *fields, term=term)
        return next((reply for _, reply in self.out if reply.id == request), None)

    def tick(self) -> list:
        self.now += 0.1
        out = self.service.tick(self.now, True)
        check_integrity(self.service)
        return [reply for _, reply in out]

    def reserve(self, key: bytes) -> int:
        """The generation granted."""
        grants = self.ask("w", protocol.Reserve, key, b"", 0, 1, 4096, 256, 0, 0, 0.0)
        assert grants.outcomes[0] == Outcome.GRANTED
        return int(PLACEMENT.unpack(grants.placements)[2])


def test_a_write_committed_in_a_draining_segment_leaves_no_entry_behind():
    pool = Conversation()
    key = b"k" * 16
    generation = pool.reserve(key)
    pool.tell("d", protocol.DrainSegment, pool.number)
    pool.tick()
    pool.tell("w", protocol.Commit, [generation])
    for _ in range(3):
        pool.tick()
    assert pool.ask("w", protocol.Lookup, key, 0.0).hits == 0
    assert pool.ask("w", protocol.Stats).entries == 0


def test_a_removal_waits_for_a_record_that_a_clear_under_way_has_yet_to_find():
    pool = Conversation()
    key = b"k" * 16
    generation = pool.reserve(key)
    pool.tell("w", protocol.Commit, [generation])
    assert pool.ask("w", protocol.Clear, 0, True) is None
    removal = pool.tell("w", protocol.Remove, key)
    assert not any(reply.id == removal for _, reply in pool.out), "answered, and the record is still in memory"
    pool.tick()
    pool.tell("d", protocol.Retired, pool.number, [protocol.RetireItem(0, generation)])
    assert any(isinstance(reply, Done) and reply.id == removal for _, reply in pool.out)


def test_a_segment_of_a_dead_donor_is_removed_though_a_child_that_it_forked_lives(runtime_dir):
    ready, tell = os.pipe()
    donor = os.fork()
    if not donor:
        memory = HostMemory.create(RuntimeDir(runtime_dir), secrets.token_bytes(16), 1 << 20)
        if not os.fork():
            os.write(tell, f"{os.getpid()} {memory.handle.decode()}\n".encode())
        signal.pause()
    child, name = os.read(ready, 100).decode().split()
    try:
        os.kill(donor, signal.SIGKILL)
        os.waitpid(donor, 0)
        assert RuntimeDir(runtime_dir).sweep() == [name]
    finally:
        os.kill(int(child), signal.SIGKILL)
        os.close(ready)
        os.close(tell)
        until(lambda: not processes_using(runtime_dir), "the child's end")


def test_a_handover_goes_on_after_a_page_that_could_not_be_sent(quick, open_client, open_donor, processes):
    config, server = quick
    writer = open_client(config)
    donor = open_donor(config)
    keys = new_keys(8)
    assert store(writer, keys) == 8
    background = donor._client.background
    send = background._send
    refused: list[int] = []
    goes_again = threading.Event()

    def refuse_pages(make):
        if goes_again.is_set() or not isinstance(make(1, b"s" * 16, 1), protocol.Handover):
            return send(make)
        refused.append(1)
        return 0

    background._send = refuse_pages
    server.kill()
    processes.server(config)
    until(lambda: refused, "a page that cannot be sent")
    goes_again.set()
    assert donor.wait_registered(PATIENCE_S)
    until(lambda: load(writer, keys) == 8, "the entries are back")
    assert donor._client.counters["failures"] == 0


def test_an_idle_client_notices_that_the_server_is_gone(quick, open_client):
    config, server = quick
    client = open_client(config)
    server.kill()
    until(lambda: not client.available, "the server's death is noticed")


def test_a_client_closed_while_the_server_was_away_closes_no_gate(quick, open_client, open_donor, processes):
    config, server = quick
    open_donor(config)
    writer = open_client(config)
    keys = new_keys(2)
    write = start_write(writer, keys)
    fill(write, keys)
    server.kill()
    until(lambda: writer.lookup(b"".join(keys)).hits == 0 and not writer.available, "the server's death is noticed")
    assert write.complete() == 2
    writer.close()
    other = open_client(config, available=False)
    processes.server(config)
    assert other.wait_available(60)
    until(lambda: "serving" in [segment.state for segment in segments_of(config)], "an open gate")
    assert load(other, keys) == 2


def test_a_write_that_ends_after_its_client_was_closed_gives_its_space_back(quick, open_client, open_donor):
    """Else a process that closes its engine while a store is under way would hold the space until its own end."""
    config, _ = quick
    open_donor(config)
    writer = open_client(config)
    keys = new_keys(2)
    write = start_write(writer, keys)
    writer.close()
    fill(write, keys)
    assert write.complete() == 2
    until(lambda: not segments_of(config)[0].records_used, "the space is free")
    assert writer.reserve(keys[0], parent=b"", rank=0, ranks=1, nbytes=1, tokens=1, tenant=0) is None


def test_a_gate_opens_though_a_writer_says_hello_only_after_the_scan(quick, open_client, open_donor, processes):
    config, server = quick
    donor = open_donor(config)
    writer = open_client(config)
    keys = new_keys(3)
    assert store(writer, keys) == 3
    term = writer.term
    hello, may_say_hello = writer.background._hello, threading.Event()
    writer.background._hello = lambda now: hello(now) if may_say_hello.wait(0.05) else None
    server.kill()
    processes.server(config)
    until(lambda: donor.term > term and donor.registered, "the donor's registration")
    assert segments_of(config)[0].state == "gated"
    may_say_hello.set()
    until(lambda: segments_of(config)[0].state == "serving", "an open gate")
    until(lambda: load(writer, keys) == 3, "the entries are back")
    assert donor.registered


def test_a_donor_with_the_shortest_deadline_does_not_take_its_own_pauses_for_a_suspension(
    start_server, open_client, open_donor, processes
):
    """Else each restart of the server would empty the pool."""
    config, server = start_server(server={"heartbeat_interval": 1.0, "liveness_timeout": 3.0})
    donor = open_donor(config)
    background = donor._client.background
    server.kill()
    seen = [background._last_loop]
    until(lambda: seen.append(background._last_loop) or len(set(seen)) > 6, "some rounds without a server")
    assert background._suspended_at is None


def test_a_donor_ends_when_another_of_its_threads_takes_the_signal(server, config, processes):
    """The kernel may give it to any, and does so just after a SIGCONT: the main thread's wait is not interrupted then."""
    donor = processes.python("-m", "vcache.cli", "donate", "--device", "cpu:0", "--size", "2MiB", config=config)
    donor.expect("donating")
    term = 1 << (signal.SIGTERM - 1)
    takers = [
        int(task.name)
        for task in Path(f"/proc/{donor.pid}/task").iterdir()
        if int(task.name) != donor.pid
        and not int(re.findall(r"SigBlk:\s+(\w+)", (task / "status").read_text())[0], 16) & term
    ]
    assert ctypes.CDLL(None).syscall(_TGKILL, donor.pid, takers[0], signal.SIGTERM) == 0
    assert donor.wait() == 0
