"""A pool in memory: the real state machine, its clients and donors, and the time.

No sockets, threads or clock: time is a number, and a message arrives when it is delivered.
"""

from __future__ import annotations

from typing import Any

from tests.server.donation import Donation
from tests.server.members import HOST, Client, Reading, Write
from tests.server.memory import UNIT, SegmentMemory, key, keys
from vcache import protocol
from vram_metadata_server.index import Placement
from vram_metadata_server.integrity import check_integrity
from vram_metadata_server.segments import Retiring
from vram_metadata_server.service import Service
from vram_metadata_server.settings import ServiceSettings

__all__ = [
    "HOST",
    "SETTINGS",
    "UNIT",
    "Client",
    "Donation",
    "Reading",
    "SegmentMemory",
    "World",
    "Write",
    "key",
    "keys",
]

SETTINGS = ServiceSettings(
    heartbeat_s=1.0,
    liveness_s=5.0,
    reservation_s=3.0,
    incomplete_s=8.0,
    max_lease_s=4.0,
    sweep_batch=3,
    eviction_batch=4,
)


class _Memories(dict[bytes, SegmentMemory]):
    """All memories by id; what is gone stays readable for those who had it mapped."""

    def __init__(self, gone: dict[bytes, SegmentMemory]) -> None:
        super().__init__()
        self._gone = gone

    def __missing__(self, name: bytes) -> SegmentMemory:
        return self._gone[name]


