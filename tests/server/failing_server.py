"""The real server, whose lookups fail for one key: a bug that a request brings to light."""

from __future__ import annotations

import sys

from tests.server.world import key
from vcache import protocol
from vram_metadata_server.__main__ import main
from vram_metadata_server.members import Session
from vram_metadata_server.reads import Reads
from vram_metadata_server.service import Outgoing, Service

lookup, tick = Reads.lookup, Service.tick


def failing_lookup(self: Reads, session: Session, request: protocol.Lookup) -> tuple[int, int]:
    if request.keys == key("bug"):
        raise KeyError("this is the bug")
    return lookup(self, session, request)


def failing_tick(self: Service, now: float, drained: bool) -> Outgoing:
    if self.counters["lookups"] == 1 and not self.counters["failed_messages"]:
        raise RuntimeError("a tick fails once")
    return tick(self, now, drained)


if __name__ == "__main__":
    Reads.lookup = failing_lookup  # type: ignore[method-assign]
    Service.tick = failing_tick  # type: ignore[method-assign]
    sys.exit(main([]))
