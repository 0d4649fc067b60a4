"""A segment as the server knows it: its records, its free space, what its donor has yet to retire, and its gate.

Every record that is not free is held by a placement, a reservation or a pending retire, and so is the record's extent. Not
here: when any of these come and go (``catalog.py``), and how a registered segment is rebuilt (``handover.py``).
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum
from typing import TYPE_CHECKING, Final

import msgspec

from vcache.protocol import DemoteItem, Destination, PullItem, RetireItem, SegmentInfo
from vram_metadata_server.allocator import ALIGNMENT, ExtentAllocator, round_up
from vram_metadata_server.index import Placement
from vram_metadata_server.reservations import Reservation

if TYPE_CHECKING:
    from vram_metadata_server.removal import Removal

MAX_RECORDS: Final = 1 << 20


class SegmentState(Enum):
    """Where a segment is in its life. Its entries are hits in ``GATED`` and ``SERVING``; only ``SERVING`` grants."""

    GATED = "gated"
    SERVING = "serving"
    DRAINING = "draining"
    DROPPED = "dropped"


class Retiring(msgspec.Struct, gc=False, eq=False):
    """A record that its donor has been asked to retire in memory; record and extent are free when it says so."""

    segment: Segment
    record: int
    generation: int
    key: bytes
    tenant: int
    offset: int
    nbytes: int
    waiters: list[Removal]


class Pull(msgspec.Struct, gc=False, eq=False):
    """A placement of another host's segment that a donor is to copy into its own."""

    source: Segment
    item: PullItem


Holder = Placement | Reservation | Retiring


class Gate:
    """Why a segment grants nothing yet: the handover is not over, or writers of earlier terms have not been heard of.

    A writer may commit in memory, unknown to this server, until it says hello. So the last scan has to begin after the last
    hello (``is_settled``): otherwise the donor is ordered to register again.
    """

    def __init__(self, waiting: set[bytes]) -> None:
        self.handed_over = False
        self.waiting = waiting  # sessions: attached writers without a hello in this term, not proven dead
        self.is_settled = not waiting  # nobody was waited for when the present scan began
        self.retired: set[int] = set()  # generations retired meanwhile: a page may have been scanned before
        self.removals: list[Removal] = []  # to be answered only after it has opened: it may bring what they remove

    def begin_again(self, waiting: set[bytes]) -> None:
        """The segment registers again: a new scan begins."""
        self.handed_over = False
        self.waiting = waiting
        self.is_settled = not waiting

    @property
    def is_ready(self) -> bool:
        """Whether the gate may open."""
        return self.handed_over and self.is_settled and not self.waiting

    @property
    def wants_new_scan(self) -> bool:
        """Whether the handover is over and everybody was heard of, but some only after the scan had begun."""
        return self.handed_over and not self.is_settled and not self.waiting

    def settle_removals(self) -> None:
        """It has opened, or never will."""
        removals, self.removals = self.removals, []
        for removal in removals:
            removal.settle()


