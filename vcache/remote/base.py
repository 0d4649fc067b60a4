"""The interface of a transfer engine: what can move bytes from a segment of another host into memory of this one.

An engine runs in companion processes only, one for each segment that is offered and one for each process that reads. There it
may block, hold the GIL, or write into memory after it has given up: the process can be ended, which ends all three.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import msgspec


class EngineSetup(msgspec.Struct, array_like=True, frozen=True):
    """Which engine, and how it reaches others. ``hostname``: the address by which other hosts reach this one."""

    kind: str
    protocol: str
    devices: str
    hostname: str


class Piece(NamedTuple):
    """``nbytes`` at the address ``remote`` of a peer, to be copied to the address ``local`` of this process."""

    remote: int
    local: int
    nbytes: int


class RemoteEngine(Protocol):
    """Thread-safe; every call may block. Raises ``UnavailableError`` where it cannot be what it should be."""

    @property
    def peer(self) -> str:
        """The name by which engines of other hosts reach what is registered here."""

    def maps_read_only(self) -> bool:
        """Whether memory that is only offered for reading can be registered where it cannot be written."""

    def register(self, address: int, nbytes: int) -> None:
        """Memory that peers may read, or that reads go to. For the life of the process."""

    def greet(self, peer: str) -> int | None:
        """Meets a peer, without making other threads wait: the address of its memory, or ``None`` if it does not answer."""

    def read(self, peer: str, pieces: Sequence[Piece]) -> bool:
        """Copies pieces. True: every byte is there, each as it was at some instant since the call began.

        False: nothing is known, and the pieces' local memory may be written at any time from now on.
        """
