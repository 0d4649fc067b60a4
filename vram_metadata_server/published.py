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
from typing import Final, NamedTuple

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
#: Of all slots, in sixteenths: how many are used at most, with how many another table is begun, and how many keys that has at most.
_FULL: Final = 10
_CROWDED: Final = 9
_NEW: Final = 6
#: For each key changed, so many bytes of the next table are made present, then so many slots filled: it is ready after half of the changes
#: that this one has room for.
ALLOCATED_PER_CHANGE: Final = 8192
COPIED_PER_CHANGE: Final = 64
_NOT_SAID: Final = bytes(PLACEMENT.size)


class _Changes(NamedTuple):
    """As the functions in C take them: joined keys, joined placements, and a byte for each key, 0 where it is whole no more."""

    keys: bytes
    placements: bytes
    are_whole: bytes

    def first(self, count: int) -> _Changes:
        return _Changes(
            self.keys[: count * KEY_BYTES], self.placements[: count * PLACEMENT.size], self.are_whole[:count]
        )

    def after(self, count: int) -> _Changes:
        return _Changes(
            self.keys[count * KEY_BYTES :], self.placements[count * PLACEMENT.size :], self.are_whole[count:]
        )


class _Table:
    """One file, closed to readers at first. Whatever is done with it, ``OSError`` or ``UnavailableError`` say that it cannot be."""

    def __init__(self, runtime: RuntimeDir, name: str, *, term: int, slots: int) -> None:
        self.slots = slots
        self.limit = slots * _FULL // 16
        self.counts = Counts(0, 0)
        self.file: HeldFile = runtime.create_index_file(name)
        self._term = term
        self._nbytes = index_bytes(slots)
        self._allocated = 0
        self._mapping: mmap.mmap | None = None
        self.address = 0

    def allocate(self, nbytes: int) -> bool:
        """Makes so many more bytes present; whether all are, and the table can be used."""
        if self._mapping is None:
            # A page that is not there would kill (SIGBUS) whoever touches it.
            more = min(nbytes, self._nbytes - self._allocated)
            os.posix_fallocate(self.file.fd, self._allocated, more)
            self._allocated += more
            if self._allocated < self._nbytes:
                return False
            self._mapping = mmap.mmap(self.file.fd, self._nbytes)
            HEADER.pack_into(self._mapping, 0, MAGIC, FORMAT_VERSION, self._term, self.slots, State.CLOSED)
            self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._mapping))
        return True

    def allocate_all(self) -> None:
        self.allocate(self._nbytes)

    def apply(self, changes: _Changes) -> int:
        """Writes changes, in order; how many, before it was full."""
        count = len(changes.are_whole)
        done: int = index_apply(self.address, self.slots, self.limit, self.counts, *changes, count)
        return done

    def set_state(self, state: State) -> None:
        index_set_state(self.address, state)

    def give_up(self) -> None:
        """Removes its file. Who has mapped it goes on."""
        self.file.unlink()
        self.file.close()


class _Successor:
    """The table that is to take a crowded one's place. It is made bit by bit, so that no answer waits for it for long."""

    def __init__(self, table: _Table, old: _Table) -> None:
        self.table = table
        self._old = old
        self._is_allocated = False
        self._copied = 0  # slots of the old one
        #: Whether keys that came and went have filled it meanwhile.
        self.is_full = False

    @property
    def is_whole(self) -> bool:
        """Whether it has all that the old one has."""
        return self._copied == self._old.slots and not self.is_full

    def go_on(self, changes: _Changes) -> None:
        """After these were written to the old one."""
        count = len(changes.are_whole)
        if not self._is_allocated:
            self._is_allocated = self.table.allocate(count * ALLOCATED_PER_CHANGE)
        else:
            self.is_full = self.table.apply(changes) < count  # what of them is still to be copied comes twice
            self._copy(count * COPIED_PER_CHANGE)

    def finish(self, changes: _Changes) -> None:
        """As ``go_on``, all that is left at once, however long that takes."""
        self.table.allocate_all()
        self.is_full = self.table.apply(changes) < len(changes.are_whole)
        self._copy(self._old.slots)

    def _copy(self, slots: int) -> None:
        old, new = self._old, self.table
        end = min(old.slots, self._copied + slots)
        self._copied = index_copy(old.address, self._copied, end, new.address, new.slots, new.limit, new.counts)
        self.is_full = self.is_full or self._copied < end


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
        self._next: _Successor | None = None
        try:
            self._table.allocate_all()
        except BaseException:
            self._table.give_up()
            raise
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
        self._end_successor()
        if table is not None:
            table.set_state(State.CLOSED)
            table.give_up()

    def _apply(self, table: _Table) -> None:
        changes = _Changes(
            b"".join(self.changes),
            b"".join([said or _NOT_SAID for said in self.changes.values()]),
            bytes(said is not None for said in self.changes.values()),
        )
        done = table.apply(changes)
        while done < len(changes.are_whole):  # sooner than its successor was ready
            successor = self._next or self._begin(table)
            successor.finish(changes.first(done))
            if not successor.is_whole:
                self._end_successor()
                continue
            table = self._replace(table, successor.table)
            changes = changes.after(done)
            done = table.apply(changes)
        if self._next is not None:
            self._next.go_on(changes)
            if self._next.is_whole:
                self._replace(table, self._next.table)
            elif self._next.is_full:
                self._end_successor()
        elif table.counts.used >= table.slots * _CROWDED // 16 and self._may_have(self._slots_after(table)):
            self._begin(table)

    def _begin(self, table: _Table) -> _Successor:
        """A successor, which has room for what the table has now."""
        slots = self._slots_after(table)
        if not self._may_have(slots):
            raise UnavailableError(
                f"{index_bytes(slots)} bytes would be needed, server.shared_index allows {self._max_bytes}; set it higher"
            )
        new = _Table(self._runtime, f"{self.name}.new", term=self._term, slots=slots)
        self._next = _Successor(new, table)
        return self._next

    def _end_successor(self) -> None:
        successor, self._next = self._next, None
        if successor is not None:
            successor.table.give_up()

    def _slots_after(self, table: _Table) -> int:
        """Of twice as many, or of as many if removed keys have filled it."""
        slots = table.slots
        while table.counts.present >= slots * _NEW // 16:
            slots *= 2
        return slots

    def _may_have(self, slots: int) -> bool:
        return index_bytes(slots) <= self._max_bytes

    def _replace(self, old: _Table, new: _Table) -> _Table:
        # Live already: what is still missing in it comes before the next answer.
        new.set_state(State.LIVE if self._is_exact else State.SUSPENDED)
        old.set_state(State.SUPERSEDED)  # before its lock goes, which would say that its server is dead
        self._next = None
        try:
            self._runtime.replace_file(old.file, new.file)
        except BaseException:
            new.give_up()
            raise
        self._table = new
        log.debug("the index in shared memory has %d slots for %d keys", new.slots, new.counts.present)
        return new
