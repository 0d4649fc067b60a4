"""The process's few copying threads: made at the first use, gone with the process, made anew after a fork."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from functools import cache
from threading import Lock
from typing import TypeVar

#: Threads a copy uses unless the configuration (``transfer.threads``) says otherwise: memory is the limit soon after.
DEFAULT_THREADS = 4
MAX_THREADS = 64

Piece = TypeVar("Piece")

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


def run_anywhere() -> None:
    """Lets the calling thread run on any CPU of the process, whatever the thread that started it was pinned to."""
    with suppress(OSError):  # a cpuset that shrank meanwhile: stay where the starting thread was
        os.sched_setaffinity(0, process_cpus())


def default_threads() -> int:
    """How many threads a copy uses when nobody said."""
    return min(DEFAULT_THREADS, len(process_cpus()))


def run_pieces(work: Callable[[Piece], None], pieces: Iterable[Piece], threads: int) -> None:
    """Do ``work`` for every piece, on the calling thread and at most ``threads - 1`` others.

    Each takes the next piece when it is done with its last, so one that gets no CPU delays nobody. Returns, or raises the
    first error, only when no piece is being worked on: nothing is written afterwards.
    """
    waiting = deque(pieces)

    def work_off() -> None:
        try:
            while True:
                try:
                    piece = waiting.popleft()
                except IndexError:
                    return
                work(piece)
        except BaseException:
            waiting.clear()
            raise

    helpers = _start(work_off, min(threads, MAX_THREADS, len(waiting)) - 1)
    try:
        work_off()
    finally:
        begun = [helper for helper in helpers if not helper.cancel()]
        wait(begun)
    for helper in begun:
        helper.result()


def _start(work_off: Callable[[], None], count: int) -> list[Future[None]]:
    global _pool
    if count < 1:
        return []
    with _lock:
        if _pool is None:
            _pool = ThreadPoolExecutor(MAX_THREADS, "vcache-copy", run_anywhere)
        try:
            return [_pool.submit(work_off) for _ in range(count)]
        except RuntimeError:  # the interpreter is shutting down: the caller does it all
            return []


def _after_fork_in_child() -> None:
    global _pool, _lock
    _pool, _lock = None, Lock()  # the parent's threads do not exist here, and one may have held the lock


os.register_at_fork(after_in_child=_after_fork_in_child)
