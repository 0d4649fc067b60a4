"""The tests' own process helper: it follows, suspends and ends what a test starts, and what that starts."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.pool.payloads import until
from tests.support.processes import processes_using
from vcache.config import VCacheConfig

ECHO = "for line in __import__('sys').stdin: print('got', line.strip(), flush=True)"


def state_of(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def has_ended(pid: int) -> bool:
    try:
        return state_of(pid) == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def test_lines_go_both_ways(processes):
    child = processes.python("-c", ECHO)
    child.tell("one")
    child.tell("two")
    assert child.line() == "got one"
    assert child.expect("two") == "got two"


def test_a_child_that_ends_instead_of_speaking_fails_the_test_with_its_log(processes):
    child = processes.python("-c", "import sys; print('out'); sys.exit('the reason')")
    assert child.line() == "out"
    with pytest.raises(AssertionError, match=r"(?s)ended with status 1.*out.*the reason"):
        child.line()
    with pytest.raises(AssertionError, match="ended with status 1"):
        child.line()


def test_a_silent_child_fails_the_test(processes):
    child = processes.python("-c", ECHO)
    with pytest.raises(AssertionError, match="printed nothing for 0.1 s"):
        child.line(timeout_s=0.1)


def test_suspended_children_stop_and_go_on(processes):
    child = processes.python("-c", ECHO)
    child.tell("before")
    child.line()
    child.suspend()
    assert state_of(child.pid) == "T"
    child.resume()
    child.tell("after")
    assert child.line() == "got after"


def test_kill_ends_what_the_child_started_too_even_when_suspended(processes):
    child = processes.python(
        "-c", "import subprocess; p = subprocess.Popen(['sleep', '600']); print(p.pid, flush=True); p.wait()"
    )
    grandchild = int(child.line())
    child.suspend()
    child.kill()
    assert child.wait() == -signal.SIGKILL
    until(lambda: has_ended(grandchild), "the grandchild's end")


def test_children_see_this_test_s_host_and_no_other_settings(runtime_dir, processes, monkeypatch):
    ask = "from vcache.config import VCacheConfig as C; c = C(); print(c.runtime_path, c.chunk_size)"
    assert processes.python("-c", ask).line() == f"{runtime_dir} 256"
    monkeypatch.setenv("VCACHE_CHUNK_SIZE", "512")
    config = VCacheConfig(chunk_size=1024)
    assert processes.python("-c", ask, config=config).line() == f"{runtime_dir} 1024"


def test_who_uses_a_directory_is_known(runtime_dir, processes):
    path = runtime_dir / "held"
    path.write_text("x")
    child = processes.python("-c", f"f = open({str(path)!r}); print('open', flush=True); input()")
    child.expect("open")
    assert processes_using(runtime_dir) == [child.pid]
    child.kill()
    assert processes_using(runtime_dir) == []
    assert os.getpid() not in processes_using(runtime_dir)
