"""A write from reserve to the evidence that its writer has stopped (docs/architecture.md, rule 4).

Steps of the protocol's model (``tests/model``) by name: *reserve*, *commit told*, *commit refused*, *abort told*, *reservation
expires* (time frees the key, nothing else), *heartbeat settles*, *writer proven dead*. Each kind of evidence ends in
``settle``: the donor is ordered to retire the record, and only then are record and extent free.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import Final

from vcache import protocol
from vcache.protocol import PLACEMENT, ErrorCode, Outcome
from vram_metadata_server.catalog import Catalog, key_text
from vram_metadata_server.index import Entry, copies_of, split_keys
from vram_metadata_server.members import Session
from vram_metadata_server.pins import PinTable
from vram_metadata_server.placement import is_for_copy, is_target, segments_for_write
from vram_metadata_server.refusal import RefusalError
from vram_metadata_server.removal import Removal
from vram_metadata_server.reservations import NOBODY, OUTSTANDING_PER_SESSION, Reservation, chain
from vram_metadata_server.segments import Retiring, Segment, SegmentState
from vram_metadata_server.tombstones import Tombstones

log = logging.getLogger(__name__)

_TERM_BITS: Final = 20
# A member of an enumeration looked up by its class takes ten times as long.
_GRANTED: Final = Outcome.GRANTED
_EXISTS: Final = Outcome.EXISTS
_NO_SPACE: Final = Outcome.NO_SPACE
_DECLINED: Final = Outcome.DECLINED
#: No term's generations come near it (that of the year 2100 do); one beyond it is a lie, and believing it would use them up.
MAX_GENERATION: Final = 1 << 62


class Writes:
    """Grants, commits and evidence. Generations begin at the term and never repeat."""

    def __init__(self, catalog: Catalog, tombstones: Tombstones, pins: PinTable, term: int) -> None:
        self._catalog = catalog
        self._tombstones = tombstones
        self._pins = pins
        self._first_generation = term << _TERM_BITS
        self.next_generation = self._first_generation + 2

    def saw_generation(self, generation: int) -> None:
        """Memory or a writer knows this generation: it is never issued again."""
        if generation >= self.next_generation:
            self.next_generation = (generation + 3) & ~1

    def take_generation(self) -> int:
        """One that never was and never will be another's."""
        generation = self.next_generation
        self.next_generation += 2
        return generation

    # --- reserve --------------------------------------------------------------------------------------------------

    def reserve(self, writer: Session, request: protocol.Reserve) -> tuple[bytes, bytes]:
        """*reserve*: an outcome byte per key, and the placements of those granted. Raises ``RefusalError``."""
        catalog = self._catalog
        keys = split_keys(request.keys)
        _check(request)
        able = segments_for_write(catalog.segments_of(writer.host), writer, request, catalog.settings.placement)
        best = able[-1] if able else None
        others = able[:-1]
        is_copy = is_for_copy(request)
        room = OUTSTANDING_PER_SESSION - len(catalog.reservations.of_session(writer.id))
        outcomes = bytearray()
        granted: list[bytes] = []
        parent, rank, ranks = request.parent, request.rank, request.ranks
        for key in keys:
            outcome = self._standing_of_copy(key, writer, request) if is_copy else self.standing(key, rank, ranks)
            if outcome is _GRANTED:
                if best is None or len(granted) >= room:
                    outcome = _DECLINED
                else:
                    packed = self._grant(writer, request, key, parent, able)
                    if packed is None:
                        outcome = _NO_SPACE
                    else:
                        granted.append(packed)
            outcomes.append(outcome)
            if request.chained:
                parent = key
        self.count(outcomes, len(granted))
        if best is not None:
            if len(granted) < len(keys) and _NO_SPACE in outcomes:
                if not best.is_pulling(keys):  # what is pulled pushes nothing out
                    catalog.pressure.nudge(best, request.nbytes)
            elif granted:
                catalog.pressure.check(best)
                if able[-1] is not best:  # it was full: others of these took what it could not
                    for segment in others:
                        catalog.pressure.check(segment)
        return bytes(outcomes), b"".join(granted)

    def standing(self, key: bytes, rank: int, ranks: int) -> Outcome:
        """``GRANTED`` when nobody has or is writing this shard."""
        catalog = self._catalog
        entry = catalog.index.get(key)
        if entry is not None and self._tombstones.sweeps:
            entry = self._find(key)
        if entry is not None:
            if len(entry.shards) != ranks:
                return _DECLINED
            if entry.shards[rank] is not None:
                return _EXISTS
        return _EXISTS if catalog.reservations.live(key, rank) is not None else _GRANTED

    def _standing_of_copy(self, key: bytes, writer: Session, request: protocol.Reserve) -> Outcome:
        """``GRANTED`` when somebody has this shard, and nobody has or is writing it where the copy is to be."""
        entry = self._find(key)
        if entry is None or len(entry.shards) != request.ranks or entry.shards[request.rank] is None:
            return _DECLINED
        placements = copies_of(entry.shards[request.rank])
        live = chain(self._catalog.reservations.live(key, request.rank))
        writing = [other.segment for other in live if other.rank == request.rank]
        there = [*(placement.segment for placement in placements), *writing]
        is_there = any(segment is not None and is_target(segment, writer, request) for segment in there)
        return _EXISTS if is_there else _GRANTED

    def _find(self, key: bytes) -> Entry | None:
        entry = self._catalog.index.get(key)
        if entry is not None and self._tombstones.sweeps:
            self._tombstones.bury(entry)
            return self._catalog.index.get(key)
        return entry

    def _grant(
        self, writer: Session, request: protocol.Reserve, key: bytes, parent: bytes, able: list[Segment]
    ) -> bytes | None:
        nbytes = request.nbytes
        found: tuple[int, int] | None = None
        while able:
            found = able[-1].allocate(nbytes)
            if found is not None:
                break
            able.pop()  # full for every further key of this call, too
        if found is None:
            return None
        segment = able[-1]
        record, offset = found
        generation = self.take_generation()
        catalog = self._catalog
        info = segment.info
        reservation = Reservation(  # by position: by name it takes six times as long
            generation,
            writer.id,
            key,
            parent,
            request.tenant,
            request.rank,
            request.ranks,
            segment,
            info.segment_id,
            info.incarnation,
            record,
            offset,
            nbytes,
            request.ttl_s,
            request.pin_s,
            catalog.now + catalog.settings.reservation_s,
            True,  # live
        )
        segment.records[record] = reservation
        catalog.reservations.add(reservation)
        catalog.index.add_child(parent)
        if log.isEnabledFor(logging.DEBUG):
            log.debug("reserve %s: segment %d record %d for %s", key_text(key), segment.number, record, writer.name)
        return PLACEMENT.pack(segment.number, record, generation, offset, nbytes)

    def count(self, outcomes: bytearray, granted: int) -> None:
        """Counts what became of so many keys, of which so many were granted."""
        counters = self._catalog.counters
        counters["reserved"] += granted
        if granted < len(outcomes):
            counters["reserve_exists"] += outcomes.count(_EXISTS)
            counters["reserve_no_space"] += outcomes.count(_NO_SPACE)
            counters["reserve_declined"] += outcomes.count(_DECLINED)

    # --- the writer tells -----------------------------------------------------------------------------------------

    def commit(self, session: bytes, generations: Sequence[int]) -> None:
        """*commit told* for live reservations, *commit refused* for the others; both prove that the writer has stopped."""
        catalog = self._catalog
        counters = catalog.counters
        made: list[Entry] = []
        for generation in generations:
            reservation = catalog.reservations.get(generation)
            if reservation is None or reservation.session != session:
                counters["commits_unknown"] += 1
                continue
            segment = reservation.segment
            is_kept = reservation.live and segment is not None and segment.is_readable  # not one that is draining
            if is_kept and catalog.fits(reservation.key, reservation.ranks):
                made.append(self.admit(reservation))
                continue
            counters["commits_refused"] += 1
            self._end(reservation)
        catalog.policy.touch(made)
        for entry in made:
            catalog.offer(entry)

    def admit(self, reservation: Reservation) -> Entry:
        """Makes a live reservation, committed in memory, a placement."""
        catalog = self._catalog
        segment = reservation.segment
        assert segment is not None and reservation.live, "a claim without a segment is never live"
        entry = catalog.admit(segment, reservation)
        self._expire(reservation)
        catalog.reservations.settle(reservation)
        if reservation.pin_s:
            self._pins.pin(entry, catalog.now + reservation.pin_s)
        catalog.counters["committed"] += 1
        if log.isEnabledFor(logging.DEBUG):
            log.debug("commit %s: segment %d record %d", key_text(entry.key), segment.number, reservation.record)
        return entry

    def abort(self, session: bytes, generations: Iterable[int]) -> None:
        """*abort told*: its writer has stopped."""
        for generation in generations:
            reservation = self._catalog.reservations.get(generation)
            if reservation is not None and reservation.session == session:
                self._catalog.counters["aborted"] += 1
                self._end(reservation)

    # --- time and evidence ----------------------------------------------------------------------------------------

    def expire(self, now: float) -> None:
        """*reservation expires*: the key is free; record and extent wait for evidence."""
        for reservation in self._catalog.reservations.overdue(now):
            self._catalog.counters["reservations_expired"] += 1
            log.info("reservation of %s expired: waiting for its writer", key_text(reservation.key))
            self._expire(reservation)
            if reservation.stopped:
                self.settle(reservation)

    def expire_all_of(self, segment: Segment) -> None:
        """The segment is dropped: what was reserved in it becomes claims, in case its memory comes back."""
        for reservation in list(self._catalog.reservations.of_segment(segment.info.segment_id).values()):
            if reservation.segment is segment:
                self._expire(reservation)
                reservation.segment = None
                # A record that was found without an owner is found again if its memory comes back.
                if reservation.stopped or reservation.session == NOBODY:
                    self.settle(reservation)

    def heard_from(self, session: bytes, seen: int, outstanding: Iterable[int]) -> None:
        """*heartbeat settles* every reservation of the session up to ``seen`` that it does not list."""
        mine = self._catalog.reservations.of_session(session)
        if not mine:
            return
        kept = set(outstanding)
        for generation, reservation in list(mine.items()):
            if generation not in kept and (generation <= seen or generation < self._first_generation):
                self._stopped(reservation)

    def said_goodbye(self, session: bytes) -> None:
        """Everything of the session is settled; a commit may still be on its way by its other socket."""
        for reservation in list(self._catalog.reservations.of_session(session).values()):
            self._stopped(reservation)

    def call_off(self, writes: Iterable[Reservation], removal: Removal) -> None:
        """What they write was removed: their commits are refused, and the removal is answered when they are gone from memory.

        A writer that has committed in memory and is refused is gone only then: until its record is retired, a handover to the
        next server could bring it.
        """
        for reservation in writes:
            segment = reservation.segment
            if segment is None or segment.is_readable:  # else it is being drained: nothing comes back from there
                await_settled(reservation, [removal])
            self._expire(reservation)
            if reservation.stopped:
                self.settle(reservation)

    def forget_claims(self, session: bytes) -> None:
        """The session is forgotten; none of its reservations lies in a registered segment."""
        for reservation in list(self._catalog.reservations.of_session(session).values()):
            assert reservation.segment is None
            _answer(reservation)
            self._catalog.reservations.settle(reservation)

    def proven_dead(self, session: bytes) -> None:
        """*writer proven dead*: nobody will touch what it had reserved."""
        for reservation in list(self._catalog.reservations.of_session(session).values()):
            self._end(reservation)

    def _stopped(self, reservation: Reservation) -> None:
        if reservation.live:
            reservation.stopped = True
        else:
            self.settle(reservation)

    def _expire(self, reservation: Reservation) -> None:
        if reservation.live:
            self._catalog.reservations.expire(reservation)
            self._catalog.offer(self._catalog.index.drop_child(reservation.parent))

    def _end(self, reservation: Reservation) -> None:
        self._expire(reservation)
        self.settle(reservation)

    def settle(self, reservation: Reservation) -> None:
        """There is evidence that the writer of an expired reservation has stopped: its record is to be retired."""
        self._catalog.reservations.settle(reservation)
        self._catalog.counters["reservations_settled"] += 1
        self.retire(reservation)

    def retire(self, reservation: Reservation) -> None:
        """Orders the record of a reservation that is in the table no more to be retired; removals wait for that."""
        segment = reservation.segment
        if segment is None or segment.state is SegmentState.DROPPED:
            _answer(reservation)
            return
        item = Retiring(
            segment,
            reservation.record,
            reservation.generation,
            reservation.key,
            reservation.tenant,
            reservation.offset,
            reservation.nbytes,
            [],
        )
        if self._catalog.retire_record(item):
            item.waiters.extend(reservation.waiters or ())
        else:
            _answer(reservation)


def _check(request: protocol.Reserve) -> None:
    if request.parent and len(request.parent) != protocol.KEY_BYTES:
        raise RefusalError(ErrorCode.BAD_REQUEST, f"parent: {len(request.parent)} bytes are not a key")
    if request.rank >= request.ranks:
        raise RefusalError(ErrorCode.BAD_REQUEST, f"rank {request.rank} of {request.ranks} ranks")
    if not request.nbytes:
        raise RefusalError(ErrorCode.BAD_REQUEST, "nbytes: an empty payload")


def await_settled(reservation: Reservation, removals: Iterable[Removal]) -> None:
    """The removals are answered no earlier than there is evidence, and the record is retired."""
    for removal in removals:
        removal.wait()
        reservation.waiters = [*(reservation.waiters or ()), removal]


def _answer(reservation: Reservation) -> None:
    """Nothing can come of the reservation any more: removals of its key need not wait for it."""
    for removal in reservation.waiters or ():
        removal.settle()
    reservation.waiters = None
