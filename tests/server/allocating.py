"""Space first, keys later, at message level: what a donor that fills its own segment does."""

from __future__ import annotations

from msgspec.structs import replace

from tests.server.donation import Donation
from tests.server.members import Client, Write
from tests.server.memory import UNIT
from vcache import protocol
from vcache.protocol import PLACEMENT, Outcome
from vram_metadata_server.reservations import UNNAMED


def allocate(donation: Donation, count: int, *, units: int = 1, by: Client | None = None) -> list[Outcome]:
    """What is granted is outstanding, without a key."""
    client = by or donation.donor
    reply = client.call(protocol.Allocate, donation.number, count, units * UNIT, 0)
    if not isinstance(reply, protocol.Grants):
        return []
    client.learn(reply.segments)
    for number, record, generation, offset, nbytes in PLACEMENT.iter_unpack(reply.placements):
        info = client.infos[number]
        client.seen = max(client.seen, generation)
        said = protocol.Reservation(
            segment_id=info.segment_id,
            incarnation=info.incarnation,
            record=record,
            generation=generation,
            key=UNNAMED,
            parent=b"",
            rank=0,
            ranks=1,
            tenant=0,
            offset=offset,
            nbytes=nbytes,
            tokens=0,
            ttl_s=0,
        )
        client.outstanding[generation] = Write(said, client.world.memories[info.segment_id])
    return [Outcome(code) for code in reply.outcomes]


def unnamed(client: Client) -> list[Write]:
    """Its allocations that have no keys yet."""
    return [write for write in client.outstanding.values() if write.said.key == UNNAMED]


def assign(client: Client, keys: list[bytes], parent: bytes = b"") -> list[Outcome]:
    """Fills its first allocations with these chunks, then asks for their keys. What is not granted stays allocated."""
    writes = unnamed(client)[: len(keys)]
    for write, name in zip(writes, keys, strict=True):
        for unit in write.memory.units_of(write.said.offset, write.said.nbytes):
            write.memory.cells[unit] = name
    generations = [write.said.generation for write in writes]
    reply = client.call(protocol.Assign, generations, b"".join(keys), parent)
    if not isinstance(reply, protocol.Grants):
        return []
    outcomes = [Outcome(code) for code in reply.outcomes]
    for write, name, before, outcome in zip(writes, keys, [parent, *keys], outcomes, strict=False):
        if outcome is Outcome.GRANTED:
            write.said = replace(write.said, key=name, parent=before)
    return outcomes


def finish(client: Client) -> None:
    """What has a key is committed, told, and has arrived."""
    for write in list(client.outstanding.values()):
        while write.said.generation in client.outstanding and write.said.key != UNNAMED:
            client.advance(write)
    client.flush()
