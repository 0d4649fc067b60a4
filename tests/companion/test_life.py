"""A companion ends with the process it belongs to, whatever else that has started."""

from __future__ import annotations

from pathlib import Path

from tests.pool.payloads import until
from tests.support.processes import Processes


def test_a_companion_ends_with_its_owner_although_a_forked_child_lives_on(processes: Processes) -> None:
    owner = processes.python("-m", "tests.companion.forking_owner")
    companion, child = (Path("/proc", pid) for pid in owner.line().split())
    owner.popen.kill()  # alone, not with what it started
    until(lambda: not companion.exists(), "the companion has ended")
    assert child.exists()