class World:
    """The server, all clients, and the time."""

    wall_s = 1_000_000.0

    def __init__(self, settings: ServiceSettings = SETTINGS) -> None:
        self.settings = settings
        self.now = 100.0
        self.next_id = 0
        self.clients: list[Client] = []
        self.gone_memories: dict[bytes, SegmentMemory] = {}
        self.memories = _Memories(self.gone_memories)
        self.probes: dict[str, set[bytes]] = {}
        self.store: set[tuple[bytes, int]] = set()  # shards that donors wrote to the store below
        self.service = self._new_service(term=1)

    def _new_service(self, *, term: int) -> Service:
        service = Service(self.settings, term=term, wall_s=self.wall_s)
        self.changes: dict[bytes, bytes | None] = {}
        self.told_whole: dict[bytes, bytes] = {}
        service.catalog.index.changes = self.changes
        return service

    def unix(self, now: float) -> int:
        return int(now + self.wall_s)

    def donor(
        self,
        name: str,
        *,
        records: int = 8,
        units: int = 8,
        tier: protocol.Tier = protocol.Tier.DRAM,
        spills: bool = False,
        remote: bytes = b"",
        **more: Any,
    ) -> Donation:
        """A donor with one registered segment."""
        memory = SegmentMemory(f"m-{name}", records=records, units=units)
        return Donation(Client(self, name, **more), memory, tier=tier, spills=spills, remote=remote)

    def deliver(self, socket: str, message: protocol.AnyRequest | bytes) -> None:
        self.dispatch(self.service.handle(socket.encode(), message, self.now))

    def dispatch(self, out: list[tuple[bytes, protocol.AnyReply]]) -> None:
        for recipient, reply in out:
            name = recipient.decode().split("/")[0]
            reply = protocol.decode_reply(protocol.encode(reply))
            for client in self.clients:
                if client.name == name and client.is_alive:
                    if isinstance(reply, protocol.Orders) and reply.id == 0:
                        client.obey(reply)
                    else:
                        client.inbox.append(reply)

    def tick(self, *, drained: bool = True) -> None:
        self.dispatch(self.service.tick(self.now, drained))

    def settle(self, ticks: int = 50) -> None:
        """Ticks, orders and messages until nothing is left to do."""
        for _ in range(ticks):
            for client in self.clients:
                if client.is_alive and not client.is_suspended:
                    client.flush()
                    for donation in client.donations:
                        donation.obey()
                        donation.demote()
                        donation.pulls.work()
            self.tick(drained=False)
            donations = [donation for client in self.clients for donation in client.donations]
            if not self.service.has_work and not any(d.orders or d.sinking or d.pulls.orders for d in donations):
                break

    def pass_time(self, seconds: float, *, beat_s: float = 1.0) -> None:
        """Time goes by; those who are alive and not suspended send their heartbeats."""
        end = self.now + seconds
        while self.now < end:
            self.now = min(end, self.now + beat_s)
            self.beat()
            self.tick()

    def beat(self) -> None:
        for client in self.clients:
            if client.is_alive and not client.is_suspended:
                client.heartbeat()

    def restart_server(self) -> None:
        """The server is killed; another starts empty under a new term. What was on its way is lost."""
        self.service = self._new_service(term=self.service.term + 1)
        for client in self.clients:
            client.on_its_way.clear()
            client.inbox.clear()

    def is_dead(self, session: bytes) -> bool:
        """What a donor learns by trying the session's lock."""
        return not any(client.session == session and client.is_alive for client in self.clients)

    # --- what must hold -------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Everything that must hold between any two steps. Raises ``AssertionError``."""
        check_integrity(self.service)
        self._check_changes_are_told()
        self._check_placements_are_true()
        self._check_committed_records_are_known()
        self._check_writers_are_alone()

    def _check_changes_are_told(self) -> None:
        """Whoever follows the changes knows which chunks are whole, and where they lie if there is one answer to that."""
        for name, packed in self.changes.items():
            if packed is None:
                self.told_whole.pop(name, None)
            else:
                self.told_whole[name] = packed
        self.changes.clear()
        assert self.told_whole == {name: entry.packed for name, entry in self.service.catalog.index.whole.items()}

    def placements(self) -> set[tuple[bytes, int, bytes, int, int]]:
        """(key, rank, segment id, record, generation) of every placement a lookup may answer."""
        index = self.service.catalog.index
        return {
            (entry.key, placement.rank, placement.segment.info.segment_id, placement.record, placement.generation)
            for entry in [*index.whole.values(), *index.partial.values()]
            for placement in entry.placements()
            if placement.segment.is_readable
        }

    def _check_placements_are_true(self) -> None:
        for name, _, segment_id, record, generation in self.placements():
            if segment_id not in self.gone_memories:
                found = self.memories[segment_id].records[record]
                assert (found.generation, found.key) == (generation, name), "an indexed record is not so in memory"

    def _check_committed_records_are_known(self) -> None:
        for segment in self.service.catalog.segments.values():
            if segment.space is None or not segment.is_readable or segment.info.segment_id in self.gone_memories:
                continue
            for at, record in enumerate(self.memories[segment.info.segment_id].records):
                if record.generation and record.generation % 2 == 0:
                    holder = segment.holder(at)
                    assert holder is not None and holder.generation == record.generation, "a committed record is lost"

    def _check_writers_are_alone(self) -> None:
        """Nobody else has, or is writing, what a living writer may still write into."""
        busy: dict[tuple[bytes, int], int] = {}
        for client in self.clients:
            for write in client.outstanding.values() if client.is_alive else ():
                if write.step == "committed":
                    continue
                for unit in write.memory.units_of(write.said.offset, write.said.nbytes):
                    assert (
                        busy.setdefault((write.said.segment_id, unit), write.said.generation) == write.said.generation
                    ), "two writers share an extent"
        for segment in self.service.catalog.segments.values():
            memory = self.memories[segment.info.segment_id]
            for holder in segment.records:
                if isinstance(holder, Placement | Retiring):
                    offset, nbytes = holder.extent if isinstance(holder, Placement) else (holder.offset, holder.nbytes)
                    for unit in memory.units_of(offset, nbytes):
                        writer = busy.get((segment.info.segment_id, unit), holder.generation)
                        assert writer == holder.generation, "a writer at work in another entry's extent"
