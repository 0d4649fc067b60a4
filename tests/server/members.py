"""Clients and donors that keep the contract, at message level, one step at a time.

Everything a donor, writer or reader does to memory is one call, so that a test can stop between any two of them.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tests.server.memory import UNIT, Record, SegmentMemory, key
from tests.server.pulls import Pulls
from vcache import protocol
from vcache.protocol import PLACEMENT, Destination, ErrorCode, Outcome, RecordInfo, Tier
from vram_metadata_server.reservations import UNNAMED

if TYPE_CHECKING:
    from tests.server.world import World

HOST = b"the-one-host-016"


@dataclass
class Write:
    """A reservation in its writer's hands. ``step``: granted, marked, written, committed (in memory)."""

    said: protocol.Reservation
    memory: SegmentMemory
    step: str = "granted"


class Client:
    """A client process: its session, what it has outstanding, and its one-way messages that are still on their way."""

    def __init__(
        self, world: World, name: str, *, device: str = "cpu:0", host: bytes = HOST, writes: bool = True
    ) -> None:
        self.world = world
        self.name = name
        self.session = key(f"s-{name}")
        self.device = device
        self.host = host
        self.writes = writes
        self.term = 0
        self.seen = 0
        self.outstanding: dict[int, Write] = {}
        self.on_its_way: deque[protocol.AnyRequest] = deque()  # on the calls socket
        self.inbox: list[protocol.AnyReply] = []  # what was pushed or answered late
        self.infos: dict[int, protocol.SegmentInfo] = {}
        self.is_alive = True
        self.is_suspended = False
        self.donations: list[Donation] = []
        self.last_beat = world.now
        world.clients.append(self)
        self.hello()

    # --- messages -------------------------------------------------------------------------------------------------

    def send(self, kind: type, *fields: Any, socket: str = "calls") -> int:
        """Sends a request of the present term now; answers its id."""
        self.world.next_id += 1
        message = kind(self.world.next_id, self.session, self.term, *fields)
        self.world.deliver(f"{self.name}/{socket}", message)
        return self.world.next_id

    def call(self, kind: type, *fields: Any, socket: str = "calls") -> Any:
        """Sends a request and takes its reply; what is on its way on the calls socket arrives first."""
        if socket == "calls":
            self.flush()
        number = self.send(kind, *fields, socket=socket)
        return self.answer(number)

    def answer(self, number: int) -> Any:
        """The reply to the request of this id; None when none has come (yet)."""
        for at, reply in enumerate(self.inbox):
            if reply.id == number:
                del self.inbox[at]
                return reply
        return None

    def post(self, kind: type, *fields: Any) -> None:
        """Puts a one-way message on its way."""
        self.world.next_id += 1
        self.on_its_way.append(kind(self.world.next_id, self.session, self.term, *fields))

    def flush(self, most: int | None = None) -> None:
        """Messages on their way arrive."""
        while self.on_its_way and most != 0:
            self.world.deliver(f"{self.name}/calls", self.on_its_way.popleft())
            most = None if most is None else most - 1

    # --- the session ----------------------------------------------------------------------------------------------

    def hello(self) -> None:
        self.term = 0
        outstanding = [write.said for write in self.outstanding.values() if write.step != "committed"]
        fields = (protocol.PROTOCOL_VERSION, self.host, self.name, self.device, self.writes, outstanding)
        welcome = self.call(protocol.Hello, *fields, socket="background")
        assert isinstance(welcome, protocol.Welcome), welcome
        self.term, self.seen = welcome.term, 0
        self.learn(welcome.segments)

    def heartbeat(self) -> None:
        """One beat of the background thread, with all that follows from its answer."""
        suspended = self.world.now - self.last_beat >= self.world.settings.liveness_s
        self.last_beat = self.world.now
        dead = [name for name in self.world.probes.pop(self.name, ()) if self.world.is_dead(name)]
        numbers = [number for number, info in self.infos.items()]
        reply = self.call(protocol.Heartbeat, numbers, self.seen, list(self.outstanding), dead, socket="background")
        if isinstance(reply, protocol.Error):
            assert reply.code in (ErrorCode.STALE_TERM, ErrorCode.UNKNOWN_SESSION)
            was_dropped = suspended or reply.code is ErrorCode.UNKNOWN_SESSION
            self.hello()
            for donation in list(self.donations):
                donation.come_back(anew=was_dropped)
            return
        for number in reply.gone:
            del self.infos[number]
        self.obey(reply)

    def obey(self, orders: protocol.Orders) -> None:
        self.world.probes.setdefault(self.name, set()).update(orders.probe)
        for donation in self.donations:
            if donation.number in orders.register_again and orders.term == self.term:
                donation.is_to_register = True
        for number, items in orders.retire:
            for donation in self.donations:
                if donation.number == number and orders.term == self.term:
                    donation.orders.extend(items)
        for number, sinking in orders.demote:
            for donation in self.donations:
                if donation.number == number and orders.term == self.term:
                    donation.sinking |= {item.generation: item for item in sinking}
        for number, source, pulling in orders.pull:
            for donation in self.donations:
                if donation.number == number and orders.term == self.term:
                    donation.pulls.ordered(source, pulling)

    def learn(self, infos: list[protocol.SegmentInfo]) -> None:
        self.infos |= {info.number: info for info in infos}

    def goodbye(self) -> None:
        for donation in list(self.donations):
            donation.leave()
        self.outstanding.clear()
        self.call(protocol.Goodbye, socket="background")
        self.is_alive = False

    def kill(self, *, messages_arrive: bool) -> None:
        """SIGKILL. What it had sent may still arrive."""
        self.is_alive = False
        for donation in list(self.donations):
            donation.leave()
        if not messages_arrive:
            self.on_its_way.clear()
        self.flush()

    # --- writing, step by step ------------------------------------------------------------------------------------

    def reserve(
        self, keys: list[bytes], *, parent: bytes = b"", rank: int = 0, ranks: int = 1, units: int = 1, **more: Any
    ) -> list[Outcome]:
        fields = (
            parent,
            rank,
            ranks,
            units * UNIT,
            256,
            more.get("tenant", 0),
            more.get("ttl_s", 0),
            more.get("pin_s", 0.0),
            more.get("into", 0),
            more.get("into_tier"),
        )
        reply = self.call(protocol.Reserve, b"".join(keys), *fields)
        if not isinstance(reply, protocol.Grants):
            return []
        self.learn(reply.segments)
        outcomes = [Outcome(code) for code in reply.outcomes]
        granted = [at for at, outcome in enumerate(outcomes) if outcome is Outcome.GRANTED]
        for at, placement in zip(granted, PLACEMENT.iter_unpack(reply.placements), strict=True):
            number, record, generation, offset, nbytes = placement
            info = self.infos[number]
            self.seen = max(self.seen, generation)
            said = protocol.Reservation(
                segment_id=info.segment_id,
                incarnation=info.incarnation,
                record=record,
                generation=generation,
                key=keys[at],
                parent=keys[at - 1] if at else parent,
                rank=rank,
                ranks=ranks,
                tenant=more.get("tenant", 0),
                offset=offset,
                nbytes=nbytes,
                tokens=256,
                ttl_s=more.get("ttl_s", 0),
                is_copy="into" in more or "into_tier" in more,
            )
            self.outstanding[generation] = Write(said, self.world.memories[info.segment_id])
        return outcomes

    def advance(self, write: Write) -> None:
        """The write's next step in memory, or its commit told."""
        said, memory = write.said, write.memory
        if said.key == UNNAMED:
            return  # an allocation: its record is marked once it has a key
        if write.step == "granted":
            expires = self.world.unix(self.world.now + said.ttl_s) if said.ttl_s else 0
            memory.records[said.record] = Record(
                said.generation - 1, said.key, said.parent, said.rank, said.ranks, said.tenant, said.offset, said.nbytes, expires
            )  # fmt: skip
            write.step = "marked"
        elif write.step == "marked":
            for unit in memory.units_of(said.offset, said.nbytes):
                memory.cells[unit] = said.key
            write.step = "written"
        elif write.step == "written":
            memory.records[said.record].generation = said.generation
            write.step = "committed"
        else:
            self.post(protocol.Commit, [said.generation])
            del self.outstanding[said.generation]

    def abort(self, write: Write) -> None:
        self.post(protocol.Abort, [write.said.generation])
        del self.outstanding[write.said.generation]

    def store(self, keys: list[bytes], **more: Any) -> list[Outcome]:
        """Reserves and writes at once, commits told."""
        outcomes = self.reserve(keys, **more)
        for write in list(self.outstanding.values()):
            while write.said.generation in self.outstanding:
                self.advance(write)
        self.flush()
        return outcomes

    # --- reading --------------------------------------------------------------------------------------------------

    def hits(self, keys: list[bytes]) -> int:
        reply = self.call(protocol.Lookup, b"".join(keys), 0.0)
        return reply.hits if isinstance(reply, protocol.Hits) else 0

    def acquire(self, keys: list[bytes], *, rank: int = 0, lease_s: float = 0.0) -> Reading:
        reply = self.call(protocol.Acquire, b"".join(keys), rank, lease_s)
        if not isinstance(reply, protocol.Placements):
            return Reading(self, keys, 0, [])
        self.learn(reply.segments)
        return Reading(self, keys, reply.lease, list(PLACEMENT.iter_unpack(reply.placements)))


