"""What a process with a GPU maps: pinned where it is host memory, and given up by a thread that may wait, never under a user."""

from __future__ import annotations

import os
from collections.abc import Callable
from itertools import count
from pathlib import Path

import pytest

from tests.memory.conftest import Vram
from tests.pool.payloads import until
from tests.support.processes import Processes

GIVING_UP = {"host": "cuMemHostUnregister", "vram": "cuMemUnmap"}
PREPARING = {"host": "cuMemHostRegister", "vram": "cuMemSetAccess"}


@pytest.fixture
def start(runtime_dir: Path, processes: Processes, tmp_path: Path, stand_in) -> Callable[..., Vram]:
    """Starts a process that maps a segment in some place, over the stand-in."""

    def begin(place: str, **settings: str) -> Vram:
        log = tmp_path / "calls"
        chosen = {f"STAND_IN_{name.upper()}": value for name, value in settings.items()}
        extra = {**stand_in, **chosen, "STAND_IN_LOG": str(log)}
        child = processes.python("-m", "tests.memory.mapping_process", str(runtime_dir), place, extra=extra)
        assert child.expect("ready")
        return Vram(child, log)

    return begin


@pytest.mark.parametrize("place", ["host", "vram"])
@pytest.mark.parametrize("reason", ["gone", "idle"])
def test_it_is_given_up_after_its_last_user_and_mapped_again_for_the_next(start, place, reason):
    process = start(place)
    begun = process.calls().count(PREPARING[place])
    assert process.ask("use") == process.ask("use") == "used"
    until(lambda: process.calls().count(PREPARING[place]) == begun + 1, "it is made fit for use, once")
    if reason == "gone":
        process.ask("drop")
    assert process.ask("read") == "4711"
    process.ask("release")
    assert process.ask("read") == "4711"
    assert GIVING_UP[place] not in process.calls()
    process.ask("release")
    if reason == "idle":
        clock = count(100, 9)  # whoever made it fit for use may be using it still
        until(lambda: process.ask(f"idle {next(clock)}") == "0", "it was idle for long enough")
    until(lambda: process.calls().count(GIVING_UP[place]) == 1, "it is given up")
    assert process.ask("use") == "used"
    assert process.ask("read") == "4711"
    until(lambda: process.calls().count(PREPARING[place]) == begun + 2, "it is made fit for use again")
    assert process.ask("close") == "done"
    assert process.ask("read") == "4711", "in use still"
    process.ask("release")
    assert process.calls().count(GIVING_UP[place]) == 2


@pytest.mark.parametrize("place", ["host", "vram"])
def test_whoever_is_to_write_by_a_gpu_waits_until_it_is_pinned(start, place):
    process = start(place)
    assert process.ask("use") == "used"
    assert process.ask("pinned 60") == "True"
    assert ("cuMemHostRegister" in process.calls()) == (place == "host")
    process.ask("release")
    assert process.ask("close") == "done"


def test_its_own_host_memory_is_pinned_once_for_all_its_lives_until_it_is_given_up(start):
    process = start("host")
    for what, answer in (("adopt", "done"), ("use", "used"), ("pinned 60", "True"), ("release", "done")):
        assert process.ask(what) == answer
    assert "cuMemHostUnregister" not in process.calls()
    assert process.ask("give-up") == process.ask("close") == "done"
    assert [call for call in process.calls() if "cuMemHost" in call] == ["cuMemHostRegister", "cuMemHostUnregister"]


def test_pinning_that_takes_its_time_is_waited_for_once(start, tmp_path):
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    process = start("host", gate=str(gate))
    assert process.ask("use") == process.ask("use") == "used"
    assert process.ask("pinned 0.1") == process.ask("pinned 1000") == "False"
    gate.write_bytes(b"")  # opens it
    until(lambda: process.ask("pinned 0") == "True", "it is pinned")
    assert [process.ask("release") for _ in range(2)] == ["done", "done"]
    assert process.ask("close") == "done"
    assert process.calls()[-1] == "cuMemHostUnregister"


def test_where_host_memory_cannot_be_pinned_it_is_used_as_it_is(start):
    process = start("host", fail="cuMemHostRegister")
    assert process.ask("use") == "used"
    assert process.ask("pinned 60") == "False"
    assert "cuMemHostRegister" in process.calls()
    assert process.ask("read") == "4711"
    process.ask("release")
    assert process.ask("close") == "done"
    assert "cuMemHostUnregister" not in process.calls()
    assert process.child.running
    assert "are not pinned (cuMemHostRegister" in process.child.report()


def test_where_the_way_to_a_peer_cannot_be_measured_it_is_used_all_the_same(start):
    """The stand-in is no driver for torch."""
    process = start("peer")
    assert process.ask("use") == "used"
    until(lambda: "map segments failed" in process.child.report(), "it was tried")
    assert process.ask("read") == "4711"
    process.ask("release")
    assert process.ask("drop") == "done"
    until(lambda: "cuMemUnmap" in process.calls(), "it is given up")
    assert process.child.running