class Segment:
    """One incarnation of a segment in one term."""

    def __init__(
        self,
        info: SegmentInfo,
        *,
        donor: bytes,
        data_offset: int,
        record_count: int,
        waiting: set[bytes],
        spills: bool = False,
        pulls: bool = False,
    ) -> None:
        self.info = info
        self.number = info.number
        self.donor = donor
        self.data_offset = data_offset
        self.data_bytes = max(0, info.nbytes - data_offset)
        self.record_count = record_count
        self.state = SegmentState.GATED
        self.gate: Gate | None = Gate(waiting)
        self.space: ExtentAllocator | None = None  # made when the gate opens
        self.records: list[Holder | None] = []  # grows with the highest record in use
        self._free_records: list[int] = []
        self.records_used = 0
        self.retiring: dict[int, Retiring] = {}
        self.retiring_bytes = 0
        self.unsent: list[RetireItem] = []  # of ``retiring``: not yet ordered
        self.spills = spills  # its donor writes to the store
        self.pulls = pulls  # its donor copies from other hosts
        self.pulling: dict[int, Pull] = {}  # placements of other hosts that are being copied here, by generation
        self.pulling_bytes = 0
        self.unpulled: list[Pull] = []  # of ``pulling``: not yet ordered
        self.demoting: dict[int, DemoteItem] = {}  # placements that are being copied elsewhere, by generation
        self.demoting_bytes = 0
        self.undemoted: list[DemoteItem] = []  # of ``demoting``: not yet ordered

    @property
    def is_readable(self) -> bool:
        return self.state in (SegmentState.GATED, SegmentState.SERVING)

    @property
    def used_bytes(self) -> int:
        """Bytes of placements and reservations. What is being retired is on its way out and does not count."""
        return self.space.total_bytes - self.space.free_bytes - self.retiring_bytes if self.space is not None else 0

    @property
    def kept_records(self) -> int:
        """Records of placements and reservations."""
        return self.records_used - len(self.retiring)

    @property
    def staying_bytes(self) -> int:
        """``used_bytes`` without what is being demoted."""
        return self.used_bytes - self.demoting_bytes

    @property
    def staying_records(self) -> int:
        """``kept_records`` without those that are being demoted."""
        return self.kept_records - len(self.demoting)

    def is_fuller_than(self, share: float) -> bool:
        """Whether what stays takes more than this share of its bytes, or of its records."""
        space = self.space
        if space is None:
            return False
        nbytes = space.total_bytes - space.free_bytes - self.retiring_bytes - self.demoting_bytes
        records = self.records_used - len(self.retiring) - len(self.demoting)
        return nbytes > share * space.total_bytes or records > share * self.record_count

    def has_place(self, record: int, offset: int, nbytes: int) -> bool:
        """Whether there can be such a record with such an extent."""
        return (
            record < self.record_count
            and nbytes > 0
            and offset % ALIGNMENT == 0
            and self.data_offset <= offset
            and offset + nbytes <= self.info.nbytes
        )

    def holder(self, record: int) -> Holder | None:
        return self.records[record] if record < len(self.records) else None

    def has_room(self, nbytes: int) -> bool:
        """Whether ``allocate`` would find a record and an extent."""
        has_record = bool(self._free_records) or len(self.records) < self.record_count
        return has_record and self.space is not None and self.space.largest_free_bytes >= nbytes

    def allocate(self, nbytes: int) -> tuple[int, int] | None:
        """A record and an offset, taken; None when there is no record or no extent. The caller sets the holder."""
        if self.space is None or not (self._free_records or len(self.records) < self.record_count):
            return None
        offset = self.space.allocate(nbytes)
        if offset is None:
            return None
        if self._free_records:
            record = self._free_records.pop()
        else:
            record = len(self.records)
            self.records.append(None)
        self.records_used += 1
        return record, offset

    def occupy(self, record: int, holder: Holder) -> None:
        """Takes a record that memory or a writer says is in use, while the gate is closed."""
        assert self.space is None, "the allocator was already built"
        if record >= len(self.records):
            self.records.extend([None] * (record + 1 - len(self.records)))
        if self.records[record] is None:
            self.records_used += 1
        self.records[record] = holder

    def retire(self, item: Retiring) -> None:
        """The record's holder is gone; the donor is to retire it."""
        self.records[item.record] = item
        self.retiring[item.record] = item
        self.retiring_bytes += round_up(item.nbytes)
        self.unsent.append(RetireItem(item.record, item.generation))

    def retired(self, item: Retiring) -> None:
        """The donor has retired it: record and extent are free."""
        del self.retiring[item.record]
        self.retiring_bytes -= round_up(item.nbytes)
        self.records[item.record] = None
        self.records_used -= 1
        if self.space is not None:
            self.space.free(item.offset, item.nbytes)
            self._free_records.append(item.record)
        elif self.gate is not None:
            self.gate.retired.add(item.generation)

    def demote(self, placement: Placement, destination: Destination) -> None:
        """Its donor is to copy the placement's payload, or another host's (``PEER``); until then it stays what it is."""
        item = DemoteItem(placement.record, placement.generation, destination)
        self.demoting[item.generation] = item
        self.demoting_bytes += round_up(placement.extent[1])
        if destination is not Destination.PEER:
            self.undemoted.append(item)

    def stop_demoting(self, placement: Placement) -> None:
        """The copy is done, given up, or needed no more. Harmless for a placement that is not being demoted."""
        if self.demoting.pop(placement.generation, None) is not None:
            self.demoting_bytes -= round_up(placement.extent[1])

    def may_pull(self, sizes: list[int], watermark: float) -> bool:
        """Whether its donor can take so many bytes of another host, and the segment stays below the watermark with them."""
        if not self.pulls or self.state is not SegmentState.SERVING or self.space is None:
            return False
        nbytes = self.used_bytes + self.pulling_bytes + sum(map(round_up, sizes))
        records = self.kept_records + len(self.pulling) + len(sizes)
        is_below = nbytes <= watermark * self.space.total_bytes and records <= watermark * self.record_count
        return is_below and self.has_room(max(sizes))

    def pull(self, placement: Placement) -> None:
        """Its donor is to copy the placement, of another host's segment, into this one."""
        offset, nbytes = placement.extent
        item = PullItem(placement.record, placement.generation, placement.entry.key, offset, nbytes)
        order = self.pulling[item.generation] = Pull(placement.segment, item)
        self.pulling_bytes += round_up(nbytes)
        self.unpulled.append(order)

    def is_pulling(self, keys: Iterable[bytes]) -> bool:
        """Whether all of these are being copied here from other hosts."""
        return bool(self.pulling) and {*keys} <= {order.item.key for order in self.pulling.values()}

    def stop_pulling(self, generation: int) -> None:
        """As ``stop_demoting``."""
        order = self.pulling.pop(generation, None)
        if order is not None:
            self.pulling_bytes -= round_up(order.item.nbytes)

    def open(self) -> None:
        """Opens the gate: from here on it grants. Raises ``OverlapError`` when extents in use share bytes."""
        used = [extent_of(holder) for holder in self.records if holder is not None]
        self.space = ExtentAllocator.around(self.data_offset, self.info.nbytes, used)
        self._free_records = [record for record, holder in enumerate(self.records) if holder is None][::-1]
        self.gate = None
        self.state = SegmentState.SERVING

    def check_integrity(self) -> None:
        """Raises ``AssertionError`` unless records, extents and counts agree and no two extents overlap."""
        if not self.is_readable:
            return  # nothing in it is ever granted again
        held = [holder for holder in self.records if holder is not None]
        assert len(held) == self.records_used
        assert {item.record: item for item in held if isinstance(item, Retiring)} == self.retiring
        assert sum(round_up(item.nbytes) for item in self.retiring.values()) == self.retiring_bytes
        demoted = [holder for holder in held if isinstance(holder, Placement) and holder.generation in self.demoting]
        assert len(demoted) == len(self.demoting), "what is being demoted is not there"
        assert sum(round_up(holder.extent[1]) for holder in demoted) == self.demoting_bytes
        assert sum(round_up(order.item.nbytes) for order in self.pulling.values()) == self.pulling_bytes
        if self.space is None:
            return
        self.space.check_integrity()
        expected = ExtentAllocator.around(self.data_offset, self.info.nbytes, map(extent_of, held))
        assert expected.free_extents() == self.space.free_extents()
        assert sorted(self._free_records) == [at for at, holder in enumerate(self.records) if holder is None]


def extent_of(holder: Holder) -> tuple[int, int]:
    """Offset and nbytes of a record's extent."""
    return holder.extent if isinstance(holder, Placement) else (holder.offset, holder.nbytes)
