"""Descriptors between processes: given to whoever runs as the same user, in time or not at all, and gone with their process."""

from __future__ import annotations

import os
import secrets
import socket

import pytest

from vcache.errors import UnavailableError
from vcache.memory.descriptors import DescriptorServer, receive_descriptor, require_same_user
from vcache.pool.runtime_dir import RuntimeDir

PATIENCE_S = 30.0

SERVER = """
import os, sys
from pathlib import Path
from vcache.memory.descriptors import DescriptorServer
from vcache.pool.runtime_dir import RuntimeDir
fd = os.memfd_create("shared")
os.write(fd, b"of another process")
server = DescriptorServer(RuntimeDir(Path(sys.argv[1])), os.urandom(16), fd)
print(server.path, flush=True)
for line in sys.stdin:
    if line == "fork\\n":
        child = os.fork()
        if child == 0:
            sys.stdin.read()
            os._exit(0)
        print("forked", flush=True)
    else:
        server.close()
        print("closed", flush=True)
"""


@pytest.fixture
def serving(processes, runtime_dir):
    """A process that hands out a descriptor, and where."""
    child = processes.python("-c", SERVER, str(runtime_dir))
    return child, runtime_dir / child.line()


def test_what_is_received_is_the_same_file(serving):
    child, path = serving
    fd = receive_descriptor(path, PATIENCE_S)
    again = receive_descriptor(path, PATIENCE_S)
    assert os.pread(fd, 100, 0) == b"of another process"
    os.pwrite(fd, b"to", 0)
    assert os.pread(again, 2, 0) == b"to"
    assert not os.get_inheritable(fd)
    child.kill()
    assert os.pread(fd, 100, 0) == b"to another process"
    os.close(fd)
    os.close(again)


def test_only_this_user_may_connect(serving):
    _, path = serving
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_process_of_another_user_is_told_apart(monkeypatch):
    one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with one, other:
        require_same_user(one)
        mine = os.geteuid()
        monkeypatch.setattr(os, "geteuid", lambda: mine + 1)
        with pytest.raises(PermissionError, match=f"of user {mine}, this one is of user {mine + 1}"):
            require_same_user(one)


def test_who_takes_its_client_for_another_users_gives_nothing(runtime_dir, monkeypatch):
    server = DescriptorServer(RuntimeDir(runtime_dir), secrets.token_bytes(16), os.memfd_create("shared"))
    mine, answers = os.geteuid(), iter([os.geteuid()])  # the client's check comes first; what follows is the server's
    monkeypatch.setattr(os, "geteuid", lambda: next(answers, mine + 1))
    with pytest.raises(UnavailableError, match=r"takes this one for another user|its process is gone"):
        receive_descriptor(server.path, PATIENCE_S)
    server.close()


def test_a_process_that_is_stopped_is_waited_for_until_the_deadline(serving):
    child, path = serving
    child.suspend()
    with pytest.raises(TimeoutError, match="no answer in 0.05 s"):
        receive_descriptor(path, 0.05)
    child.resume()
    os.close(receive_descriptor(path, PATIENCE_S))


@pytest.mark.parametrize("end", ["killed", "closed"])
def test_nothing_is_given_out_after_the_end(serving, end):
    child, path = serving
    if end == "killed":
        child.kill()
        assert path.exists()
    else:
        child.tell("close")
        child.expect("closed")
        assert not path.exists()
    with pytest.raises(UnavailableError, match="its process is gone"):
        receive_descriptor(path, PATIENCE_S)


def test_a_forked_child_does_not_keep_it_alive(serving):
    child, path = serving
    child.tell("fork")
    child.expect("forked")
    child.popen.kill()  # the parent alone
    child.popen.wait()
    with pytest.raises(UnavailableError, match="its process is gone"):
        receive_descriptor(path, PATIENCE_S)


def test_a_sweep_removes_the_socket_of_a_dead_process_only(serving, runtime_dir):
    child, path = serving
    runtime = RuntimeDir(runtime_dir)
    assert runtime.sweep() == []
    child.suspend()
    for _ in range(200):  # more than its queue has room for
        assert runtime.sweep() == []
    child.resume()
    os.close(receive_descriptor(path, PATIENCE_S))
    child.kill()
    assert runtime.sweep() == [path.name]


def test_closing_returns_what_it_took_and_twice_is_harmless(runtime_dir):
    before = os.listdir("/proc/self/fd")
    for _ in range(3):
        server = DescriptorServer(RuntimeDir(runtime_dir), secrets.token_bytes(16), os.memfd_create("shared"))
        os.close(receive_descriptor(server.path, PATIENCE_S))
        server.close()
        server.close()
    assert os.listdir("/proc/self/fd") == before
    assert not list(runtime_dir.glob("*.sock"))


def test_a_path_too_long_for_a_socket_leaves_the_descriptor_with_the_caller(tmp_path):
    fd = os.memfd_create("shared")
    runtime = RuntimeDir(tmp_path / ("d" * 100))
    with pytest.raises(OSError, match="too long"):
        DescriptorServer(runtime, secrets.token_bytes(16), fd)
    os.close(fd)
    assert not list(runtime.path.glob("*.sock"))
