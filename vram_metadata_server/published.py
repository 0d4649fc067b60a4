"""The index in shared memory, for lookups and reads by clients of this host without a round trip: all whole chunks.

The state machine notes which keys became whole, or lie elsewhere, and which are whole no more; the shell has them written here before it answers
anything. docs/index-format.md has the layout and what readers may rely on. Whatever goes wrong here ends the table and nothing
else: readers then ask the server.
"""

from __future__ import annotations

import ctypes
import logging
import mmap
import os
import secrets
from typing import Final

from vcache.errors import UnavailableError
from vcache.pool.runtime_dir import HeldFile, RuntimeDir
from vcache.pool.shared_index import (
    FORMAT_VERSION,
    HEADER,
    MAGIC,
    Counts,
    State,
    index_apply,
    index_bytes,
    index_copy,
    index_set_state,
)
from vcache.protocol import KEY_BYTES, PLACEMENT

log = logging.getLogger(__name__)

MIN_SLOTS: Final = 1 << 14
#: Of all slots, in eighths: how many are used at most, and how many keys there are at most in a new table.
_FULL_EIGHTHS: Final = 5
_NEW_EIGHTHS: Final = 3
_NOT_SAID: Final = bytes(PLACEMENT.size)


class _Table:
    """One file. Raises ``OSError`` or ``UnavailableError`` when it cannot be made."""

    def __init__(self, runtime: RuntimeDir, name: str, *, term: int, slots: int) -> None:
        self.slots = slots
        self.limit = slots * _FULL_EIGHTHS // 8
        self.counts = Counts(0, 0)
        self.file: HeldFile = runtime.create_index_file(name)
        try:
            # All of it present: a page that is not there would kill (SIGBUS) whoever touches it.
            os.posix_fallocate(self.file.fd, 0, index_bytes(slots))
            self._mapping = mmap.mmap(self.file.fd, index_bytes(slots))
        except BaseException:
            self.file.unlink()
            self.file.close()
            raise
        HEADER.pack_into(self._mapping, 0, MAGIC, FORMAT_VERSION, term, slots, State.CLOSED)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._mapping))

    def set_state(self, state: State) -> None:
        index_set_state(self.address, state)


class PublishedIndex:
    """One term's table, and the larger ones that take its place. Single-threaded, like the server.

    ``changes`` is where the state machine notes them: a key, and its placement as it is sent to readers, empty where there is more to
    say than one, None when it is not whole any more. Raises ``UnavailableError`` or ``OSError``
    when there cannot be one.
    """

    def __init__(self, runtime: RuntimeDir, *, term: int, max_bytes: int, min_slots: int = MIN_SLOTS) -> None:
        self.changes: dict[bytes, bytes | None] = {}
        #: For welcomes; empty once there is no table any more.
        self.name = f"index-{term:016x}{secrets.token_hex(8)}.shm"
        self._runtime = runtime
        self._term = term
        self._max_bytes = max_bytes
        self._is_exact = True
        self._table: _Table | None = _Table(runtime, self.name, term=term, slots=min_slots)
        self._table.set_state(State.LIVE)

    def update(self, *, is_exact: bool) -> None:
        """Writes what has changed. To be called before anything is answered that could tell of it.

        ``is_exact``: whether lookups find every key that is whole; otherwise readers are sent to the server until they do.
        """
        if self._table is None:
            self.changes.clear()
            return
        if self.changes:
            try:
                self._apply(self._table)
            except (OSError, UnavailableError) as error:
                log.warning("the index in shared memory ends, lookups come by the socket: %s", error)
                self.close()
                return
            finally:
                self.changes.clear()
        if is_exact is not self._is_exact:
            self._is_exact = is_exact
            self._table.set_state(State.LIVE if is_exact else State.SUSPENDED)

    def close(self) -> None:
        """Sends readers to the server and removes the file."""
        table, self._table = self._table, None
        self.name = ""
        if table is not None:
            table.set_state(State.CLOSED)
            table.file.unlink()
            table.file.close()

    def _apply(self, table: _Table) -> None:
        keys, are_whole = b"".join(self.changes), bytes(said is not None for said in self.changes.values())
        placements = b"".join([said or _NOT_SAID for said in self.changes.values()])
        count = len(are_whole)
        done = index_apply(table.address, table.slots, table.limit, table.counts, keys, placements, are_whole, count)
        while done < count:
            table = self._replaced(table)
            keys, placements, are_whole = (
                keys[done * KEY_BYTES :],
                placements[done * PLACEMENT.size :],
                are_whole[done:],
            )
            count -= done
            done = index_apply(
                table.address, table.slots, table.limit, table.counts, keys, placements, are_whole, count
            )

    def _replaced(self, old: _Table) -> _Table:
        """A table with room in the place of one without: of twice the size, or of the same if removed keys filled it."""
        slots = old.slots
        while old.counts.present >= slots * _NEW_EIGHTHS // 8:
            slots *= 2
        if index_bytes(slots) > self._max_bytes:
            raise UnavailableError(
                f"{index_bytes(slots)} bytes would be needed, server.shared_index allows {self._max_bytes}; set it higher"
            )
        table = _Table(self._runtime, f"{self.name}.new", term=self._term, slots=slots)
        index_copy(old.address, old.slots, table.address, table.slots, table.counts)
        # Live already: what is still missing in it comes before the next answer.
        table.set_state(State.LIVE if self._is_exact else State.SUSPENDED)
        old.set_state(State.SUPERSEDED)  # before its lock goes, which would say that its server is dead
        try:
            self._runtime.replace_file(old.file, table.file)
        except BaseException:
            table.file.unlink()
            table.file.close()
            raise
        self._table = table
        log.debug("the index in shared memory has %d slots for %d keys", slots, table.counts.present)
        return table
