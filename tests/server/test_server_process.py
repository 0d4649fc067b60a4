"""The server as a process: whatever comes over its socket, it answers what it can, counts it, and lives on."""

from __future__ import annotations

import os
import secrets
import signal
import socket as sockets
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq

from tests.server.dealer import Dealer
from tests.server.world import key
from tests.support.processes import PATIENCE_S, Child, Processes, wait_until_serving
from vcache import protocol
from vcache.config import VCacheConfig
from vcache.curve import create_key_files
from vcache.errors import UnavailableError
from vcache.protocol import ErrorCode
from vcache.server_query import fetch_stats

QUICK = {"heartbeat_interval": 0.2, "liveness_timeout": 1.0}
StartServer = Callable[..., tuple[VCacheConfig, Child]]


@pytest.fixture
def dealer(server: Child, config: VCacheConfig) -> Iterator[Dealer]:
    with Dealer(config) as dealer:
        yield dealer


def until(condition: Callable[[], bool]) -> None:
    """Waits for what another process does; every look at it is a round trip to the server."""
    for _ in range(100_000):
        if condition():
            return
    raise AssertionError("it never came to be")


# --- what cannot be read ------------------------------------------------------------------------------------------------


def test_garbage_is_answered_counted_and_survived(dealer: Dealer, server: Child) -> None:
    pieces = [b"", b"\x00", b"\xff" * 100, b"\x93\x01\x02\x03", b"\xdd\xff\xff\xff\xff", secrets.token_bytes(10_000)]
    for piece in pieces:
        reply = dealer.raw(piece)
        assert isinstance(reply, protocol.Error) and reply.code is ErrorCode.BAD_REQUEST
    assert dealer.stats().counters["bad_messages"] == len(pieces)
    assert server.running


def test_every_truncation_of_a_request_is_refused_under_its_id(dealer: Dealer) -> None:
    dealer.hello()
    whole = dealer.message(protocol.Lookup, key(1), 0.0)
    for length in range(len(whole)):
        reply = dealer.raw(whole[:length])
        assert isinstance(reply, protocol.Error) and reply.code is ErrorCode.BAD_REQUEST
        assert reply.id == (dealer.next_id if length >= 3 else 0)  # head, tag, id: a byte each
    assert dealer.raw(whole).hits == 0


def test_a_message_a_little_too_large_is_answered_one_far_too_large_is_cut_off(
    dealer: Dealer, config: VCacheConfig
) -> None:
    limit = config.server.max_message_bytes
    reply = dealer.raw(bytes(limit + 1))
    assert reply.code is ErrorCode.BAD_REQUEST and str(limit + 1) in reply.text
    with Dealer(config) as other:
        other.socket.send(bytes(2 * limit + 1))
        assert dealer.stats().counters["bad_messages"] == 1
        assert other.stats().counters["bad_messages"] == 1, "ZeroMQ has connected it anew"


def test_another_protocol_version_is_refused_and_named(dealer: Dealer) -> None:
    reply = dealer.hello(version=99)
    assert reply.code is ErrorCode.BAD_VERSION and "99" in reply.text and "2" in reply.text


def test_unknown_tags_and_replies_nobody_asked_for_are_refused(dealer: Dealer) -> None:
    dealer.hello()
    unknown = protocol.encode([99, 7, dealer.session, dealer.term])
    for message in (
        unknown,
        protocol.encode(protocol.Done(7, 1)),
        protocol.encode(protocol.Orders(7, 1, [], [], [], [], [], [], [])),
    ):
        reply = dealer.raw(message)
        assert (reply.id, reply.code) == (7, ErrorCode.BAD_REQUEST)
    assert dealer.stats().counters["bad_messages"] == 3


def test_a_request_in_several_frames_is_refused(dealer: Dealer) -> None:
    for frames in ((b"", dealer.message(protocol.Stats)), (b"a", b"b", b"c")):
        assert dealer.raw(*frames).code is ErrorCode.BAD_REQUEST
    assert dealer.stats().counters["bad_messages"] == 2


