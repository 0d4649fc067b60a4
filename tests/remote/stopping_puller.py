"""``vcache donate`` of host memory, killed by a real signal at a step of its first pull from another host.

``python -m tests.remote.stopping_puller STEP SIZE``: "read" (payload and record are here, nothing is reserved), "copied" (nothing is
committed), "committed" (in memory; the server does not know), "told" (the server has the commit; not that it was a pull).
"""

from __future__ import annotations

import os
import signal
import sys

from tests.pool.stopping_writer import stop_after
from vcache.cli.app import app
from vcache.pool.client import PoolClient
from vcache.pool.pulling import Puller
from vcache.pool.writing import PendingWrite

STEPS = ("read", "copied", "committed", "told")


def die(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def main(step: str, size: str) -> None:
    if step == "read":
        setattr(Puller, "_write", die)  # noqa: B010 - mypy minds the plain form
    elif step == "copied":
        stop_after(PendingWrite, "copy_with", die)
    elif step == "committed":
        stop_after(PendingWrite, "commit_records", die)
    else:

        def pulled(self: PoolClient, *_: object) -> None:
            assert self.stats() is not None  # a round trip behind the commit
            die()

        setattr(PoolClient, "pulled", pulled)  # noqa: B010
    app(["donate", "--device", "cpu:0", "--size", size])


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
