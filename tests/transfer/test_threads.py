"""The copying threads: they share the pieces, stop before the call returns, survive a fork and an unlucky thread."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, Event, current_thread

import pytest

from tests.support.processes import PATIENCE_S, child_environment
from vcache.transfer import threads
from vcache.transfer.threads import default_threads, process_cpus, run_pieces


def test_every_piece_is_done_once() -> None:
    done: list[int] = []
    run_pieces(done.append, range(100), threads=3)
    assert sorted(done) == list(range(100))


def test_as_many_threads_as_asked_for_work_at_the_same_time() -> None:
    together = Barrier(3)
    names: set[str] = set()

    def work(_: int) -> None:
        together.wait(PATIENCE_S)
        names.add(current_thread().name)

    run_pieces(work, range(3), threads=3)
    assert len(names) == 3


def test_one_thread_is_the_callers_own() -> None:
    names = set()
    run_pieces(lambda _: names.add(current_thread().name), range(3), threads=1)
    assert names == {current_thread().name}


def test_an_error_comes_out_only_when_nobody_writes_any_more() -> None:
    begun, others_end = Event(), Event()
    ended: list[int] = []

    def work(piece: int) -> None:
        if piece == 0:
            assert begun.wait(PATIENCE_S)
            others_end.set()
            raise MemoryError("piece 0")
        begun.set()
        assert others_end.wait(PATIENCE_S)
        ended.append(piece)

    with pytest.raises(MemoryError, match="piece 0"):
        run_pieces(work, range(50), threads=2)
    assert ended == [1]  # what was begun has ended, what was not is left


def test_a_helper_that_never_gets_to_run_delays_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    go_on = Event()
    with ThreadPoolExecutor(1) as busy:
        monkeypatch.setattr(threads, "_pool", busy)
        held = busy.submit(go_on.wait, PATIENCE_S)
        done: list[int] = []
        run_pieces(done.append, range(10), threads=2)
        assert done == list(range(10))
        assert not held.done()
        go_on.set()


def test_a_fork_gets_threads_of_its_own() -> None:
    run_pieces(lambda _: None, range(4), threads=2)
    program = """
import os
from vcache.transfer.threads import run_pieces
done = []
run_pieces(done.append, range(8), threads=2)
pid = os.fork()
if pid == 0:
    from threading import Barrier
    together = Barrier(2)
    run_pieces(lambda _: together.wait(60), range(2), threads=2)
    os._exit(7)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
"""
    subprocess.run(
        [sys.executable, "-W", "error", "-c", program], env=child_environment(), check=True, timeout=PATIENCE_S
    )


def test_helpers_run_where_the_process_may_not_where_their_maker_was_pinned() -> None:
    program = """
import os
from threading import Barrier
from vcache.transfer.threads import process_cpus, run_pieces
cpus = process_cpus()
os.sched_setaffinity(0, {min(cpus)})
together, seen = Barrier(2), []
def work(_):
    together.wait(60)
    seen.append(os.sched_getaffinity(0))
run_pieces(work, range(2), threads=2)
assert sorted(map(len, seen)) == sorted([1, len(cpus)]), seen
"""
    subprocess.run([sys.executable, "-c", program], env=child_environment(), check=True, timeout=PATIENCE_S)


def test_the_default_is_bounded_by_the_processs_cpus() -> None:
    assert process_cpus() >= os.sched_getaffinity(0)
    assert 1 <= default_threads() <= 4