def test_unreadable_one_way_messages_are_not_answered(dealer: Dealer) -> None:
    dealer.hello()
    for kind, fields in ((protocol.Commit, ([1],)), (protocol.Touch, (b"",))):
        dealer.socket.send(dealer.message(kind, *fields)[:-1])
    assert dealer.stats().counters["bad_messages"] == 2
    assert dealer.pushed == [], "nothing came before the answer to a later request"


def test_numbers_beyond_their_bounds_are_refused(dealer: Dealer) -> None:
    dealer.hello()
    for fields in ((-1, 1), (0, 0), (0, 5000), (5000, 5001)):
        reply = dealer.call(protocol.Reserve, key(1), b"", *fields, 4096, 256, 0, 0, 0.0)
        assert reply.code is ErrorCode.BAD_REQUEST
    assert dealer.call(protocol.Lookup, bytes(16 * 16_385), 0.0).code is ErrorCode.BAD_REQUEST
    assert dealer.call(protocol.Lookup, key(1), float("nan")).code is ErrorCode.BAD_REQUEST


def test_a_bug_that_one_request_meets_is_logged_answered_and_survived(
    config: VCacheConfig, processes: Processes
) -> None:
    child = processes.python("-m", "tests.server.failing_server", config=config)
    wait_until_serving(config, child)
    with Dealer(config) as dealer:
        dealer.hello()
        dealer.call(protocol.Lookup, key(1), 0.0)
        until(lambda: dealer.stats().counters["failed_messages"] == 1)  # the tick
        assert dealer.call(protocol.Lookup, key("bug"), 0.0).code is ErrorCode.FAILED
        assert dealer.call(protocol.Lookup, key(1), 0.0).hits == 0
        assert dealer.stats().counters["failed_messages"] == 2
    log = child.log.read_text()
    assert "this is the bug" in log and "Traceback" in log


# --- those who misbehave ------------------------------------------------------------------------------------------------


def test_a_client_that_never_reads_holds_nobody_up(start_server: StartServer) -> None:
    config, _ = start_server()
    with Dealer(config, receive_hwm=1) as deaf, Dealer(config) as other:
        deaf.hello()
        other.hello()
        deaf.socket.sndhwm = 0
        dropped = 0
        while not dropped:
            for _ in range(2000):
                deaf.tell(protocol.Stats)
            dropped = other.stats().counters["dropped_replies"]
        assert other.call(protocol.Lookup, key(1), 0.0).hits == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_it_ends_in_order_whatever_tells_it_to(server: Child, dealer: Dealer, runtime_dir: Path, number: int) -> None:
    dealer.hello()
    server.popen.send_signal(number)
    assert server.wait() == 0
    assert sorted(path.name for path in runtime_dir.iterdir() if path.name != "sweep.lock") == ["server.sock.lock"]


def test_a_flood_starves_nobody_and_hides_no_silence(start_server: StartServer, processes: Processes) -> None:
    config, server = start_server(
        server=QUICK | {"liveness_timeout": 4.0}
    )  # long enough to be found before it is missed
    flood = processes.python("-m", "tests.server.flood", config=config)
    flood.expect("flooding")
    with Dealer(config) as silent, Dealer(config) as other:
        other.hello()
        silent.hello()
        silent.donate()
        silent.store([key(1)])
        assert other.call(protocol.Lookup, key(1), 0.0).hits == 1
        until(lambda: other.call(protocol.Lookup, key(1), 0.0).hits == 0)
        assert other.stats().counters["sessions_silent"] == 1
        assert flood.running and server.running


def test_a_server_that_stood_still_takes_nobody_for_silent(start_server: StartServer) -> None:
    config, server = start_server(server=QUICK)
    with Dealer(config) as donor:
        donor.hello()
        donor.donate()
        donor.store([key(1)])
        server.suspend()
        donor.socket.rcvtimeo = 3000  # three times the liveness deadline
        request = donor.tell(protocol.Heartbeat, [], 0, [], [])
        with pytest.raises(zmq.Again):
            donor.receive()
        server.resume()
        donor.socket.rcvtimeo = int(PATIENCE_S * 1000)
        assert donor.receive().id == request
        for _ in range(100):
            assert isinstance(donor.call(protocol.Heartbeat, [], 0, [], []), protocol.Orders)
        assert donor.call(protocol.Lookup, key(1), 0.0).hits == 1
        assert donor.stats().counters["sessions_silent"] == 0