@dataclass
class Reading:
    """A leased run in its reader's hands."""

    client: Client
    keys: list[bytes]
    lease: int
    placements: list[tuple[int, int, int, int, int]]
    copies: list[list[bytes]] = field(default_factory=list)

    def copy(self) -> None:
        world = self.client.world
        for number, _, _, offset, nbytes in self.placements:
            info = self.client.infos.get(number)  # none: it is gone since, and the reader has heard of it
            memory = world.memories[info.segment_id] if info is not None else None
            self.copies.append([memory.cells[unit] for unit in memory.units_of(offset, nbytes)] if memory else [])

    def validate(self) -> list[bool]:
        """Checks each record after the copy; what it says is right must be right."""
        verdicts = []
        for at, (number, record, generation, _, _) in enumerate(self.placements):
            info = self.client.infos.get(number)
            found = self.client.world.memories[info.segment_id].records[record] if info is not None else Record()
            valid = found.generation == generation and found.key == self.keys[at]
            assert not valid or set(self.copies[at]) == {self.keys[at]}, "WRONG BYTES SERVED"
            verdicts.append(valid)
        return verdicts

    def finish(self) -> list[bool]:
        """Copies, validates, and puts the release with its verdict on its way."""
        self.copy()
        verdicts = self.validate()
        self.client.post(protocol.Release, self.lease, [at for at, valid in enumerate(verdicts) if not valid])
        return verdicts


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
