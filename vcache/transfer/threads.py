"""The process's few copying threads: made at the first use, gone with the process, made anew after a fork."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from functools import cache
from itertools import pairwise
from threading import Lock

#: Threads a copy uses unless the configuration (``transfer.threads``) says otherwise: memory is the limit soon after.
DEFAULT_THREADS = 4
MAX_THREADS = 64

_lock = Lock()
_pool: ThreadPoolExecutor | None = None


@cache
def process_cpus() -> frozenset[int]:
    """The CPUs any thread of this process may run on.

    Not those of the calling thread: serving engines pin the threads of their compute library, the main thread among them, to
    one core each, and every thread started from there would inherit that one core.
    """
    cpus: set[int] = set()
    for task in os.listdir("/proc/self/task"):
        try:
            cpus |= os.sched_getaffinity(int(task))
        except ProcessLookupError:  # that thread has just ended
            continue
    return frozenset(cpus)


def default_threads() -> int:
    """How many threads a copy uses when nobody said."""
    return min(DEFAULT_THREADS, len(process_cpus()))


def run_shares(work: Callable[[int, int], None], bounds: Sequence[int]) -> None:
    """Run ``work(bounds[i], bounds[i + 1])`` for every i at the same time, the last of them on the calling thread.

    Returns, or raises the first error, only when all of them have ended: nothing is written afterwards.
    """
    shares = list(pairwise(bounds))
    futures: list[Future[None]] = []
    try:
        for first, last in shares[:-1]:
            futures.append(_submit(work, first, last))
        work(*shares[-1])
    finally:
        wait(futures)
    for future in futures:
        future.result()


def _submit(work: Callable[[int, int], None], first: int, last: int) -> Future[None]:
    global _pool
    with _lock:
        if _pool is None:
            _pool = ThreadPoolExecutor(MAX_THREADS, "vcache-copy", _run_anywhere, (process_cpus(),))
        try:
            return _pool.submit(work, first, last)
        except RuntimeError:  # the interpreter is shutting down and starts no more threads
            work(first, last)
            done: Future[None] = Future()
            done.set_result(None)
            return done


def _run_anywhere(cpus: frozenset[int]) -> None:
    with suppress(OSError):  # a cpuset that shrank meanwhile: stay where the starting thread was
        os.sched_setaffinity(0, cpus)


def _after_fork_in_child() -> None:
    global _pool, _lock
    _pool, _lock = None, Lock()  # the parent's threads do not exist here, and one may have held the lock


os.register_at_fork(after_in_child=_after_fork_in_child)
