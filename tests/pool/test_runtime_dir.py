"""The runtime directory: who is on this host, who is alive, what the dead left behind."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import threading

import pytest

from tests.pool.payloads import until
from tests.support.processes import child_environment
from vcache.errors import ConfigError, CorruptionError, UnavailableError
from vcache.pool import runtime_dir as module
from vcache.pool.runtime_dir import RuntimeDir, lock_file, segment_file_name

HOLD = """
import sys
from pathlib import Path
from vcache.pool.runtime_dir import RuntimeDir
runtime = RuntimeDir(Path(sys.argv[1]))
session = bytes.fromhex(sys.argv[2])
lock = runtime.hold_client_lock(session)
segment = runtime.create_segment_file(session)
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def runtime(runtime_dir):
    return RuntimeDir(runtime_dir)


@pytest.fixture
def holder(runtime, processes):
    """Another process that holds a client's lock and a segment, both named by this session."""
    session = secrets.token_bytes(16)
    child = processes.python("-c", HOLD, str(runtime.path), session.hex())
    child.expect("held")
    return session, child


def test_everybody_agrees_on_the_host_id_however_many_ask_at_once(runtime):
    barrier = threading.Barrier(8)
    found = []

    def ask():
        barrier.wait()
        found.append(RuntimeDir(runtime.path).host_id)

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert set(found) == {runtime.host_id}
    assert len(runtime.host_id) == 16
    assert sorted(os.listdir(runtime.path)) == ["host"]


def test_two_directories_are_two_hosts(runtime):
    assert RuntimeDir(runtime.path / "other").host_id != runtime.host_id


def test_a_host_file_cut_short_is_not_taken_for_an_id(runtime):
    (runtime.path / "host").write_bytes(b"abc")
    with pytest.raises(ConfigError, match=r"runtime_dir = .*3 bytes instead of 16"):
        _ = runtime.host_id


def test_a_directory_others_can_write_to_is_refused(runtime_dir):
    runtime_dir.chmod(0o777)
    with pytest.raises(ConfigError, match=r"runtime_dir = .*mode 0777"):
        RuntimeDir(runtime_dir)
    runtime_dir.chmod(0o700)


def test_a_directory_that_cannot_be_made_is_said_with_the_setting(runtime_dir):
    (runtime_dir / "file").touch()
    with pytest.raises(ConfigError, match=r"runtime_dir = .*set it to a directory in shared memory"):
        RuntimeDir(runtime_dir / "file" / "below")


def test_a_new_directory_is_private(runtime_dir):
    RuntimeDir(runtime_dir / "new")
    assert (runtime_dir / "new").stat().st_mode & 0o777 == 0o700


def test_a_writer_is_alive_while_its_process_lives_suspended_or_not(runtime, holder):
    session, child = holder
    assert not runtime.is_dead(session)
    assert runtime.live_writers() == [session]
    child.suspend()
    assert not runtime.is_dead(session)
    child.resume()
    child.kill()
    assert runtime.is_dead(session)
    assert runtime.live_writers() == []


def test_a_writer_without_a_lock_file_is_dead(runtime):
    assert runtime.is_dead(secrets.token_bytes(16))


def test_a_sweep_removes_what_the_dead_left_and_nothing_of_the_living(runtime, holder):
    session, child = holder
    mine = runtime.hold_client_lock(secrets.token_bytes(16))
    (runtime.path / "server.sock.lock").touch()
    assert runtime.sweep() == []
    child.kill()
    assert runtime.sweep() == [f"client-{session.hex()}.lock", segment_file_name(session)]
    assert mine.path.exists()
    assert (runtime.path / "server.sock.lock").exists()
    mine.close()
    assert runtime.sweep() == [mine.path.name]


def test_a_forked_child_does_not_keep_its_parents_lock(runtime, processes):
    program = HOLD.replace(
        'print("held", flush=True)',
        'import os, signal\nif os.fork() == 0:\n    print("held", flush=True)\n    signal.pause()',
    )
    session = secrets.token_bytes(16)
    child = processes.python("-c", program, str(runtime.path), session.hex())
    child.expect("held")
    assert not runtime.is_dead(session)
    os.kill(child.pid, signal.SIGKILL)  # the parent alone: its child lives on
    child.popen.wait()
    assert runtime.is_dead(session)
    assert len(runtime.sweep()) == 2


def test_a_program_started_by_a_writer_does_not_keep_its_lock(runtime):
    session = secrets.token_bytes(16)
    lock = runtime.hold_client_lock(session)
    with subprocess.Popen(
        [sys.executable, "-c", "input()"], stdin=subprocess.PIPE, close_fds=False, env=child_environment()
    ) as other:
        lock.close()
        until(lambda: runtime.is_dead(session), "the program has let go of what it was started with")
        assert other.poll() is None
        other.kill()


def test_nothing_is_proven_while_a_suspended_process_holds_the_sweep_lock(runtime, monkeypatch):
    monkeypatch.setattr(module, "SWEEP_PATIENCE_S", 0.05)
    held = lock_file(runtime.path / "sweep.lock")
    assert held is not None
    with pytest.raises(UnavailableError, match="sweep.lock"):
        runtime.is_dead(secrets.token_bytes(16))
    held.close()
    assert runtime.is_dead(secrets.token_bytes(16))


def test_a_lock_is_held_by_one(runtime):
    first = lock_file(runtime.path / "some.lock")
    assert first is not None
    assert lock_file(runtime.path / "some.lock") is None
    first.close()
    second = lock_file(runtime.path / "some.lock")
    assert second is not None
    second.close()


@pytest.mark.parametrize("name", ["../secret", "segment-xyz.shm", "client-" + "0" * 32 + ".lock", ""])
def test_a_segment_name_from_the_wire_cannot_leave_the_directory(runtime, name):
    with pytest.raises(CorruptionError, match="does not name a segment file"):
        runtime.open_segment_file(name)
