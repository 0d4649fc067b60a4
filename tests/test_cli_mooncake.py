"""``vcache mooncake`` as processes: what it refuses, and that nothing of it stays behind."""

from __future__ import annotations

import os
import signal
import socket
import struct
from pathlib import Path

import pytest

from tests.store.conftest import mooncake  # noqa: F401 - a fixture
from tests.store.mooncake import HOST, Mooncake, free_port, wait_for
from tests.support.processes import Child, Processes
from tests.test_cli import vcache

pytest.importorskip("mooncake.store", reason="Mooncake is not installed, or libibverbs1 is missing")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("start --memory x", "store.mooncake.segment_size = 'x' (from argument): not a size"),
        ("start --memory 0", "nothing to give"),
        ("start --memory 1024TiB", "'1024TiB': this machine has "),
        ("give --memory 1024TiB 127.0.0.1:1", "'1024TiB': this machine has "),
        ("start --port 0", "'--port'"),
        ("start --port 65536", "'--port'"),
        ("give --memory 1GiB nowhere", "store.mooncake.master = 'nowhere': must be HOST:PORT"),
        ("give --memory 1x 127.0.0.1:1", "'x' is not a unit of size"),
        ("give --memory 1GiB --protocol udp 127.0.0.1:1", "store.mooncake.protocol = 'udp'"),
        ("give --memory 1GiB --protocol rdma 127.0.0.1:1", "needs store.mooncake.devices"),
    ],
)
def test_bad_arguments_are_told_before_anything_starts(arguments, words):
    done = vcache("mooncake", *arguments.split(), status=2)
    assert words in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr


def test_giving_to_a_master_that_is_not_there_says_what_it_waits_for(processes: Processes):
    master = f"{HOST}:{free_port()}"
    giver = processes.python("-m", "vcache.cli", "mooncake", "give", master, "--memory", "16MiB")
    wait_for(lambda: f"joining {master}" in giver.log.read_text())
    assert giver.running
    assert giver.stop() == -signal.SIGTERM


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_given_memory_is_taken_back_whatever_ends_the_giver(processes: Processes, mooncake: Mooncake, number: int):  # noqa: F811
    mooncake.start_master()
    giver = processes.python("-m", "vcache.cli", "mooncake", "give", mooncake.address, "--memory", "16MiB")
    giver.expect(f"16777216 bytes given to {mooncake.address}")
    giver.popen.send_signal(number)
    assert giver.wait() == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGKILL])
def test_however_it_ends_master_and_owner_end_too(processes: Processes, number: signal.Signals):
    store, port = started(processes)
    children = children_of(store)
    assert len(children) == 2
    store.popen.send_signal(number)
    assert store.wait() == (-number if number is signal.SIGKILL else 0)
    wait_for(lambda: not any(runs(child) for child in children), "the end of master and owner")
    wait_for(lambda: can_be_bound(port), "the port, which goes with the last of the master's threads")


def test_it_warns_of_ports_that_others_can_reach(processes: Processes):
    store, _ = started(processes)
    assert "the owner of the memory listens on two ports of all interfaces" in store.log.read_text()
    master, owner = (listening(pid) for pid in children_of(store))
    assert master == {HOST}
    assert owner == {"0.0.0.0", "::"}, "Mooncake can be told where to listen: use that, and say so in docs/stores.md"


@pytest.mark.slow
def test_told_to_end_while_the_owner_hangs_it_ends_as_told(processes: Processes):
    store, _ = started(processes)
    _, owner = children_of(store)
    os.kill(owner, signal.SIGSTOP)
    wait_for(lambda: state_of(owner) == "T")
    store.popen.send_signal(signal.SIGINT)
    assert store.wait() == 0
    assert "ended by itself" not in store.log.read_text()
    assert not runs(owner)


def test_what_ends_by_itself_ends_the_rest_and_is_told(processes: Processes):
    store, _ = started(processes)
    master, owner = children_of(store)
    os.kill(master, signal.SIGKILL)
    assert store.wait() == 1
    assert "ended by itself" in store.log.read_text()
    assert not runs(owner)


def started(processes: Processes) -> tuple[Child, int]:
    """``vcache mooncake start`` with its memory given, and its master's port."""
    port = free_port()
    options = f"--port {port} --metrics-port {free_port()} --memory 16MiB".split()
    store = processes.python("-m", "vcache.cli", "mooncake", "start", *options)
    store.expect(f"16777216 bytes given to {HOST}:{port}")
    return store, port


def children_of(parent: Child) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()]


def state_of(pid: int) -> str:
    """As in ``ps``: "T" is stopped, "Z" a zombie."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def runs(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        return state_of(pid) != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def can_be_bound(port: int) -> bool:
    with socket.socket() as again:
        again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            again.bind((HOST, port))
        except OSError:
            return False
        return True


def listening(pid: int) -> set[str]:
    """The addresses at which a process takes TCP connections."""
    opened = {os.readlink(entry) for entry in Path(f"/proc/{pid}/fd").iterdir()}
    found = set()
    for table, family in (("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6)):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            _, local, _, state, *rest = line.split()
            if state == "0A" and f"socket:[{rest[5]}]" in opened:
                words = struct.unpack(f">{'I' * (len(local) // 8)}", bytes.fromhex(local.partition(":")[0]))
                found.add(socket.inet_ntop(family, struct.pack(f"={'I' * len(words)}", *words)))
    return found
