"""Segments come and go: registration, the records their donors hand over, and the gate before the first grant (docs/architecture.md, rule 5).

Steps of the protocol's model (``tests/model``) by name: *register*, *handover*, *hello* (a writer's claims), *gate opens*, *drop
segment*. A segment grants nothing until its last page came and every attached writer has said hello in this term, or is
proven dead; a record with a writer at work that nobody then claims is retired.
"""

from __future__ import annotations

import logging
from typing import Final

import msgspec

from vcache import protocol
from vcache.protocol import KEY_BYTES, ErrorCode, RecordInfo, SegmentInfo
from vram_metadata_server.allocator import ALIGNMENT, OverlapError
from vram_metadata_server.catalog import Catalog
from vram_metadata_server.claims import Claims
from vram_metadata_server.members import SEGMENTS_PER_SESSION, Members, Session
from vram_metadata_server.refusal import RefusalError
from vram_metadata_server.removal import Removal
from vram_metadata_server.removed import RemovedInTerm
from vram_metadata_server.reservations import NOBODY, Reservation
from vram_metadata_server.segments import MAX_RECORDS, Segment, SegmentState
from vram_metadata_server.tombstones import Tombstones
from vram_metadata_server.writes import MAX_GENERATION, Writes, await_settled

log = logging.getLogger(__name__)

_DROPPED_SEGMENTS: Final = 1 << 16


class ContradictionError(Exception):
    """A record of a segment cannot be true: the segment is not to be trusted."""


