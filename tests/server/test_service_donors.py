"""The state machine, message by message: donors come and go."""

from __future__ import annotations

from typing import Any

import pytest

from tests.server.world import UNIT, Client, World, keys
from vcache import protocol
from vcache.protocol import ErrorCode, Outcome

GRANTED, EXISTS, NO_SPACE, DECLINED = Outcome.GRANTED, Outcome.EXISTS, Outcome.NO_SPACE, Outcome.DECLINED


def test_a_silent_donors_entries_are_gone_at_once(world: World) -> None:
    donation = world.donor("d")
    reader = Client(world, "r", writes=False)
    donation.donor.store(keys(1, 2, 3, 4, 5))
    donation.donor.kill(messages_arrive=False)
    world.pass_time(4.0)
    assert reader.hits(keys(1, 2, 3, 4, 5)) == 5
    world.pass_time(1.0)
    assert len(world.service.catalog.index) > 0, "the sweep is not over"
    assert reader.hits(keys(1, 2, 3, 4, 5)) == 0
    assert reader.acquire(keys(1)).lease == 0
    world.settle()
    assert len(world.service.catalog.index) == 0
    world.check()


def test_nobody_is_silent_until_the_queue_is_drained(world: World) -> None:
    donor = world.donor("d").donor
    donor.store(keys(1))
    world.now += 60
    world.tick(drained=False)
    donor.heartbeat()
    world.tick(drained=True)
    assert donor.hits(keys(1)) == 1


def test_a_goodbye_takes_the_segment_along(world: World) -> None:
    donation = world.donor("d")
    reader = Client(world, "r")
    donation.donor.store(keys(1))
    reader.hits(keys(1))
    donation.donor.goodbye()
    assert reader.hits(keys(1)) == 0
    reader.heartbeat()
    assert reader.infos == {}, "told to unmap it"


def test_readers_are_told_again_of_a_segment_that_other_hosts_read_in_a_new_way(world: World) -> None:
    donation = world.donor("d")
    reader = Client(world, "r", host=b"another-host-016", writes=False)
    donation.donor.store(keys(1))
    reader.acquire(keys(1))
    assert reader.infos[donation.number].remote == b""
    donation.remote = b"peer:1"
    donation.register(anew=False)
    donation.hand_over()
    reader.acquire(keys(1))
    assert reader.infos[donation.number].remote == b"peer:1"
    assert reader.hits(keys(1)) == 1, "nothing is lost by it"
    world.check()


def test_a_donor_that_was_dropped_comes_back_empty_under_a_new_incarnation(world: World) -> None:
    donation = world.donor("d")
    donation.donor.store(keys(1))
    donation.donor.is_suspended = True
    world.pass_time(6.0)
    donation.donor.is_suspended = False
    donation.donor.heartbeat()
    donation.hand_over()
    assert donation.incarnation == 2
    assert donation.donor.hits(keys(1)) == 0
    assert donation.donor.store(keys(1)) == [GRANTED]
    world.check()


def test_a_dropped_incarnation_may_not_register_again(world: World) -> None:
    donation = world.donor("d")
    donation.donor.is_suspended = True
    world.pass_time(6.0)
    donation.donor.hello()
    fields: tuple[Any, ...] = (
        donation.memory.id,
        1,
        protocol.Tier.DRAM,
        "cpu:0",
        donation.memory.nbytes,
        UNIT,
        8,
        b"",
        "",
        [],
    )
    reply = donation.donor.call(protocol.RegisterSegment, *fields)
    assert reply.code is ErrorCode.UNKNOWN_SEGMENT and "register 2" in reply.text


def test_the_writer_of_a_dropped_segment_keeps_its_extent_in_the_next_incarnation(world: World) -> None:
    donation = world.donor("d", records=1, units=1)
    writer, other = Client(world, "w"), Client(world, "o")
    writer.reserve(keys(1))
    (write,) = writer.outstanding.values()
    donation.donor.is_suspended = True
    world.pass_time(6.0)
    donation.donor.is_suspended = False
    world.pass_time(1.0)
    donation.hand_over()
    assert other.reserve(keys(2)) == [NO_SPACE]
    for _ in range(4):
        writer.advance(write)
    writer.flush()
    world.check()
    assert writer.hits(keys(1)) == 0, "a commit from an earlier incarnation is refused"
    world.settle()
    assert other.reserve(keys(2)) == [GRANTED]


def test_a_drained_segment_is_answered_when_its_leases_ended(world: World) -> None:
    donation = world.donor("d")
    reader = Client(world, "r", writes=False)
    donation.donor.store(keys(1))
    reading = reader.acquire(keys(1))
    number = donation.donor.send(protocol.DrainSegment, donation.number)
    world.tick()
    assert donation.donor.answer(number) is None
    assert reader.hits(keys(1)) == 0
    assert donation.donor.reserve(keys(2)) == [DECLINED]
    assert reading.finish() == [True]
    reader.flush()
    world.tick()
    assert isinstance(donation.donor.answer(number), protocol.Done)
    world.check()


@pytest.mark.parametrize("fate", ["claims", "died"])
def test_a_segment_drained_before_its_gate_opened_waits_for_its_writers_and_no_longer(world: World, fate: str) -> None:
    donation = world.donor("d")
    writer, other = Client(world, "w"), Client(world, "o")
    writer.reserve(keys(1))
    (write,) = writer.outstanding.values()
    writer.advance(write)
    world.restart_server()
    donation.donor.heartbeat()
    donation.hand_over()
    number = donation.donor.send(protocol.DrainSegment, donation.number)
    other.heartbeat()
    world.tick()
    assert donation.donor.answer(number) is None, "a writer may be at work in it"
    removal = other.send(protocol.Clear, 0, True)
    world.tick()
    assert isinstance(other.answer(removal), protocol.Done), "removals wait for no handover that will never come"
    if fate == "died":
        writer.kill(messages_arrive=False)
    else:
        writer.heartbeat()
        world.tick()
        assert donation.donor.answer(number) is None
        writer.abort(write)
        writer.flush()
    for _ in range(8):
        world.pass_time(1.0)
    assert isinstance(donation.donor.answer(number), protocol.Done)
    world.check()
    assert not list(world.service.catalog.reservations)


def test_only_its_donor_may_speak_for_a_segment(world: World) -> None:
    donation = world.donor("d")
    stranger = Client(world, "s")
    for kind, fields in ((protocol.DrainSegment, ()), (protocol.Retired, ([],)), (protocol.Handover, ([], True))):
        assert stranger.call(kind, donation.number, *fields).code is ErrorCode.REFUSED
    assert stranger.call(protocol.DrainSegment, 99).code is ErrorCode.UNKNOWN_SEGMENT
