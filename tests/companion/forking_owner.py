"""A process with a companion, which forks: prints the pids of its companion and of its child, and waits to be killed."""

from __future__ import annotations

import os
import signal

from vcache.companion.companion import Companion
from vcache.companion.link import Close
from vcache.remote.wire import DECODER

if __name__ == "__main__":
    companion = Companion("tests.companion.idle", Close(), DECODER, fds=(), environment=os.environ)
    assert companion.ready(60) is not None
    child = os.fork()
    if child:
        print(companion.pid, child, flush=True)
    while True:
        signal.pause()
