"""The process that reads from other hosts' segments into a serving process's staging memory.

    python -m vcache.remote.reading_process LIFE CONTROL STAGING LANE...     (descriptors; see companion/link.py)

It may be ended at any time, and that is the only way to be sure that a read which failed writes no more. Torch-free.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import socket
import sys
import threading
from typing import Final

from vcache.companion.life import end_with
from vcache.companion.link import TAINTED, Answer, Close, Failed, Link, LinkClosedError, Ready
from vcache.errors import VCacheError
from vcache.remote.base import Piece, RemoteEngine
from vcache.remote.engines import open_engine
from vcache.remote.wire import DECODER, READ, STRANGER, UNREACHED, Fetch, ReadFor, Stretch


def main(arguments: list[str]) -> None:
    life, control_fd, staging_fd, *lane_fds = map(int, arguments)
    end_with(life)
    control = Link(socket.socket(fileno=control_fd), DECODER)
    setup = control.receive()
    assert isinstance(setup, ReadFor)
    staging = mmap.mmap(staging_fd, setup.staging_bytes)
    address = ctypes.addressof(ctypes.c_char.from_buffer(staging))
    try:
        engine = open_engine(setup.engine)
        engine.register(address, setup.staging_bytes)
    except (VCacheError, ImportError, OSError, RuntimeError) as error:  # RuntimeError: the engine's
        control.send(Failed(str(error)))
        os._exit(1)
    fetches = Fetches(engine, address)
    for fd in lane_fds:
        threading.Thread(target=serve, args=(Link(socket.socket(fileno=fd), DECODER), fetches), daemon=True).start()
    control.send(Ready())
    assert isinstance(control.receive(), Close)
    os._exit(0)  # reads may be under way, and the engine's destructors would wait for them


class Fetches:
    """Reads for several lanes at once. A peer that one of them is meeting is not there for the others yet."""

    def __init__(self, engine: RemoteEngine, staging_address: int) -> None:
        self._engine = engine
        self._staging: Final = staging_address
        self._lock = threading.Lock()
        self._known: dict[str, int] = {}  # peers that answered, and the address of their memory
        self._meeting: set[str] = set()

    def fetch(self, ask: Fetch) -> int:
        if not ask.first:
            return READ  # somebody wants to know whether this process goes on
        found = self._met(ask.peer)
        if found is None:
            return UNREACHED
        if found != ask.address:
            return STRANGER
        for stretches in (ask.first, ask.then):  # one after the other: what ``then`` says is said of all of ``first``
            if stretches and not self._engine.read(ask.peer, [self._piece(ask, one) for one in stretches]):
                self._known.pop(ask.peer, None)
                return TAINTED
        return READ

    def _met(self, peer: str) -> int | None:
        """The address of a peer's memory, if it answers. One that hangs keeps the lane that meets it for a minute."""
        with self._lock:
            known = self._known.get(peer)
            if known is not None or peer in self._meeting:
                return known
            self._meeting.add(peer)
        try:
            found = self._engine.greet(peer)
        finally:
            with self._lock:
                self._meeting.discard(peer)
        if found is not None:
            self._known[peer] = found
        return found

    def _piece(self, ask: Fetch, stretch: Stretch) -> Piece:
        return Piece(ask.address + stretch.remote, self._staging + stretch.staging, stretch.nbytes)


def serve(lane: Link, fetches: Fetches) -> None:
    """Answers what comes on a lane, until its other end goes."""
    while True:
        try:
            ask = lane.receive()
            if not isinstance(ask, Fetch):
                return
            lane.send(Answer([fetches.fetch(ask)] * ask.blocks))
        except LinkClosedError:
            return


if __name__ == "__main__":
    main(sys.argv[1:])
