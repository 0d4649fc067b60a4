"""Space first, keys later: a donor's own processes fill extents of its segment before they know which chunk is in them.

An allocation is a reservation that is expired from the start (``reservations.py``): record and extent are its writer's until
there is evidence that it has stopped, no key is taken, a commit is refused. ``assign`` gives it a key and its deadline, and from
there on it is a reservation like any other. Steps of the protocol's model (``tests/model``): *allocate*, *assign*.
"""

from __future__ import annotations

from typing import Final

from vcache import protocol
from vcache.protocol import KEY_BYTES, PLACEMENT, ErrorCode, Outcome
from vram_metadata_server.catalog import Catalog
from vram_metadata_server.index import split_keys
from vram_metadata_server.members import Session
from vram_metadata_server.refusal import RefusalError
from vram_metadata_server.removed import RemovedInTerm
from vram_metadata_server.reservations import OUTSTANDING_PER_SESSION, UNNAMED, Reservation
from vram_metadata_server.segments import Segment, SegmentState
from vram_metadata_server.writes import Writes

_RANK: Final = 0
_RANKS: Final = 1


class Allocations:
    """Grants without keys, and keys for them."""

    def __init__(self, catalog: Catalog, writes: Writes, removed: RemovedInTerm) -> None:
        self._catalog = catalog
        self._writes = writes
        self._removed = removed

    def allocate(self, writer: Session, segment: Segment, request: protocol.Allocate) -> tuple[bytes, bytes]:
        """*allocate*: an outcome byte for each, and the placements of those granted. Raises ``RefusalError``."""
        if not request.nbytes:
            raise RefusalError(ErrorCode.BAD_REQUEST, "nbytes: an empty payload")
        if not writer.writes:
            raise RefusalError(ErrorCode.REFUSED, "this session said in its hello that it does not write")
        granted: list[bytes] = []
        room = OUTSTANDING_PER_SESSION - len(self._catalog.reservations.of_session(writer.id))
        missing = Outcome.DECLINED
        if segment.state is SegmentState.SERVING and segment.data_bytes >= request.nbytes:
            for _ in range(min(request.count, room)):
                found = segment.allocate(request.nbytes)
                if found is None:
                    missing = Outcome.NO_SPACE
                    break
                granted.append(self._hold(writer, segment, request, *found))
        outcomes = bytearray([Outcome.GRANTED] * len(granted)).ljust(request.count, bytes([missing]))
        self._writes.count(outcomes, len(granted))
        if missing is Outcome.NO_SPACE:
            self._catalog.pressure.nudge(segment, request.nbytes)
        elif granted:
            self._catalog.pressure.check(segment)
        return bytes(outcomes), b"".join(granted)

    def _hold(self, writer: Session, segment: Segment, request: protocol.Allocate, record: int, offset: int) -> bytes:
        reservation = Reservation(
            generation=self._writes.take_generation(),
            session=writer.id,
            key=UNNAMED,
            parent=b"",
            tenant=request.tenant,
            rank=_RANK,
            ranks=_RANKS,
            segment=segment,
            segment_id=segment.info.segment_id,
            incarnation=segment.info.incarnation,
            record=record,
            offset=offset,
            nbytes=request.nbytes,
            ttl_s=0,
            pin_s=0.0,
            deadline=0.0,
            live=False,
        )
        segment.records[record] = reservation
        self._catalog.reservations.add(reservation)
        return PLACEMENT.pack(segment.number, record, reservation.generation, offset, request.nbytes)

    def assign(self, writer: Session, request: protocol.Assign) -> bytes:
        """*assign*: an outcome byte for each. Raises ``RefusalError``."""
        keys = split_keys(request.keys)
        if len(keys) != len(request.generations):
            raise RefusalError(ErrorCode.BAD_REQUEST, f"{len(keys)} keys for {len(request.generations)} generations")
        if request.parent and len(request.parent) != KEY_BYTES:
            raise RefusalError(ErrorCode.BAD_REQUEST, f"parent: {len(request.parent)} bytes are not a key")
        outcomes = bytearray()
        parent = request.parent
        for generation, key in zip(request.generations, keys, strict=True):
            outcomes.append(self._assign(writer, generation, key, parent))
            parent = key
        return bytes(outcomes)

    def _assign(self, writer: Session, generation: int, key: bytes, parent: bytes) -> Outcome:
        catalog = self._catalog
        found = catalog.reservations.get(generation)
        if found is None or found.session != writer.id or found.key != UNNAMED or found.stopped or key == UNNAMED:
            return Outcome.DECLINED
        segment = found.segment
        if segment is None or not segment.is_readable or found.incarnation != segment.info.incarnation:
            return Outcome.DECLINED
        if self._removed.clears(found.tenant, generation):
            return Outcome.DECLINED  # nobody knows when it was filled
        outcome = self._writes.standing(key, _RANK, _RANKS)
        if outcome is Outcome.GRANTED:
            found.key, found.parent = key, parent
            catalog.reservations.revive(found, catalog.now + catalog.settings.reservation_s)
            catalog.index.add_child(parent)
        return outcome
