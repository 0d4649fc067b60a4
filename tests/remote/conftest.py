"""Two hosts on one machine: two runtime directories, one metadata server on a loopback port, an address for each."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.pool.payloads import until
from tests.support.processes import Child, Processes, host_directory
from vcache.config import VCacheConfig
from vcache.pool.client import PoolClient
from vcache.protocol import SegmentInfo

pytest.importorskip("mooncake.engine", reason="Mooncake is not installed, or libibverbs1 is missing")

MIB = 1 << 20


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def companions_of(child: Child) -> list[int]:
    """Processes that ``child`` has started."""
    return [int(pid) for pid in Path(f"/proc/{child.pid}/task/{child.pid}/children").read_text().split()]


def is_stopped(pid: int) -> bool:
    """Whether every thread of a process has come to a stop: SIGSTOP only begins that."""
    threads = Path(f"/proc/{pid}/task").glob("*/stat")
    return all(thread.read_text().rpartition(")")[2].split()[0] == "T" for thread in threads)


@dataclass
class Hosts:
    """The two hosts' configurations, and what runs on them."""

    here: VCacheConfig  # of the reader
    there: VCacheConfig  # of the donor
    processes: Processes
    server: Child
    stopped: list[int] = field(default_factory=list)

    def donate(self, config: VCacheConfig, size: str = "16MiB") -> Child:
        """A stand-alone donor on one of the hosts."""
        child = self.processes.python("-m", "vcache.cli", "donate", "--device", "cpu:0", "--size", size, config=config)
        child.expect("donating")
        return child

    def suspend(self, donor: Child) -> None:
        """As if its whole host hung: the donor, and the process that offers its segment."""
        for pid in companions_of(donor):
            os.kill(pid, signal.SIGSTOP)
            self.stopped.append(pid)
            until(partial(is_stopped, pid), "a companion stopped")
        donor.suspend()

    def resume(self) -> None:
        """All that was suspended goes on. (Stopped, a companion would not even end with its donor.)"""
        for pid in self.stopped:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
        self.stopped.clear()
        for child in self.processes.children:
            if child.running:
                child.resume()


def remote_segments(client: PoolClient) -> list[SegmentInfo]:
    """Segments of other hosts that ``client`` was told how to read."""
    return [info for info in client.session.infos() if info.host != client.host and info.remote]


def until_announced(client: PoolClient, count: int = 1) -> None:
    """Waits until the server tells ``client`` how to read so many segments of other hosts."""

    def told() -> bool:
        client.acquire(bytes(16), 0)  # tells of segments, whatever it finds
        return len(remote_segments(client)) >= count

    until(told, f"{count} announcements of segments of other hosts")


@pytest.fixture
def other_runtime_dir() -> Iterator[Path]:
    """A second host: as ``runtime_dir``, which is the first."""
    with host_directory() as directory:
        yield directory


@pytest.fixture
def hosts(runtime_dir: Path, other_runtime_dir: Path, processes: Processes) -> Iterator[Callable[..., Hosts]]:
    """Starts a server on the reader's host; returns both hosts."""
    started: list[Hosts] = []

    def start(*, remote: str = "mooncake", **settings: Any) -> Hosts:
        server = {"endpoint": f"tcp://127.0.0.1:{free_port()}", "heartbeat_interval": 0.1, **settings.pop("server", {})}
        transfer = {"remote": remote, "remote_timeout": 20.0, "staging_size": "32MiB", **settings.pop("transfer", {})}

        def config(directory: Path, address: str) -> VCacheConfig:
            return VCacheConfig(
                runtime_dir=str(directory),
                server=server,
                transfer={**transfer, "mooncake": {"hostname": address}},
                client={"call_timeout": 5.0, "lease": 30.0},
                **settings,
            )

        here, there = config(runtime_dir, "127.0.0.1"), config(other_runtime_dir, "127.0.0.2")
        started.append(Hosts(here, there, processes, processes.server(here)))
        return started[-1]

    yield start
    for both in started:
        both.resume()
    processes.close()


@pytest.fixture
def open_client() -> Iterator[Callable[..., PoolClient]]:
    """Clients in this process, of the host that their configuration says."""
    clients: list[PoolClient] = []

    def open_one(config: VCacheConfig, *, writes: bool = True) -> PoolClient:
        client = PoolClient(config, device="cpu:0", writes=writes)
        clients.append(client)
        assert client.wait_available(60)
        return client

    yield open_one
    for client in clients:
        client.close()
