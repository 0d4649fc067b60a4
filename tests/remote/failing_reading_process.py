"""The process that reads from other hosts, with an engine that takes no memory."""

from __future__ import annotations

import sys

from vcache.remote import reading_process
from vcache.remote.mooncake import MooncakeEngine


def _refuse(self: MooncakeEngine, address: int, nbytes: int) -> None:
    raise RuntimeError("ibv_reg_mr: cannot allocate memory")


if __name__ == "__main__":
    setattr(MooncakeEngine, "register", _refuse)  # noqa: B010 - mypy minds the plain form
    reading_process.main(sys.argv[1:])
