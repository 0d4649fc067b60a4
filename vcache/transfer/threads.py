"""The process's few copying threads: made at the first use, gone with the process, made anew after a fork.

They are threads of Python in name only: each waits, and copies, in one call of ``copy_blocks.c`` that never returns, so that it
needs the GIL once in its life. What they copy is said in C as well.
"""

from __future__ import annotations

import os
import threading
from contextlib import suppress
from functools import cache
from typing import Final

from vcache.native import native_library
from vcache.transfer_config import MAX_THREADS

LIBRARY: Final = "vcache.transfer._copy_blocks"
#: Threads a copy uses unless the configuration (``transfer.threads``) says otherwise: memory is the limit soon after.
DEFAULT_THREADS: Final = 4

_library = native_library(LIBRARY)
_lock = threading.Lock()
_helpers = 0


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


def helpers(count: int) -> int:
    """Sees to it that a copy which asks for ``count`` helpers besides its caller can have them; how many to ask for."""
    count = max(0, min(count, MAX_THREADS - 1))
    if count > _helpers:
        _start(count)
    return count


def _start(count: int) -> None:
    global _helpers
    with _lock, suppress(RuntimeError):  # no more threads, or the interpreter is shutting down: the caller does it all
        while _helpers < count:
            threading.Thread(target=_help, name=f"vcache-copy-{_helpers}", daemon=True).start()
            _helpers += 1


def _help() -> None:
    run_anywhere()
    _library.vcache_copy_help()


def _after_fork_in_child() -> None:
    global _lock, _helpers
    _lock, _helpers = threading.Lock(), 0  # the parent's threads do not exist here, and one may have held the lock
    _library.vcache_copy_forget_helpers()


os.register_at_fork(after_in_child=_after_fork_in_child)
