"""What writers say, on their hello, that they hold of earlier terms: their records and extents are nobody else's.

The order of things is free: a claim may come before its segment registers, after, or after a handover brought the record.
"""

from __future__ import annotations

import logging

from vcache import protocol
from vram_metadata_server.catalog import Catalog
from vram_metadata_server.members import Session
from vram_metadata_server.removed import RemovedInTerm
from vram_metadata_server.reservations import NOBODY, UNNAMED, Reservation
from vram_metadata_server.segments import Segment
from vram_metadata_server.writes import MAX_GENERATION, Writes, await_settled

log = logging.getLogger(__name__)


class Claims:
    """Turns claims into reservations."""

    def __init__(self, catalog: Catalog, writes: Writes, removed: RemovedInTerm) -> None:
        self._catalog = catalog
        self._writes = writes
        self._removed = removed

    def take(self, session: Session, said: protocol.Reservation, segment: Segment | None) -> None:
        """One claim of a writer. ``segment``: the one it names, if that has registered in this term."""
        if said.generation >= MAX_GENERATION:
            log.error("%s claims the impossible generation %d", session.name, said.generation)
            return
        self._writes.saw_generation(said.generation)
        known = self._catalog.reservations.get(said.generation)
        if known is None:
            self._claim(session, said, segment)
        elif known.session == NOBODY:
            self._claim_found(session, said, known)

    def attach(self, claim: Reservation, segment: Segment) -> None:
        """The claim's segment has registered: record and extent are held for it."""
        if segment.holder(claim.record) is not None or not segment.has_place(claim.record, claim.offset, claim.nbytes):
            log.error("a claim on record %d of segment %d contradicts it", claim.record, segment.number)
            return
        claim.segment = segment
        segment.occupy(claim.record, claim)
        if claim.incarnation == segment.info.incarnation:
            self._revive(claim)

    def _claim(self, session: Session, said: protocol.Reservation, segment: Segment | None) -> None:
        claim = Reservation(
            generation=said.generation,
            session=session.id,
            key=said.key,
            parent=said.parent,
            tenant=said.tenant,
            rank=said.rank,
            ranks=said.ranks,
            segment=None,
            segment_id=said.segment_id,
            incarnation=said.incarnation,
            record=said.record,
            offset=said.offset,
            nbytes=said.nbytes,
            ttl_s=said.ttl_s,
            pin_s=0.0,
            deadline=0.0,
            live=False,
        )
        if segment is None:
            self._catalog.reservations.add(claim)
        elif segment.gate is not None:
            holder = segment.holder(said.record)
            if said.generation in segment.gate.retired or (holder and holder.generation == said.generation):
                return  # memory said that it was committed: its writer has stopped
            self._catalog.reservations.add(claim)
            if self._is_removed(claim):
                await_settled(claim, segment.gate.removals)
            self.attach(claim, segment)
        # else: the gate is open, so all that were attached have been heard of, and this one claims what is not its own

    def _claim_found(self, session: Session, said: protocol.Reservation, found: Reservation) -> None:
        """The writing record that a handover brought has an owner now."""
        reservations = self._catalog.reservations
        reservations.settle(found)
        found.session, found.ttl_s = session.id, said.ttl_s
        reservations.add(found)
        self._revive(found)

    def _revive(self, claim: Reservation) -> None:
        """The writer may still commit, if nobody else writes this shard, and it was not removed meanwhile."""
        catalog = self._catalog
        if claim.key == UNNAMED:
            return  # an allocation: nobody commits it before it has a key
        if self._is_removed(claim):
            return
        if (
            claim.rank < claim.ranks
            and catalog.fits(claim.key, claim.ranks)
            and catalog.reservations.live(claim.key, claim.rank) is None
        ):
            catalog.reservations.revive(claim, catalog.now + catalog.settings.reservation_s)
            catalog.index.add_child(claim.parent)

    def _is_removed(self, claim: Reservation) -> bool:
        return self._removed.covers(claim.key, claim.tenant, claim.generation)
