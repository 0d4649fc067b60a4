"""``vcache donate`` of a segment that stands in for VRAM, killed by a real signal at a step of its first demotion.

``python -m tests.pool.stopping_donor STEP SIZE``: "copied" (nothing is committed), "committed" (in memory; the server does not
know), "told" (the server has the commit; it was not told that the victim is demoted).
"""

from __future__ import annotations

import os
import signal
import sys

from tests.pool.stopping_writer import stop_after
from vcache.cli.app import app
from vcache.pool.client import PoolClient
from vcache.pool.writing import PendingWrite

STEPS = ("copied", "committed", "told")


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def main(step: str, size: str) -> None:
    if step == "copied":
        stop_after(PendingWrite, "copy_with", die)
    elif step == "committed":
        stop_after(PendingWrite, "commit_records", die)
    else:

        def demoted(self, number, done, failed) -> None:
            assert self.stats() is not None  # a round trip behind the commit
            die()

        PoolClient.demoted = demoted  # type: ignore[method-assign]
    app(["donate", "--device", "cpu:0", "--tier", "vram", "--size", size])


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
