"""Real Mooncake for tests: a master and owners of memory, as processes that can be killed, stopped and restarted."""

from __future__ import annotations

import contextlib
import socket
import sys
import time
from collections.abc import Callable

import pytest

from tests.store.shards import payloads, shards
from tests.support.processes import PATIENCE_S, Child, Processes
from vcache.store.base import Put, Shard
from vcache.store.guard import GuardedStore
from vcache.store.mooncake_command import master_command, mooncake_environment

HOST = "127.0.0.1"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port


def wait_for(condition: Callable[[], object], what: str = "the condition") -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not come within {PATIENCE_S} s"
        time.sleep(0.02)


class Mooncake:
    """One Mooncake store of a test: its address, and its processes once they are started."""

    def __init__(self, processes: Processes) -> None:
        pytest.importorskip("mooncake.store", reason="Mooncake is not installed, or libibverbs1 is missing")
        self._processes = processes
        self._port, self._metrics_port = free_port(), free_port()
        self.address = f"{HOST}:{self._port}"
        self.master: Child | None = None

    def start_master(self, *flags: str) -> Child:
        command = master_command(host=HOST, port=self._port, metrics_port=self._metrics_port)
        self.master = self._processes.start([*command, *flags], extra=mooncake_environment(HOST))
        wait_for(self._accepts, "the master")
        return self.master

    def start_owner(self, nbytes: int = 256 << 20) -> Child:
        """Memory in a process of its own; given once this returns."""
        child = self._processes.start(
            [
                sys.executable,
                "-m",
                "vcache.store.mooncake_owner",
                self.address,
                str(nbytes),
                HOST,
                "P2PHANDSHAKE",
                "tcp",
            ],
            extra=mooncake_environment(HOST),
        )
        child.expect("ready:")
        return child

    def _accepts(self) -> bool:
        with contextlib.suppress(OSError):
            socket.create_connection((HOST, self._port), timeout=1).close()
            return True
        return False


def await_ready(store: GuardedStore) -> None:
    """Until Mooncake answers a lookup."""
    wait_for(lambda: answers(store), "Mooncake")


def answers(store: GuardedStore) -> bool:
    """Whether a lookup reached the store and came back."""
    before = store.counters()
    store.contains(shards(1))
    after = store.counters()
    went_through = after["store_made_calls"] == before["store_made_calls"] + 1
    return went_through and all(after[name] == before[name] for name in ("store_failed_calls", "store_overdue_calls"))


def fill(store: GuardedStore, count: int, nbytes: int) -> list[Shard]:
    """Stores ``count`` payloads; all are there when this returns."""
    wait_for(
        lambda: set(store.put_from(shards(count), payloads(count, nbytes))) <= {Put.STORED, Put.EXISTS},
        "room in Mooncake",
    )
    return shards(count)
