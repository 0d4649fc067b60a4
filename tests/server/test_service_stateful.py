"""Property test of the state machine: any order of writes, reads, removals, kills, suspensions and restarts.

After every step the server's integrity is checked, what it would answer is compared with memory, and no two writers may
share a byte. What a server rebuilt from the donors' memory would know is compared with what this one knows.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import invariant, rule

from tests.server.allocating import allocate, assign, unnamed
from tests.server.pool_members import Members, picks
from tests.server.world import HOST, SETTINGS, Client, Donation, Reading, SegmentMemory, World, key
from vcache import protocol
from vcache.protocol import Tier
from vram_metadata_server.index import Placement
from vram_metadata_server.integrity import check_integrity
from vram_metadata_server.reservations import ReservationTable
from vram_metadata_server.segments import SegmentState
from vram_metadata_server.service import Service

CHAINS = "ABC"  # chain C has two ranks and tenant 1
LENGTH = 4
OTHER_HOST = b"the-other-host-2"

positions = st.integers(0, LENGTH - 1)
chains = st.sampled_from(CHAINS)


def chain(name: str, first: int, count: int) -> list[bytes]:
    return [key(f"{name}{at}") for at in range(first, min(first + count, LENGTH))]


class Removed(NamedTuple):
    """A removal that was answered: what must not be found again in its term, and later in what was registered then."""

    generations: set[int]
    given_up: set[int]  # by the server, together with their segment, while their writers were at work
    segments: set[bytes]
    term: int


class Pool(Members):
    """What is written, read and removed, and what must hold after every step."""

    def __init__(self) -> None:
        self.readings: list[Reading] = []
        self.removals: list[tuple[Client, int, set[int], int]] = []  # client, id, generations it removes, term
        self.removed: list[Removed] = []
        self.indexed: dict[int, tuple[bytes, int]] = {}  # every generation that ever was a placement: key, tenant
        self.registered: set[bytes] = set()  # segments registered in this term
        super().__init__()

    @rule()
    def restart_server(self) -> None:
        super().restart_server()
        self.removals.clear()
        self.registered.clear()

    # --- writing --------------------------------------------------------------------------------------------------

    @rule(
        pick=picks,
        name=chains,
        first=positions,
        count=st.integers(1, 3),
        rank=st.integers(0, 1),
        units=st.integers(1, 2),
    )
    def reserve(self, pick: int, name: str, first: int, count: int, rank: int, units: int) -> None:
        client = self.one(pick, self.awake())
        if client is None:
            return
        parent = key(f"{name}{first - 1}") if first else b""
        more: dict[str, Any] = {"rank": rank, "ranks": 2, "tenant": 1} if name == "C" else {}
        if name == "B":
            more["ttl_s"] = 6
        client.reserve(chain(name, first, count), parent=parent, units=units, **more)

    @rule(pick=picks, name=st.sampled_from("AB"), count=st.integers(1, 3))
    def store(self, pick: int, name: str, count: int) -> None:
        client = self.one(pick, self.awake())
        if client is not None and not client.outstanding:
            client.store(chain(name, 0, count))
            self.world.tick(drained=False)

    @rule(pick=picks, name=chains, at=positions, rank=st.integers(0, 1), tier=st.sampled_from(Tier))
    def reserve_a_copy(self, pick: int, name: str, at: int, rank: int, tier: Tier) -> None:
        client = self.one(pick, self.awake())
        if client is not None:
            more: dict[str, Any] = {"rank": rank, "ranks": 2, "tenant": 1} if name == "C" else {}
            client.reserve([key(f"{name}{at}")], parent=key(f"{name}{at - 1}") if at else b"", into_tier=tier, **more)

    @rule(pick=picks, count=st.integers(1, 3), units=st.integers(1, 2))
    def allocate(self, pick: int, count: int, units: int) -> None:
        donation = self.one(pick, [d for client in self.awake() for d in client.donations if d.number])
        if donation is not None:
            allocate(donation, count, units=units)

    @rule(pick=picks, name=st.sampled_from("AB"), first=positions, count=st.integers(1, 3))
    def assign(self, pick: int, name: str, first: int, count: int) -> None:
        client = self.one(pick, [client for client in self.awake() if unnamed(client)])
        if client is not None:
            names = chain(name, first, count)[: len(unnamed(client))]
            assign(client, names, key(f"{name}{first - 1}") if first else b"")

    @rule(pick=picks, steps=st.sampled_from([1, 4]))
    def advance(self, pick: int, steps: int) -> None:
        found = self.one(pick, self.writes())
        if found is not None:
            client, write = found
            for _ in range(steps):
                if write.said.generation in client.outstanding:
                    client.advance(write)

    @rule(pick=picks, name=chains, first=positions, steps=st.integers(0, 3))
    def begin_a_write(self, pick: int, name: str, first: int, steps: int) -> None:
        self.reserve(pick, name, first, 1, pick % 2, 1)
        client = self.one(pick, self.awake())
        for write in list(client.outstanding.values())[-1:] if client is not None else ():
            for _ in range(steps):
                if write.said.generation in client.outstanding:
                    client.advance(write)

    @rule(pick=picks)
    def abort(self, pick: int) -> None:
        found = self.one(pick, self.writes())
        if found is not None:
            found[0].abort(found[1])

    @rule(pick=picks)
    def a_message_arrives(self, pick: int) -> None:
        client = self.one(pick, [c for c in self.world.clients if c.on_its_way])
        if client is not None:
            client.flush(1)

    # --- reading --------------------------------------------------------------------------------------------------

    @rule(pick=picks, name=chains, rank=st.integers(0, 1), lease_s=st.floats(0, 5))
    def acquire(self, pick: int, name: str, rank: int, lease_s: float) -> None:
        client = self.one(pick, self.awake())
        if client is not None and len(self.readings) < 4:
            self.readings.append(client.acquire(chain(name, 0, LENGTH), rank=rank, lease_s=lease_s))

    @rule(pick=picks, name=chains, lease_s=st.floats(0, 5))
    def find_in_shared_memory(self, pick: int, name: str, lease_s: float) -> None:
        client = self.one(pick, self.awake())
        if client is not None and len(self.readings) < 4:
            self.readings.append(client.find(chain(name, 0, LENGTH), lease_s=lease_s))

    @rule(pick=picks, is_slow=st.booleans())
    def read(self, pick: int, is_slow: bool) -> None:
        reading = self.one(pick, self.readings)
        if reading is None:
            return
        if is_slow and not reading.copies:
            reading.copy()
            return
        self.readings.remove(reading)
        if reading.client.is_alive:
            if not reading.copies:
                reading.copy()
            reading.validate()
            reading.copies.clear()
            reading.finish()

    @rule(pick=picks, name=chains, lease_s=st.floats(0.1, 6), gives_back=st.booleans())
    def lease_under_a_name(self, pick: int, name: str, lease_s: float, gives_back: bool) -> None:
        client = self.one(pick, self.awake())
        if client is not None:
            number = client.send(protocol.LeaseRun, b"".join(chain(name, 0, 2)), lease_s)
            if gives_back:
                client.send(protocol.Release, number, [], True)

    @rule(pick=picks, name=chains, pin_s=st.floats(0.1, 6))
    def pin(self, pick: int, name: str, pin_s: float) -> None:
        client = self.one(pick, self.awake())
        if client is not None:
            client.call(protocol.Pin, b"".join(chain(name, 0, 2)), pin_s)

    @rule(pick=picks, name=chains)
    def unpin(self, pick: int, name: str) -> None:
        client = self.one(pick, self.awake())
        if client is not None:
            client.call(protocol.Unpin, b"".join(chain(name, 0, 2)))

    # --- removing -------------------------------------------------------------------------------------------------

    @rule(pick=picks, name=chains, at=positions)
    def remove(self, pick: int, name: str, at: int) -> None:
        client = self.one(pick, self.awake())
        if client is not None:
            client.flush()
            self._note_indexed()
            gone = {g for g, (found, _) in self.indexed.items() if found == key(f"{name}{at}")}
            gone |= {write.generation for write in self.reservations().of_keys([key(f"{name}{at}")])}
            number = client.send(protocol.Remove, key(f"{name}{at}"))
            self.removals.append((client, number, gone, self.world.service.term))

    @rule(pick=picks, tenant=st.integers(0, 1), everything=st.booleans())
    def clear(self, pick: int, tenant: int, everything: bool) -> None:
        client = self.one(pick, self.awake())
        if client is not None:
            client.flush()
            self._note_indexed()
            gone = {g for g, (_, found) in self.indexed.items() if everything or found == tenant}
            gone |= {write.generation for write in self.reservations() if everything or write.tenant == tenant}
            number = client.send(protocol.Clear, tenant, everything)
            self.removals.append((client, number, gone, self.world.service.term))

    # --- what must hold -------------------------------------------------------------------------------------------

    @invariant()
    def everything_holds(self) -> None:
        self.world.check()

    @invariant()
    def a_rebuilt_index_equals_the_lost_one(self) -> None:
        service = self.world.service
        service.tombstones.sweep(10_000)
        segments = [s for s in service.catalog.segments.values() if s.space is not None and s.is_readable]
        segments = [s for s in segments if s.info.segment_id not in self.world.gone_memories]
        lost = {
            (h.entry.key, h.rank, s.info.segment_id, h.record, h.generation)
            for s in segments
            for h in s.records
            if isinstance(h, Placement)
        }
        other = World(SETTINGS)
        other.service = Service(SETTINGS, term=service.term + 1, wall_s=-1e9)
        known = {
            (s.info.segment_id, r) for s in segments for r, h in enumerate(s.records) if not isinstance(h, Placement)
        }
        for at, segment in enumerate(segments):
            memory = self.world.memories[segment.info.segment_id]
            copy = SegmentMemory(f"copy{at}", records=len(memory.records), units=len(memory.cells))
            copy.id, copy.records = memory.id, memory.records
            Donation(Client(other, f"copy{at}"), copy)
        rebuilt = {found for found in other.placements() if (found[2], found[3]) not in known}
        assert rebuilt == lost
        check_integrity(other.service)

    @invariant()
    def removed_means_gone(self) -> None:
        self._note_indexed()
        term = self.world.service.term
        self.registered |= {s.info.segment_id for s in self.world.service.catalog.segments.values()}
        for removal in list(self.removals):
            client, number, gone, _ = removal
            answer = client.answer(number)
            if answer is None:
                continue
            self.removals.remove(removal)
            if isinstance(answer, protocol.Done):
                self.removed.append(Removed(gone, self._given_up(), set(self.registered), term))
        for removed in self.removed:
            for _, _, segment_id, _, generation in self.world.placements():
                if generation in removed.generations:
                    is_promised = segment_id in removed.segments and generation not in removed.given_up
                    assert removed.term != term and not is_promised, "a removed entry is back"

    def _given_up(self) -> set[int]:
        """What writers are at work on who fell silent together with their donor: nothing is promised of that beyond this term."""
        members = self.world.service.members
        return {
            generation
            for client in self.world.clients
            for generation in client.outstanding
            if client.is_alive and (generation in client.given_up or members.get(client.session) is None)
        }

    def reservations(self) -> ReservationTable:
        return self.world.service.catalog.reservations

    def _note_indexed(self) -> None:
        index = self.world.service.catalog.index
        for entry in [*index.whole.values(), *index.partial.values()]:
            for placement in entry.placements():
                self.indexed[placement.generation] = (entry.key, entry.tenant)

    def teardown(self) -> None:
        """Left alone, with everybody awake, the pool comes to rest and every extent is accounted for."""
        for client in self.world.clients:
            client.is_suspended = False
            if client.is_alive:
                client.flush()  # a lease asked for ends in the time that passes then
        for _ in range(12):
            self.world.pass_time(1.0)
            for donation in self.donations():
                donation.hand_over()
        self.world.settle()
        self.everything_holds()
        service = self.world.service
        held = {generation for client in self.awake() for generation in client.outstanding}
        for segment in service.catalog.segments.values():
            assert segment.gate is None, "a gate that never opens"
            assert not segment.retiring, "a retire that is never done"
        assert {reservation.generation for reservation in service.catalog.reservations} <= held, "space is never freed"
        assert len(service.leases) == 0


class TwoHosts(Pool):
    """What one host's VRAM has no room for, a donor of the other host pulls; when its segment goes, another one does."""

    hosts = (HOST, OTHER_HOST)
    most_donors = 3

    @rule(pick=picks, name=st.sampled_from("AB"), steps=st.integers(0, 3), how=st.sampled_from(["goodbye", "drain"]))
    def a_segment_fills_up_and_the_puller_goes(self, pick: int, name: str, steps: int, how: str) -> None:
        writer = self.one(pick, [client for client in self.awake() if not client.outstanding])
        if writer is None:
            return
        writer.store(chain(name, 0, LENGTH))
        self.world.tick(drained=False)
        puller = self.one(pick, [donation for donation in self.donations() if donation.pulls.orders])
        if puller is None:
            return
        for _ in range(steps):
            puller.pulls.advance() if puller.pulls.staged else puller.pulls.read_payload()
        puller.donor.goodbye() if how == "goodbye" else puller.drain()
        self.world.tick(drained=False)
        demotions = self.world.service.demotions
        assert all(each.puller is None or each.puller.state is SegmentState.SERVING for each in demotions)


TestPool = Pool.TestCase
TestPool.settings = settings(stateful_step_count=60, suppress_health_check=list(HealthCheck))
TestTwoHosts = TwoHosts.TestCase
TestTwoHosts.settings = TestPool.settings
