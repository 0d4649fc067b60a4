"""Reservations: who may fill which extent, until when the key is his, and what counts as proof that he has stopped.

Each is in one of these states (``ReservationTable`` keeps the books, ``catalog.py`` does what follows from a change):

- *live*: the shard's key is taken; a commit makes it an entry.
- *expired* (``live`` is false): the key is free again, a commit is refused. Record and extent stay taken: time proves nothing.
  So is an *allocation*, from the start: it has no key until it is assigned one, which makes it live.
- settled: there is evidence that the writer has stopped; it leaves the table, and its donor retires the record.

A reservation whose segment is not registered (``segment`` is None) is a *claim*: said in a hello under a new term, or left
over from a segment that was dropped. It is given to the segment when that registers, so that nobody else gets its space.
A record found in a handover with a writer at work that nobody has claimed yet is a reservation of ``NOBODY``.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Final

import msgspec

from vcache.protocol import KEY_BYTES
from vram_metadata_server.deadlines import Deadlines

if TYPE_CHECKING:
    from vram_metadata_server.removal import Removal
    from vram_metadata_server.segments import Segment

#: The session of a writing record that nobody has claimed.
NOBODY: Final = b""
OUTSTANDING_PER_SESSION: Final = 4096
#: The key of an allocation until it is assigned one. No chunk has it.
UNNAMED: Final = bytes(KEY_BYTES)


class Reservation(msgspec.Struct, gc=False, eq=False):
    """A record and extent that one session's writer may fill."""

    generation: int
    session: bytes
    key: bytes
    parent: bytes
    tenant: int
    rank: int
    ranks: int
    segment: Segment | None
    segment_id: bytes
    incarnation: int
    record: int
    offset: int
    nbytes: int
    ttl_s: float  # 0 = until evicted
    pin_s: float
    deadline: float
    live: bool
    stopped: bool = False  # evidence came while it was live; a commit may still be on its way until the deadline
    next: Reservation | None = None  # another live one of the same key: another rank's, or into another segment
    waiters: list[Removal] | None = None  # to be answered no earlier than its record is retired


class ReservationTable:
    """All reservations that are not settled."""

    def __init__(self) -> None:
        self._by_generation: dict[int, Reservation] = {}
        self._by_session: defaultdict[bytes, dict[int, Reservation]] = defaultdict(dict)
        self._by_segment: defaultdict[bytes, dict[int, Reservation]] = defaultdict(dict)
        self._live: dict[bytes, Reservation] = {}  # the first of a chain, by key
        self._expired: dict[int, Reservation] = {}  # those that have a key
        self._deadlines: Deadlines[int] = Deadlines(self._deadline)

    def __len__(self) -> int:
        return len(self._by_generation)

    def __iter__(self) -> Iterator[Reservation]:
        return iter(self._by_generation.values())

    def get(self, generation: int) -> Reservation | None:
        return self._by_generation.get(generation)

    def of_session(self, session: bytes) -> dict[int, Reservation]:
        """By generation, ascending for those granted in this term. Copy it before settling any."""
        return self._by_session.get(session, {})

    def of_segment(self, segment_id: bytes) -> dict[int, Reservation]:
        """By generation. Copy it before settling any."""
        return self._by_segment.get(segment_id, {})

    def live(self, key: bytes, rank: int) -> Reservation | None:
        """A live reservation of this shard; the others, when copies of it are made, follow it (``chain``) among other ranks'."""
        found = self._live.get(key)
        while found is not None and found.rank != rank:
            found = found.next
        return found

    def of_keys(self, keys: Iterable[bytes]) -> list[Reservation]:
        """All of these keys, live or expired."""
        named = set(keys)
        live = [reservation for key in named for reservation in chain(self._live.get(key))]
        return live + [reservation for reservation in self._expired.values() if reservation.key in named]

    def of_tenant(self, tenant: int | None) -> list[Reservation]:
        """All of a tenant (None: of all) that have a key, live or expired."""
        return [each for each in self if each.key != UNNAMED and (tenant is None or each.tenant == tenant)]

    def add(self, reservation: Reservation) -> None:
        generation = reservation.generation
        self._by_generation[generation] = reservation
        self._by_session[reservation.session][generation] = reservation
        self._by_segment[reservation.segment_id][generation] = reservation
        if reservation.live:
            self._enlist(reservation)
            self._deadlines.push(reservation.deadline, generation)
        elif reservation.key != UNNAMED:
            self._expired[generation] = reservation

    def expire(self, reservation: Reservation) -> None:
        """Frees the key. The caller takes the child it counted as from its parent."""
        reservation.live = False
        self._expired[reservation.generation] = reservation
        key = reservation.key
        first = self._live.pop(key)
        if first is not reservation:
            self._live[key] = before = first
            while before.next is not reservation:
                assert before.next is not None
                before = before.next
            before.next = reservation.next
        elif reservation.next is not None:
            self._live[key] = reservation.next
        reservation.next = None

    def revive(self, reservation: Reservation, deadline: float) -> None:
        """Gives a claim whose segment has registered, or an allocation, its key; the caller makes it its parent's child."""
        reservation.live = True
        reservation.deadline = deadline
        self._expired.pop(reservation.generation, None)  # an allocation is not among them
        self._enlist(reservation)
        self._deadlines.push(deadline, reservation.generation)

    def settle(self, reservation: Reservation) -> None:
        """Forgets an expired reservation: there is evidence that its writer has stopped."""
        generation = reservation.generation
        del self._by_generation[generation]
        self._expired.pop(generation, None)
        for table, name in ((self._by_session, reservation.session), (self._by_segment, reservation.segment_id)):
            del table[name][generation]
            if not table[name]:
                del table[name]

    def overdue(self, now: float) -> Iterator[Reservation]:
        """Live reservations past their deadline, each once; the caller expires them."""
        for generation in self._deadlines.due(now):
            yield self._by_generation[generation]

    def _enlist(self, reservation: Reservation) -> None:
        first = self._live.setdefault(reservation.key, reservation)
        if first is not reservation:
            reservation.next = first
            self._live[reservation.key] = reservation

    def _deadline(self, generation: int) -> float | None:
        reservation = self._by_generation.get(generation)
        return reservation.deadline if reservation is not None and reservation.live else None

    def check_integrity(self) -> None:
        """Raises ``AssertionError`` unless every view of the table agrees."""
        everything = set(self._by_generation)
        assert {g for of in self._by_session.values() for g in of} == everything
        assert {g for of in self._by_segment.values() for g in of} == everything
        live = {g for g, reservation in self._by_generation.items() if reservation.live}
        assert {each.generation for first in self._live.values() for each in chain(first)} == live
        assert all(each.key == key for key, first in self._live.items() for each in chain(first))
        expired = {g for g, each in self._by_generation.items() if not each.live and each.key != UNNAMED}
        assert expired == set(self._expired)
        assert all(self._deadlines.covers(generation, self._by_generation[generation].deadline) for generation in live)


def chain(first: Reservation | None) -> Iterator[Reservation]:
    """A live reservation and those of the same key that follow it."""
    while first is not None:
        yield first
        first = first.next
