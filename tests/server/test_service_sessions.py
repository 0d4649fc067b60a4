"""The state machine, message by message: sessions, bounds, and requests that make no sense."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from tests.server.world import UNIT, Client, Donation, SegmentMemory, World, Write, key, keys
from vcache import protocol
from vcache.protocol import ErrorCode, Outcome

GRANTED, EXISTS, NO_SPACE, DECLINED = Outcome.GRANTED, Outcome.EXISTS, Outcome.NO_SPACE, Outcome.DECLINED


def test_wrong_version_stale_term_and_unknown_session_are_told_apart(world: World) -> None:
    client = Client(world, "c")
    hello = protocol.Hello(1, client.session, 0, 99, b"h" * 16, "c", "cpu:0", True, [])
    (_, reply), *_ = world.service.handle(b"c", hello, world.now)
    assert isinstance(reply, protocol.Error) and reply.code is ErrorCode.BAD_VERSION
    client.term = 99
    assert client.call(protocol.Lookup, key(1), 0.0).code is ErrorCode.STALE_TERM
    client.term, client.session = 1, b"?" * 16
    assert client.call(protocol.Lookup, key(1), 0.0).code is ErrorCode.UNKNOWN_SESSION
    assert isinstance(client.call(protocol.Stats), protocol.ServerStats)


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        (protocol.Lookup, (b"short", 0.0)),
        (protocol.Reserve, (key(1), b"odd", 0, 1, UNIT, 256, 0, 0, 0.0)),
        (protocol.Reserve, (key(1), b"", 2, 2, UNIT, 256, 0, 0, 0.0)),
        (protocol.Reserve, (key(1), b"", 0, 1, 0, 256, 0, 0, 0.0)),
        (protocol.RegisterSegment, (key("s"), 1, protocol.Tier.DRAM, "cpu:0", 8 * UNIT, UNIT, 0, b"", "", [])),
        (protocol.RegisterSegment, (key("s"), 1, protocol.Tier.DRAM, "cpu:0", 8 * UNIT, UNIT + 1, 8, b"", "", [])),
        (protocol.RegisterSegment, (key("s"), 1, protocol.Tier.DRAM, "cpu:0", 8 * UNIT, 9 * UNIT, 8, b"", "", [])),
    ],
)
def test_requests_that_make_no_sense_are_refused_with_a_reason(
    world: World, kind: type, fields: tuple[object, ...]
) -> None:
    world.donor("d")
    reply = Client(world, "c").call(kind, *fields)
    assert reply.code is ErrorCode.BAD_REQUEST and reply.text


def test_one_way_messages_are_never_answered_not_even_with_an_error(world: World) -> None:
    client = Client(world, "c")
    client.term = 99
    for kind, fields in (
        (protocol.Commit, ([1],)),
        (protocol.Abort, ([1],)),
        (protocol.Release, (1, [])),
        (protocol.Touch, (b"odd",)),
    ):
        client.send(kind, *fields)
        client.term = 1
    assert client.inbox == []


def test_segments_are_told_again_until_the_client_has_mapped_them(world: World) -> None:
    donation = world.donor("d")
    donation.donor.store(keys(1))
    reader = Client(world, "r", writes=False)
    assert list(reader.infos) == [donation.number], "in the welcome"
    reader.infos.clear()  # the welcome was lost
    reader.acquire(keys(1))
    assert reader.infos == {}, "not with every answer"
    reader.heartbeat()
    reader.acquire(keys(1))
    assert list(reader.infos) == [donation.number]


def test_a_session_may_hold_only_so_many_leases(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vram_metadata_server.leases.LEASES_PER_SESSION", 2)
    writer = world.donor("d").donor
    writer.store(keys(1))
    assert [bool(writer.acquire(keys(1)).lease) for _ in range(3)] == [True, True, False]
    assert world.service.counters["leases_refused"] == 1


def test_stats_count_what_is_there(world: World) -> None:
    donation = world.donor("d", records=4, units=4)
    donation.donor.store(keys(1, 2))
    donation.donor.reserve(keys(3))
    donation.donor.acquire(keys(1, 2))
    stats = donation.donor.call(protocol.Stats)
    assert (stats.entries, stats.leases, stats.reservations, stats.sessions) == (2, 1, 1, 1)
    (segment,) = stats.segments
    assert (segment.state, segment.used_bytes, segment.free_bytes, segment.largest_free_bytes) == (
        "serving",
        3 * UNIT,
        UNIT,
        UNIT,
    )
    assert stats.counters["hit_keys"] == 2


def test_a_segment_is_registered_once_however_often_it_is_said(world: World) -> None:
    donation = world.donor("d")
    donation.donor.store(keys(1))
    number = donation.number
    donation.register(anew=False)
    donation.hand_over()
    assert donation.number == number and donation.donor.hits(keys(1)) == 1
    thief = Donation(Client(world, "t"), SegmentMemory("m-t", records=1, units=1), register=False)
    thief.memory.id = donation.memory.id
    fields: tuple[Any, ...] = (donation.memory.id, 9, protocol.Tier.DRAM, "cpu:0", 8 * UNIT, UNIT, 8, b"", "", [])
    assert thief.donor.call(protocol.RegisterSegment, *fields).code is ErrorCode.REFUSED


def test_an_impossible_generation_is_not_believed(world: World) -> None:
    donation = world.donor("d")
    donation.donor.store(keys(1))
    (said,) = [write.said for write in _reserved(donation.donor)]
    lie = msgspec.structs.replace(said, generation=(1 << 63) - 2, record=5)
    hello = protocol.Hello(
        1, b"liar" * 4, 0, protocol.PROTOCOL_VERSION, donation.donor.host, "liar", "cpu:0", True, [lie]
    )
    world.service.handle(b"liar", hello, world.now)
    donation.memory.records[0].generation = (1 << 63) - 2
    world.restart_server()
    world.beat()
    donation.hand_over()
    assert world.service.counters["segments_corrupt"] == 1
    assert world.service.writes.next_generation < 1 << 62


def _reserved(client: Client) -> list[Write]:
    client.reserve(keys("lie"))
    return list(client.outstanding.values())
