"""A segment and what its donor does for it, in tests of the server's state machine."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.server.memory import UNIT, Record, SegmentMemory
from tests.server.pulls import Pulls
from vcache import protocol
from vcache.protocol import Destination, ErrorCode, Outcome, RecordInfo, Tier

if TYPE_CHECKING:
    from tests.server.members import Client, Write


class Donation:
    """A segment and what its donor does for it."""

    def __init__(
        self,
        donor: Client,
        memory: SegmentMemory,
        *,
        tier: Tier = Tier.DRAM,
        spills: bool = False,
        remote: bytes = b"",
        register: bool = True,
    ) -> None:
        """``remote``: how other hosts read it; then it pulls from them, too."""
        self.donor = donor
        self.tier = tier
        self.spills = spills
        self.memory = memory
        self.incarnation = 1
        self.number = 0
        self.orders: list[protocol.RetireItem] = []
        self.sinking: dict[int, protocol.DemoteItem] = {}  # ordered to be demoted, by generation
        self.copying: list[tuple[protocol.DemoteItem, Write]] = []  # reserved, not yet committed
        self.to_hand_over: list[RecordInfo] | None = None  # None: handed over
        self.is_to_register = False
        self.is_draining = False
        self.remote = remote
        self.pulls = Pulls(self)
        donor.world.memories[memory.id] = memory
        donor.donations.append(self)
        if register:
            self.register(anew=False)
            self.hand_over()

    def register(self, *, anew: bool) -> None:
        """Registers; ``anew``: under a new incarnation, after retiring all that is committed."""
        world = self.donor.world
        if anew:
            self.incarnation += 1
            for at, record in enumerate(self.memory.records):
                if record.generation % 2 == 0:
                    self.memory.records[at] = Record()
        self.orders.clear()
        self.sinking.clear()
        self.pulls.forget()
        attached = [c.session for c in world.clients if c.is_alive and c.writes and c.host == self.donor.host]
        reply = self.donor.call(
            protocol.RegisterSegment, self.memory.id, self.incarnation, self.tier, self.donor.device, self.memory.nbytes,
            UNIT, len(self.memory.records), b"", self.donor.name, attached, self.remote, self.spills,
            bool(self.remote),
            socket="background",
        )  # fmt: skip
        if isinstance(reply, protocol.Error):
            if reply.code is ErrorCode.UNKNOWN_SEGMENT:
                self.register(anew=True)
            return  # the server was restarted, or has dropped the session: the next heartbeat finds out
        self.number = reply.number
        self.is_to_register = False
        self.to_hand_over = self.scan()

    def come_back(self, *, anew: bool) -> None:
        """In a new session: registers, unless it was being taken back; then there is nobody to wait for any more."""
        if self.is_draining:
            self.leave()
        else:
            self.register(anew=anew)

    def drain(self) -> None:
        """Asks for the segment back."""
        self.is_draining, self.is_to_register, self.to_hand_over = True, False, None
        self.donor.call(protocol.DrainSegment, self.number, socket="background")

    def scan(self) -> list[RecordInfo]:
        return [
            RecordInfo(
                at, r.generation, r.key, r.parent, r.rank, r.ranks, r.tenant, r.offset, r.nbytes, 256, r.expires_s
            )
            for at, r in enumerate(self.memory.records)
            if r.generation
        ]

    def hand_over(self, pages: int | None = None, page: int = 2) -> None:
        """Hands over so many pages (default: all), after registering again if that was ordered."""
        if self.is_to_register:
            self.register(anew=False)
        while self.to_hand_over is not None and pages != 0:
            items, rest = self.to_hand_over[:page], self.to_hand_over[page:]
            self.to_hand_over = rest or None
            reply = self.donor.call(protocol.Handover, self.number, items, not rest, socket="background")
            assert isinstance(reply, protocol.Done) or reply.code is not ErrorCode.BAD_REQUEST, reply
            pages = None if pages is None else pages - 1

    def obey(self, most: int | None = None) -> None:
        """Retires in memory what was ordered, then says so."""
        items, self.orders = self.orders[:most], self.orders[len(self.orders) if most is None else most :]
        for item in items:
            self.memory.retire(item.record, item.generation)
        if items:
            self.donor.call(protocol.Retired, self.number, items, socket="background")

    def demote(self) -> None:
        """Carries out all orders to demote, as far as there is room below."""
        while self.sinking:
            self.begin_demotion()
        while self.copying:
            self.finish_demotion()
        self.donor.flush()

    def begin_demotion(self) -> None:
        """Reserves a copy of the first record ordered to be demoted (or has it stored), and marks it."""
        if not self.sinking:
            return
        item = self.sinking.pop(next(iter(self.sinking)))
        record = self.memory.records[item.record]
        if record.generation != item.generation:
            self.donor.post(protocol.Demoted, self.number, [], [item.generation])
        elif item.destination is Destination.STORE:
            self.donor.world.store.add((record.key, record.rank))
            self.donor.post(protocol.Demoted, self.number, [item.generation], [])
        else:
            self._reserve_copy(item, record)

    def _reserve_copy(self, item: protocol.DemoteItem, record: Record) -> None:
        donor = self.donor
        before = set(donor.outstanding)
        ttl_s = max(1, record.expires_s - donor.world.unix(donor.world.now)) if record.expires_s else 0
        outcomes = donor.reserve(
            [record.key], parent=record.parent, rank=record.rank, ranks=record.ranks, units=record.nbytes // UNIT,
            tenant=record.tenant, ttl_s=ttl_s, into_tier=Tier.DRAM,
        )  # fmt: skip
        if outcomes == [Outcome.GRANTED]:
            (generation,) = set(donor.outstanding) - before
            self.copying.append((item, donor.outstanding[generation]))
            donor.advance(donor.outstanding[generation])
        elif outcomes == [Outcome.EXISTS]:
            donor.post(protocol.Demoted, self.number, [item.generation], [])
        elif outcomes == [Outcome.DECLINED]:
            donor.post(protocol.Demoted, self.number, [], [item.generation])

    def finish_demotion(self) -> None:
        """Copies the first payload that has space below; if its source is still what it was, commits the copy and says so."""
        if not self.copying:
            return
        item, write = self.copying.pop(0)
        donor, source = self.donor, self.memory.records[item.record]
        if write.said.generation not in donor.outstanding or write.step != "marked":
            return
        begin = self.memory.units_of(source.offset, source.nbytes or UNIT)[0]
        for unit in write.memory.units_of(write.said.offset, write.said.nbytes):
            write.memory.cells[unit] = self.memory.cells[begin]
        write.step = "written"
        if (source.generation, source.key) != (item.generation, write.said.key):
            donor.abort(write)
            donor.post(protocol.Demoted, self.number, [], [item.generation])
            return
        donor.advance(write)
        donor.advance(write)
        donor.post(protocol.Demoted, self.number, [item.generation], [])

    def leave(self) -> None:
        """The donor is no more."""
        self.donor.donations.remove(self)
        del self.donor.world.memories[self.memory.id]
        self.donor.world.gone_memories[self.memory.id] = self.memory
