"""Leases: a reader's claims that what it was sent is not evicted, each with a deadline.

A lease holds its run of entries (``Entry.holds``); eviction passes over held entries. It ends by its release, its deadline or
its session's end, whichever comes first. Removing an entry does not wait for leases: its record is retired, and a reader's
validation then says so.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import msgspec

from vcache.protocol import PLACEMENT
from vram_metadata_server.deadlines import Deadlines
from vram_metadata_server.index import Entry

LEASES_PER_SESSION: Final = 16_384
LEASED_KEYS_PER_SESSION: Final = 1 << 20


class Lease(msgspec.Struct, gc=False, eq=False):
    """One run of entries on behalf of one session."""

    id: int
    session: bytes
    run: list[Entry]
    placements: bytes  # what the reader reads; empty for a lookup's lease
    deadline: float
    name: int = 0  # its session's; 0: it has none

    def placed(self) -> dict[int, tuple[int, int]]:
        """Segment number and record of what the reader reads, by generation."""
        return {row[2]: (row[0], row[1]) for row in PLACEMENT.iter_unpack(self.placements)}


class LeaseTable:
    """All leases, oldest first."""

    def __init__(self, first_id: int) -> None:
        self._by_id: dict[int, Lease] = {}
        self._of_session: dict[bytes, dict[int, Lease]] = {}
        self._keys_of_session: dict[bytes, int] = {}
        self._named: dict[tuple[bytes, int], int] = {}
        self._deadlines: Deadlines[int] = Deadlines(self._deadline)
        self.next_id = first_id

    def __len__(self) -> int:
        return len(self._by_id)

    def __iter__(self) -> Iterator[Lease]:
        return iter(self._by_id.values())

    @property
    def oldest_id(self) -> int:
        """The id of the oldest lease there is; ``next_id`` when there is none."""
        return next(iter(self._by_id), self.next_id)

    def grant(self, session: bytes, run: list[Entry], placements: bytes, deadline: float, *, name: int = 0) -> int:
        """Leases the run; 0 when the session holds too many, or one of this name."""
        mine = self._of_session.get(session)
        if mine is None:
            mine = self._of_session[session] = {}
            self._keys_of_session[session] = 0
        keys = self._keys_of_session[session] + len(run)
        if len(mine) >= LEASES_PER_SESSION or keys > LEASED_KEYS_PER_SESSION or (session, name) in self._named:
            return 0
        self._keys_of_session[session] = keys
        for entry in run:
            entry.holds += 1
        lease_id = self.next_id
        self.next_id += 1
        self._by_id[lease_id] = mine[lease_id] = Lease(lease_id, session, run, placements, deadline, name)
        if name:
            self._named[session, name] = lease_id
        self._deadlines.push(deadline, lease_id)
        return lease_id

    def named(self, session: bytes, name: int) -> int:
        """The id of a session's lease of this name; 0 when there is none."""
        return self._named.get((session, name), 0)

    def release(self, session: bytes, lease_id: int) -> Lease | None:
        """Ends a lease of this session and answers it; None when there is no such."""
        lease = self._by_id.get(lease_id)
        if lease is None or lease.session != session:
            return None
        self._end(lease)
        return lease

    def release_all(self, session: bytes) -> int:
        """Ends every lease of a session."""
        mine = list(self._of_session.get(session, {}).values())
        for lease in mine:
            self._end(lease)
        self._of_session.pop(session, None)
        self._keys_of_session.pop(session, None)
        return len(mine)

    def expire(self, now: float) -> int:
        """Ends the leases whose deadline has passed."""
        ended = 0
        for lease_id in self._deadlines.due(now):
            self._end(self._by_id[lease_id])
            ended += 1
        return ended

    def _deadline(self, lease_id: int) -> float | None:
        lease = self._by_id.get(lease_id)
        return None if lease is None else lease.deadline

    def _end(self, lease: Lease) -> None:
        del self._by_id[lease.id]
        del self._of_session[lease.session][lease.id]
        if lease.name:
            del self._named[lease.session, lease.name]
        self._keys_of_session[lease.session] -= len(lease.run)
        for entry in lease.run:
            entry.holds -= 1

    def check_integrity(self, now: float) -> None:
        """Raises ``AssertionError`` unless the views agree and no lease has outlived its deadline."""
        assert {lease_id for mine in self._of_session.values() for lease_id in mine} == set(self._by_id)
        for session, mine in self._of_session.items():
            assert self._keys_of_session[session] == sum(len(lease.run) for lease in mine.values())
        assert self._named == {(lease.session, lease.name): lease.id for lease in self if lease.name}
        assert all(lease.deadline >= now for lease in self._by_id.values()), "a lease outlived its deadline"
        assert all(self._deadlines.covers(lease.id, lease.deadline) for lease in self)
