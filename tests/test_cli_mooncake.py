"""``vcache mooncake`` as processes: what it refuses, and that nothing of it stays behind."""

from __future__ import annotations

import signal
import socket
from pathlib import Path

import pytest

from tests.store.mooncake import HOST, free_port, wait_for
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


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGKILL])
def test_however_it_ends_master_and_owner_end_too(processes: Processes, number: signal.Signals):
    port = free_port()
    options = f"--port {port} --metrics-port {free_port()} --memory 16MiB".split()
    store = processes.python("-m", "vcache.cli", "mooncake", "start", *options)
    store.expect(f"16777216 bytes given to {HOST}:{port}")
    children = children_of(store)
    assert len(children) == 2
    store.popen.send_signal(number)
    assert store.wait() == (-number if number is signal.SIGKILL else 0)
    wait_for(lambda: not any(runs(child) for child in children), "the end of master and owner")
    with socket.socket() as again:
        again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        again.bind((HOST, port))


def children_of(parent: Child) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()]


def runs(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
