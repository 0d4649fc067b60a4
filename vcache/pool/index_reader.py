"""A client's view of the server's index in shared memory: how many leading keys are there, and where, without a round trip.

A hint like every lookup's answer: what is loaded is validated. Where the table cannot say, it answers ``None``. Not here: the layout
(``shared_index.py``), and the leases that go with what was found (``unasked.py``).
"""

from __future__ import annotations

import ctypes
import logging
import mmap
import os
import weakref
from typing import Final

import numpy as np

from vcache.errors import CorruptionError
from vcache.pool.runtime_dir import RuntimeDir
from vcache.pool.shared_index import (
    FORMAT_VERSION,
    HEADER,
    MAGIC,
    NOT_PLACED,
    State,
    index_bytes,
    index_run,
    state_answer,
)
from vcache.protocol import KEY_BYTES, PLACEMENT

logger = logging.getLogger(__name__)

_SUSPENDED: Final = state_answer(State.SUSPENDED)
_SUPERSEDED: Final = state_answer(State.SUPERSEDED)
#: Each is twice the one before, or an accident: a reader that always comes too late asks the server.
_REOPENED: Final = 3


class _Table:
    """One file, mapped until the last call that uses it is over."""

    def __init__(self, runtime: RuntimeDir, name: str) -> None:
        """Raises ``OSError`` when it is not there, ``CorruptionError`` when it is none."""
        self.fd = runtime.open_index_file(name)
        weakref.finalize(self, os.close, self.fd)
        nbytes = os.fstat(self.fd).st_size
        if nbytes < index_bytes(0):
            raise CorruptionError(f"{name}: {nbytes} bytes are no index")
        mapping = mmap.mmap(self.fd, nbytes, prot=mmap.PROT_READ)
        self._bytes = np.frombuffer(mapping, dtype=np.uint8)  # keeps it, and says where it is
        self.address = int(self._bytes.ctypes.data)
        magic, version, self.term, self.slots, _ = HEADER.unpack_from(mapping)
        if magic != MAGIC or version != FORMAT_VERSION:
            raise CorruptionError(f"{name}: not an index of version {FORMAT_VERSION}")
        if self.slots & (self.slots - 1) or not 0 < index_bytes(self.slots) <= nbytes:
            raise CorruptionError(f"{name}: {self.slots} slots in {nbytes} bytes")


class IndexReader:
    """Thread-safe; never waits, never raises. What it opened is unmapped when the last call that uses it is over."""

    def __init__(self, runtime: RuntimeDir) -> None:
        self._runtime = runtime
        self._name = ""  # of what is open, or could not be opened
        self._table: _Table | None = None

    def run(self, name: str, term: int, keys: bytes) -> int | None:
        """The length of the leading run of ``keys`` that the server's index ``name`` has, or ``None``: ask the server.

        ``name``: as the server said in its welcome of this term; empty when it publishes none.
        """
        return self._run(name, term, keys, None)

    def find(self, name: str, term: int, keys: bytes) -> bytes | None:
        """As ``run``; answers the placements of the run (``protocol.PLACEMENT`` each), joined. ``None`` also if not all are said."""
        placements = ctypes.create_string_buffer(len(keys) // KEY_BYTES * PLACEMENT.size)
        hits = self._run(name, term, keys, placements)
        return None if hits is None else placements.raw[: hits * PLACEMENT.size]

    def _run(self, name: str, term: int, keys: bytes, placements: ctypes.Array[ctypes.c_char] | None) -> int | None:
        if name != self._name:
            self._open(name)
        for _ in range(_REOPENED):
            table = self._table
            if table is None or table.term != term:
                return None
            count = len(keys) // KEY_BYTES
            found: int = index_run(table.address, table.slots, table.fd, keys, count, placements)
            if found >= 0:
                return found
            if found in (_SUSPENDED, NOT_PLACED):
                return None
            if found != _SUPERSEDED:
                self._table = None  # for good: its server is dead, or has given it up
                return None
            self._open(name)
        return None

    def close(self) -> None:
        """From now on nobody can say."""
        self._name, self._table = "", None

    def _open(self, name: str) -> None:
        # Two threads at a time do no harm: both open what is there now, and one of the two is kept.
        table: _Table | None = None
        if name:
            try:
                table = _Table(self._runtime, name)
            except FileNotFoundError:
                pass  # the server is on another host, or has just ended
            except (OSError, ValueError, CorruptionError) as error:
                logger.warning("the server's index in shared memory is not used: %s", error)
        self._table = table
        self._name = name
