"""The process that reads from other hosts, stopping itself (SIGSTOP) each time payloads have come, before their records are read."""

from __future__ import annotations

import os
import signal
import sys

from vcache.pool.records import RECORD_BYTES
from vcache.pool.segment import PAGE_BYTES
from vcache.remote import reading_process
from vcache.remote.mooncake import MooncakeEngine

_read = MooncakeEngine.read


def _read_and_stop(self, peer, pieces):
    is_done = _read(self, peer, pieces)
    if pieces[0].nbytes not in (RECORD_BYTES, PAGE_BYTES):  # neither records nor a header
        os.kill(os.getpid(), signal.SIGSTOP)
    return is_done


if __name__ == "__main__":
    setattr(MooncakeEngine, "read", _read_and_stop)  # noqa: B010 - mypy minds the plain form
    reading_process.main(sys.argv[1:])