def test_orders_are_pushed_to_the_socket_of_the_last_heartbeat(dealer: Dealer, config: VCacheConfig) -> None:
    dealer.hello()
    number = dealer.donate()
    dealer.store([key(1)])
    with Dealer(config) as background:
        background.session, background.term = dealer.session, dealer.term
        background.call(protocol.Heartbeat, [number], 0, [], [])
        request = dealer.tell(protocol.Remove, key(1))
        orders = background.receive()
        assert isinstance(orders, protocol.Orders) and orders.id == 0
        ((segment, items),) = orders.retire
        assert segment == number
        assert background.call(protocol.Retired, number, items).count == 1
        assert dealer.receive() == protocol.Done(request, 1)


# --- one server per endpoint --------------------------------------------------------------------------------------------


def test_a_second_server_refuses_to_start_and_the_first_is_untouched(
    dealer: Dealer, config: VCacheConfig, processes: Processes
) -> None:
    dealer.hello()
    second = processes.python("-m", "vram_metadata_server", config=config)
    assert second.wait() == 1
    assert "already serving" in second.log.read_text()
    assert dealer.call(protocol.Lookup, key(1), 0.0).hits == 0
    with Dealer(config) as newcomer:
        assert newcomer.stats().term == dealer.term


def free_port() -> int:
    with sockets.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def test_one_server_per_tcp_endpoint_too(start_server: StartServer, processes: Processes) -> None:
    config, first = start_server(server={"endpoint": f"tcp://127.0.0.1:{free_port()}"})
    second = processes.python("-m", "vram_metadata_server", config=config)
    assert second.wait() == 1 and "already serving" in second.log.read_text()
    assert fetch_stats(config, timeout_s=PATIENCE_S).entries == 0 and first.running


def test_a_tcp_port_of_somebody_else_is_an_error_that_says_so(runtime_dir: Path, processes: Processes) -> None:
    with sockets.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        config = VCacheConfig(server={"endpoint": f"tcp://127.0.0.1:{taken.getsockname()[1]}"})
        child = processes.python("-m", "vram_metadata_server", config=config)
        assert child.wait() == 1 and "cannot listen" in child.log.read_text()


def test_the_socket_is_private_and_goes_with_the_server(server: Child, config: VCacheConfig, runtime_dir: Path) -> None:
    path = runtime_dir / "server.sock"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(runtime_dir.stat().st_mode) == 0o700
    assert server.stop() == 0
    assert not path.exists()


def test_a_directory_that_others_may_write_into_is_refused(runtime_dir: Path, processes: Processes) -> None:
    loose = runtime_dir / "loose"
    loose.mkdir()
    loose.chmod(0o777)
    config = VCacheConfig(server={"endpoint": f"ipc://{loose}/server.sock"})
    child = processes.python("-m", "vram_metadata_server", config=config)
    assert child.wait() == 2 and "0777" in child.log.read_text()
    assert f"the directory of server.endpoint = 'ipc://{loose}/server.sock'" in child.log.read_text()


@pytest.mark.parametrize("endpoint", ["", "tcp://127.0.0.1:1", "ipc://{}/beside/server.sock"])
def test_a_runtime_directory_that_cannot_be_one_is_refused_in_a_line(
    runtime_dir: Path, processes: Processes, endpoint: str
) -> None:
    (runtime_dir / "file").touch()
    config = VCacheConfig(runtime_dir=f"{runtime_dir}/file", server={"endpoint": endpoint.format(runtime_dir)})
    child = processes.python("-m", "vram_metadata_server", config=config)
    assert child.wait() == 2
    assert child.log.read_text().startswith(f"vram_metadata_server: runtime_dir = '{runtime_dir}/file': ")
    assert child.log.read_text().count("\n") == 1


