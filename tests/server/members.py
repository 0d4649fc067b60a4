"""Clients and donors that keep the contract, at message level, one step at a time.

Everything a donor, writer or reader does to memory is one call, so that a test can stop between any two of them.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tests.server.memory import UNIT, Record, SegmentMemory, key
from vcache import protocol
from vcache.protocol import PLACEMENT, ErrorCode, Outcome
from vram_metadata_server.reservations import UNNAMED

if TYPE_CHECKING:
    from tests.server.donation import Donation
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
        self.given_up: set[int] = set()  # outstanding when the server had forgotten the session
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

    def post(self, kind: type, *fields: Any) -> int:
        """Puts a one-way message on its way; answers its id."""
        self.world.next_id += 1
        self.on_its_way.append(kind(self.world.next_id, self.session, self.term, *fields))
        return self.world.next_id

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
            if reply.code is ErrorCode.UNKNOWN_SESSION:
                self.given_up |= set(self.outstanding)
            self.hello()
            for donation in list(self.donations):
                donation.come_back(anew=was_dropped)
            return
        for number in reply.gone:
            del self.infos[number]
        self.learn(reply.segments)
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

    def find(self, keys: list[bytes], *, lease_s: float = 0.0) -> Reading:
        """As ``acquire``, by what shared memory says; the lease is asked for by a message that is still on its way."""
        placements = []
        if self.term == self.world.service.term:
            for packed in map(self.world.told_whole.get, keys):
                if not packed or PLACEMENT.unpack(packed)[0] not in self.infos:
                    break
                placements.append(PLACEMENT.unpack(packed))
        found = keys[: len(placements)]
        name = self.post(protocol.LeaseRun, b"".join(found), lease_s, True) if found else 0
        return Reading(self, found, name, placements, is_named=True)


@dataclass
class Reading:
    """A leased run in its reader's hands."""

    client: Client
    keys: list[bytes]
    lease: int
    placements: list[tuple[int, int, int, int, int]]
    copies: list[list[bytes]] = field(default_factory=list)
    is_named: bool = False

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
        invalid = [placement[2] for placement, valid in zip(self.placements, verdicts, strict=True) if not valid]
        self.client.post(protocol.Release, self.lease, invalid, self.is_named)
        return verdicts
