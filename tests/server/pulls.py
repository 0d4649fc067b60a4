"""A donor's pulls from other hosts, at message level, one step at a time: read the payload, read its record, write, tell."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from tests.server.memory import UNIT, Record
from vcache import protocol
from vcache.protocol import Outcome

if TYPE_CHECKING:
    from tests.server.donation import Donation
    from tests.server.members import Write


@dataclass
class Staged:
    """A payload in staging memory: whose bytes they are; its record, if that was read; and the copy, if it was reserved."""

    source: protocol.SegmentInfo
    item: protocol.PullItem
    bytes_of: set[bytes]
    record: Record | None = None
    write: Write | None = None


class Pulls:
    """What a donor pulls into its segment."""

    def __init__(self, donation: Donation) -> None:
        self.donation = donation
        self.orders: dict[int, tuple[protocol.SegmentInfo, protocol.PullItem]] = {}  # by the source's generation
        self.staged: list[Staged] = []

    def ordered(self, source: protocol.SegmentInfo, items: list[protocol.PullItem]) -> None:
        self.orders |= {item.generation: (source, item) for item in items}

    def forget(self) -> None:
        self.orders.clear()
        self.staged.clear()

    def work(self) -> None:
        """Carries out all orders."""
        while self.orders:
            self.read_payload()
        while self.staged:
            self.advance()
        self.donation.donor.flush()

    def read_payload(self) -> None:
        if self.orders:
            source, item = self.orders.pop(next(iter(self.orders)))
            memory = self.donation.donor.world.memories[source.segment_id]
            cells = {memory.cells[unit] for unit in memory.units_of(item.offset, item.nbytes)}
            self.staged.append(Staged(source, item, cells))

    def advance(self) -> None:
        """The next step of what was read first."""
        if not self.staged:
            return
        first = self.staged[0]
        if first.record is None:
            memory = self.donation.donor.world.memories[first.source.segment_id]
            first.record = replace(memory.records[first.item.record])
            if (first.record.generation, first.record.key) != (first.item.generation, first.item.key):
                self._end(first, done=False)
        elif first.write is None:
            self._reserve(first, first.record)
        else:
            self._write(first, first.write)

    def _reserve(self, staged: Staged, record: Record) -> None:
        donor = self.donation.donor
        before = set(donor.outstanding)
        ttl_s = max(1, record.expires_s - donor.world.unix(donor.world.now)) if record.expires_s else 0
        outcomes = donor.reserve(
            [record.key], parent=record.parent, rank=record.rank, ranks=record.ranks, units=record.nbytes // UNIT,
            tenant=record.tenant, ttl_s=ttl_s, into=self.donation.number,
        )  # fmt: skip
        if outcomes == [Outcome.GRANTED]:
            (generation,) = set(donor.outstanding) - before
            staged.write = donor.outstanding[generation]
            donor.advance(staged.write)
        elif outcomes:
            self._end(staged, done=outcomes == [Outcome.EXISTS])
        else:
            self.staged.remove(staged)  # the server is away

    def _write(self, staged: Staged, write: Write) -> None:
        donor = self.donation.donor
        if write.said.generation not in donor.outstanding or write.step != "marked":
            self.staged.remove(staged)
            return
        assert staged.bytes_of == {write.said.key}, "what the record proved is somebody else's"
        for unit in write.memory.units_of(write.said.offset, write.said.nbytes):
            write.memory.cells[unit] = write.said.key
        write.step = "written"
        donor.advance(write)
        donor.advance(write)
        self._end(staged, done=True)

    def _end(self, staged: Staged, *, done: bool) -> None:
        self.staged.remove(staged)
        lists = ([staged.item.generation], []) if done else ([], [staged.item.generation])
        self.donation.donor.post(protocol.Pulled, self.donation.number, *lists)