@pytest.mark.parametrize("end", ["stop", "kill"])
def test_terms_grow_from_life_to_life_even_when_the_clock_goes_back(
    end: str, config: VCacheConfig, processes: Processes, runtime_dir: Path
) -> None:
    first = processes.server(config)
    term = fetch_stats(config, timeout_s=PATIENCE_S).term
    getattr(first, end)()
    lock = runtime_dir / "server.sock.lock"
    assert int(lock.read_text().split()[0]) == term
    lock.write_text(f"{term + 10**9}\n")
    second = processes.server(config)
    assert fetch_stats(config, timeout_s=PATIENCE_S).term == term + 10**9 + 1
    second.stop()
    lock.write_text("nonsense\n")
    processes.server(config)
    assert fetch_stats(config, timeout_s=PATIENCE_S).term > term


def test_ctrl_c_ends_the_server_cleanly(server: Child) -> None:
    os.kill(server.pid, 2)
    assert server.wait() == 0


# --- beyond this host ---------------------------------------------------------------------------------------------------


def test_binding_beyond_loopback_without_keys_is_refused_with_the_fix(runtime_dir: Path, processes: Processes) -> None:
    endpoint = f"tcp://0.0.0.0:{free_port()}"
    child = processes.python("-m", "vram_metadata_server", extra={"VCACHE_SERVER__ENDPOINT": endpoint})
    assert child.wait() == 2
    assert "vcache keys" in child.log.read_text()


def test_with_curve_only_clients_whose_keys_are_known_get_in(
    start_server: StartServer, runtime_dir: Path, tmp_path: Path
) -> None:
    keys, clients = tmp_path / "keys", tmp_path / "clients"
    server_public, server_secret = create_key_files(keys, "server")
    friend_public, friend_secret = create_key_files(keys, "friend")
    _, stranger_secret = create_key_files(keys, "stranger")
    clients.mkdir()
    curve: dict[str, Any] = {
        "server_secret_key_file": str(server_secret),
        "authorized_clients_dir": str(clients),
        "server_public_key_file": str(server_public),
        "client_secret_key_file": str(friend_secret),
    }
    (clients / "friend.key").write_text(friend_public.read_text())
    endpoint = f"tcp://127.0.0.1:{free_port()}"
    config, _ = start_server(server={"endpoint": endpoint, "curve": curve})
    assert fetch_stats(config, timeout_s=PATIENCE_S).entries == 0
    stranger = VCacheConfig(
        server={"endpoint": endpoint, "curve": curve | {"client_secret_key_file": str(stranger_secret)}}
    )
    with pytest.raises(UnavailableError):
        fetch_stats(stranger, timeout_s=1.0)
    with Dealer(VCacheConfig(server={"endpoint": endpoint})) as plain:
        plain.socket.rcvtimeo = 1000
        plain.tell(protocol.Stats)
        with pytest.raises(zmq.Again):
            plain.receive()


# --- what it is made of -------------------------------------------------------------------------------------------------


def test_the_server_imports_neither_torch_nor_numpy() -> None:
    script = "import sys, vram_metadata_server.__main__; print([m for m in ('torch', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_log_tells_a_chunks_way_by_its_key(start_server: StartServer) -> None:
    config, server = start_server(log_level="DEBUG")
    with Dealer(config) as dealer:
        dealer.hello()
        dealer.donate()
        dealer.store([key(1)])
        dealer.call(protocol.Acquire, key(1), 0, 1.0)
        dealer.tell(protocol.Remove, key(1))
        until(lambda: dealer.stats().counters["removed"] == 1)
    server.stop()
    lines = [line for line in server.log.read_text().splitlines() if f"vc1-{key(1).hex()}" in line]
    for step, line in zip(("reserve", "commit", "acquire", "retire"), lines, strict=True):
        assert step in line


def test_a_configuration_that_cannot_work_ends_with_status_2(runtime_dir: Path, processes: Processes) -> None:
    child = processes.python("-m", "vram_metadata_server", extra={"VCACHE_SERVER__EVICTION__LOW_WATERMARK": "2"})
    assert child.wait() == 2 and "low_watermark" in child.log.read_text()
    assert processes.python("-m", "vram_metadata_server", "--nonsense").wait() == 2
