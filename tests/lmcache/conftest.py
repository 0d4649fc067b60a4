"""Fixtures of the LMCache tests: a metadata server with patient deadlines, LMCache without its telemetry."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.support.processes import Child
from vcache.config import VCacheConfig

#: So that a miss means what the test is about, not that the machine was busy for a second.
PATIENT = {
    "server": {"heartbeat_interval": "50ms", "liveness_timeout": "5s"},
    "client": {"call_timeout": "20s", "connect_timeout": "30s", "lease": "60s"},
}


@pytest.fixture(autouse=True)
def _no_telemetry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LMCACHE_TRACK_USAGE", "false")


@pytest.fixture
def server(start_server: Callable[..., tuple[VCacheConfig, Child]]) -> Child:
    """The metadata server of this test's host."""
    return start_server(**PATIENT)[1]
