"""Fixtures of the pool's tests: clients and donors on a test's own host, closed at its end."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator

import pytest

from vcache.config import VCacheConfig
from vcache.memory.host import HostMemory
from vcache.pool.client import PoolClient
from vcache.pool.donor import Donor

MIB = 1 << 20

#: Deadlines short enough to wait for, and long enough for a busy machine.
QUICK = {
    "server": {"heartbeat_interval": 0.05, "liveness_timeout": 3.0, "reservation_timeout": 0.3, "max_lease": 60.0},
    "client": {"call_timeout": 3.0, "lease": 30.0},
}


def asking(config: VCacheConfig) -> VCacheConfig:
    """The same for a client that asks the server each time."""
    said = config.model_dump()
    return VCacheConfig(**said | {"server": said["server"] | {"shared_index": 0}})


@pytest.fixture
def quick(start_server):
    """A configuration with short deadlines and a real server under it."""
    return start_server(**QUICK)


@pytest.fixture
def open_client(runtime_dir) -> Iterator[Callable[..., PoolClient]]:
    clients: list[PoolClient] = []

    def open_one(
        config: VCacheConfig, *, device: str = "cpu:0", writes: bool = True, available: bool = True, **options
    ) -> PoolClient:
        client = PoolClient(config, device=device, writes=writes, **options)
        clients.append(client)
        if available:
            assert client.wait_available(60)
        return client

    yield open_one
    for client in clients:
        client.close()


@pytest.fixture
def open_donor(open_client) -> Iterator[Callable[..., Donor]]:
    """Donors with the client they run in; without a client given, one of its own."""
    donors: list[Donor] = []

    def open_one(
        config: VCacheConfig, client: PoolClient | None = None, *, size: int = 8 * MIB, registered: bool = True
    ) -> Donor:
        client = client or open_client(config, writes=False, available=registered)
        segment_id = secrets.token_bytes(16)
        memory = HostMemory.create(client.runtime, segment_id, size)
        donor = Donor(config, client, memory, segment_id, label="test")
        donors.append(donor)
        if registered:
            assert donor.wait_registered(60)
        return donor

    yield open_one
    for donor in donors:
        donor.close(1.0)