class Registrar:
    """All segments of the term: those registered by identity, and what is known of those that are gone."""

    def __init__(
        self, catalog: Catalog, tombstones: Tombstones, writes: Writes, members: Members, wall_s: float
    ) -> None:
        self._catalog = catalog
        self._tombstones = tombstones
        self._writes = writes
        self._members = members
        self._wall_s = wall_s  # unix time less ``now``
        self._by_id: dict[bytes, Segment] = {}
        self._dropped: dict[bytes, int] = {}  # segment id -> highest incarnation dropped in this term
        self._next_number = 1
        self.gated: dict[int, Segment] = {}
        self.removed = RemovedInTerm()
        self._claims = Claims(catalog, writes, self.removed)

    # --- register -------------------------------------------------------------------------------------------------

    def register(self, donor: Session, request: protocol.RegisterSegment) -> Segment:
        """*register*: takes a segment into the pool, its gate closed. Raises ``RefusalError``."""
        known = self._by_id.get(request.segment_id)
        waiting = {name for name in request.attached if self._members.get(name) is None}
        if known is not None and known.info.incarnation == request.incarnation and known.donor == donor.id:
            if known.gate is not None:
                known.gate.begin_again(waiting)
            if known.info.remote != request.remote:
                self._announce(known, request.remote)
            return known
        self._may_register(donor, request, known)
        if known is not None:
            self.drop(known, "registered again")
        info = SegmentInfo(
            number=self._next_number,
            segment_id=request.segment_id,
            incarnation=request.incarnation,
            tier=request.tier,
            host=donor.host,
            device=request.device,
            nbytes=request.nbytes,
            handle=request.handle,
            label=request.label,
            remote=request.remote,
        )
        self._next_number += 1
        segment = Segment(
            info,
            donor=donor.id,
            data_offset=request.data_offset,
            record_count=request.records,
            waiting=waiting,
            spills=request.spills,
            pulls=request.pulls,
        )
        catalog = self._catalog
        catalog.segments[segment.number] = self.gated[segment.number] = self._by_id[request.segment_id] = segment
        catalog.segments_version += 1
        catalog.counters["segments_registered"] += 1
        donor.segments.add(segment.number)
        for claim in list(catalog.reservations.of_segment(request.segment_id).values()):
            self._claims.attach(claim, segment)
        log.info(
            "segment %d %s (%s, %d bytes) registered by %s; waiting for its records and %d writers",
            segment.number, request.segment_id.hex(), request.device, request.nbytes, donor.name, len(waiting),
        )  # fmt: skip
        return segment

    def _announce(self, segment: Segment, remote: bytes) -> None:
        """Other hosts read the segment in another way from now on: whoever was told of it is told again."""
        segment.info = msgspec.structs.replace(segment.info, remote=remote)
        for session in self._members:
            session.told.discard(segment.number)
            session.told_version = session.news_version = -1

    def _may_register(self, donor: Session, request: protocol.RegisterSegment, known: Segment | None) -> None:
        last = self._dropped.get(request.segment_id, -1)
        if known is not None:
            if known.donor != donor.id:
                raise RefusalError(ErrorCode.REFUSED, "segment_id: registered by another session")
            last = known.info.incarnation
        if request.incarnation <= last:
            raise RefusalError(
                ErrorCode.UNKNOWN_SEGMENT,
                f"incarnation {request.incarnation}: {last} was dropped in this term; retire its records, then register {last + 1}",
            )
        if not 1 <= request.records <= MAX_RECORDS or not 0 < request.data_offset < request.nbytes:
            raise RefusalError(
                ErrorCode.BAD_REQUEST,
                f"records must be 1..{MAX_RECORDS} and data_offset in the segment: got {request.records}, "
                f"{request.data_offset} of {request.nbytes} bytes",
            )
        if request.data_offset % ALIGNMENT:
            raise RefusalError(
                ErrorCode.BAD_REQUEST, f"data_offset: {request.data_offset} is not a multiple of {ALIGNMENT}"
            )
        if len(donor.segments) >= SEGMENTS_PER_SESSION:
            raise RefusalError(ErrorCode.REFUSED, f"a session may register {SEGMENTS_PER_SESSION} segments")

    def segment_of(self, donor: Session, number: int) -> Segment:
        """The donor's segment of this number. Raises ``RefusalError``."""
        segment = self._catalog.segments.get(number)
        if segment is None:
            raise RefusalError(ErrorCode.UNKNOWN_SEGMENT, f"segment {number}: dropped, or never was")
        if segment.donor != donor.id:
            raise RefusalError(ErrorCode.REFUSED, f"segment {number}: another session's")
        return segment

    # --- a writer's claims ----------------------------------------------------------------------------------------

    def hello(self, session: Session, outstanding: list[protocol.Reservation]) -> None:
        """*hello*: what the writer holds of earlier terms is nobody else's; gates wait for it no longer."""
        for said in outstanding:
            self._claims.take(session, said, self._by_id.get(said.segment_id))
        for segment in list(self.gated.values()):
            assert segment.gate is not None
            segment.gate.waiting.discard(session.id)
            self.open_if_ready(segment)

    # --- handover -------------------------------------------------------------------------------------------------

    def hand_over(self, segment: Segment, request: protocol.Handover) -> int:
        """*handover*: takes a page of records into the index. Answers how many. Raises ``RefusalError``."""
        gate = segment.gate
        if gate is None or segment.state is SegmentState.DRAINING:
            return 0  # sent again, or too late
        taken = 0
        try:
            for item in request.items:
                taken += self._take(segment, item, gate.removals)
        except ContradictionError as error:
            self._corrupt(segment, str(error))
        if request.last and not gate.handed_over and segment.is_readable:
            gate.handed_over = True
            self.open_if_ready(segment)
        if not segment.is_readable:
            raise RefusalError(
                ErrorCode.UNKNOWN_SEGMENT, f"segment {segment.number}: its records contradict each other"
            )
        return taken

    def _take(self, segment: Segment, item: RecordInfo, removals: list[Removal]) -> int:
        if item.generation >= MAX_GENERATION:
            raise ContradictionError(f"record {item.record}: the impossible generation {item.generation}")
        self._writes.saw_generation(item.generation)
        if not segment.has_place(item.record, item.offset, item.nbytes):
            raise ContradictionError(f"record {item.record}: an extent at {item.offset} of {item.nbytes} bytes")
        committed = (item.generation + 1) & ~1
        if segment.gate is not None and committed in segment.gate.retired:
            return 0  # scanned before it was retired
        holder = segment.holder(item.record)
        if holder is not None:
            if holder.generation != committed:
                raise ContradictionError(
                    f"record {item.record}: generation {item.generation}, held for {holder.generation}"
                )
            if isinstance(holder, Reservation) and holder.session != NOBODY and item.generation == committed:
                return self._take_claimed(holder)
            return 0
        catalog = self._catalog
        found = Reservation(
            generation=committed,
            session=NOBODY,
            key=item.key,
            parent=item.parent if len(item.parent) == KEY_BYTES else b"",
            tenant=item.tenant,
            rank=item.rank,
            ranks=item.ranks,
            segment=segment,
            segment_id=segment.info.segment_id,
            incarnation=segment.info.incarnation,
            record=item.record,
            offset=item.offset,
            nbytes=item.nbytes,
            ttl_s=max(1e-9, item.expires_s - self._wall_s - catalog.now) if item.expires_s else 0.0,
            pin_s=0.0,
            deadline=0.0,
            live=False,
        )
        segment.occupy(item.record, found)
        removed = self.removed.covers(item.key, item.tenant, committed)
        if removed:
            await_settled(found, removals)
        if item.generation != committed:  # a writer at work: claimed in a hello, or retired when the gate opens
            catalog.reservations.add(found)
            return 0
        expired = bool(item.expires_s) and item.expires_s <= self._wall_s + catalog.now
        if expired or removed or item.rank >= item.ranks or not catalog.fits(item.key, item.ranks):
            self._retire(found)
            return 0
        catalog.offer(catalog.admit(segment, found))
        catalog.counters["handed_over"] += 1
        return 1

    def _take_claimed(self, claim: Reservation) -> int:
        """Memory says that a claimed record is committed: its writer has stopped, told or not."""
        if claim.live:
            self._catalog.offer(self._writes.admit(claim))
            return 1
        self._writes.settle(claim)
        return 0

    def _retire(self, found: Reservation) -> None:
        self._writes.retire(found)
        self._catalog.counters["handover_retired"] += 1

    # --- the gate -------------------------------------------------------------------------------------------------

    def proven_dead(self, donor: Session, name: bytes) -> None:
        """*writer proven dead*: the donor's gates wait for it no longer."""
        for number in donor.segments:
            segment = self.gated.get(number)
            if segment is not None and segment.gate is not None and name in segment.gate.waiting:
                segment.gate.waiting.discard(name)
                self.open_if_ready(segment)

    def open_if_ready(self, segment: Segment) -> None:
        """*gate opens*, when nothing is left to wait for."""
        gate = segment.gate
        if gate is None:
            return
        if segment.state is SegmentState.DRAINING:
            if not gate.waiting:
                self._retire_unclaimed(segment)
                segment.gate = None
                del self.gated[segment.number]
            return
        if not gate.is_ready:
            if gate.wants_new_scan:
                self._catalog.to_order[segment] = None
            return
        self._retire_unclaimed(segment)
        try:
            segment.open()
        except OverlapError as error:
            self._corrupt(segment, str(error))
            return
        gate.settle_removals()
        del self.gated[segment.number]
        self._catalog.pressure.check(segment)
        log.info("segment %d serves: %d records", segment.number, segment.kept_records)

    def _retire_unclaimed(self, segment: Segment) -> None:
        """What a writer was at work on whom nobody heard of: all who may have been have said hello, or are dead."""
        reservations = self._catalog.reservations
        for found in list(reservations.of_segment(segment.info.segment_id).values()):
            if found.session == NOBODY:
                reservations.settle(found)
                self._retire(found)

    # --- segments go ----------------------------------------------------------------------------------------------

    def drop(self, segment: Segment, why: str) -> None:
        """*drop segment*: it is no more, and its entries with it."""
        catalog = self._catalog
        was_readable = segment.is_readable
        segment.state = SegmentState.DROPPED
        del catalog.segments[segment.number]
        del self._by_id[segment.info.segment_id]
        self.gated.pop(segment.number, None)
        catalog.segments_version += 1
        catalog.to_order.pop(segment, None)
        catalog.pressure.forget(segment)
        self._dropped[segment.info.segment_id] = segment.info.incarnation
        if len(self._dropped) > _DROPPED_SEGMENTS:
            del self._dropped[next(iter(self._dropped))]
        donor = self._members.get(segment.donor)
        if donor is not None:
            donor.segments.discard(segment.number)
        if segment.gate is not None:
            segment.gate.settle_removals()
        self._writes.expire_all_of(segment)
        if was_readable:
            self._tombstones.bury_segment(segment)
        catalog.counters["segments_dropped"] += 1
        log.info("segment %d dropped: %s", segment.number, why)

    def drain(self, segment: Segment) -> None:
        """No new grants or leases in it from here on. Writers that its gate waits for are waited for still."""
        if segment.state is SegmentState.DRAINING:
            return
        segment.state = SegmentState.DRAINING
        if segment.gate is not None:
            segment.gate.settle_removals()
            self.open_if_ready(segment)
        self._catalog.to_order.pop(segment, None)
        self._catalog.pressure.forget(segment)
        self._catalog.segments_version += 1
        self._tombstones.bury_segment(segment)

    def _corrupt(self, segment: Segment, why: str) -> None:
        log.error("segment %d is not to be trusted: %s", segment.number, why)
        self._catalog.counters["segments_corrupt"] += 1
        self.drop(segment, "corrupt")
