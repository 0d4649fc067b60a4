"""The process that reads from other hosts, stopping itself (SIGSTOP) each time payloads have come, before their records are read."""

from __future__ import annotations

import os
import signal
import sys

# Before any thread is started, by an import too: then all have it blocked, and who waits for it gets it. It resumes nevertheless.
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCONT})

from vcache.pool.records import RECORD_BYTES  # noqa: E402
from vcache.pool.segment import PAGE_BYTES  # noqa: E402
from vcache.remote import reading_process  # noqa: E402
from vcache.remote.mooncake import MooncakeEngine  # noqa: E402

_read = MooncakeEngine.read


def _read_and_stop(self, peer, pieces):
    is_done = _read(self, peer, pieces)
    if pieces[0].nbytes not in (RECORD_BYTES, PAGE_BYTES):  # neither records nor a header
        os.kill(os.getpid(), signal.SIGSTOP)
        signal.sigwait({signal.SIGCONT})  # the process stops a moment after the call
    return is_done


if __name__ == "__main__":
    setattr(MooncakeEngine, "read", _read_and_stop)  # noqa: B010 - mypy minds the plain form
    reading_process.main(sys.argv[1:])
