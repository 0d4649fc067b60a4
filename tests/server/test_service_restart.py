"""The state machine, message by message: a server that starts empty under a new term."""

from __future__ import annotations

import pytest

from tests.server.world import UNIT, Client, World, keys
from vcache.protocol import Outcome

GRANTED, EXISTS, NO_SPACE, DECLINED = Outcome.GRANTED, Outcome.EXISTS, Outcome.NO_SPACE, Outcome.DECLINED


def test_after_a_restart_all_committed_entries_are_back(world: World) -> None:
    donation = world.donor("d")
    donation.donor.store(keys(1, 2, 3))
    before = world.placements()
    world.restart_server()
    world.beat()
    donation.hand_over(pages=1)
    assert donation.donor.hits(keys(1, 2, 3)) == 2, "served page by page"
    assert donation.donor.reserve(keys(4)) == [DECLINED], "the gate is closed"
    donation.hand_over()
    assert world.placements() == before
    assert donation.donor.reserve(keys(4)) == [GRANTED]
    world.check()


def test_a_gate_stays_closed_until_every_attached_writer_was_heard_of(world: World) -> None:
    donation = world.donor("d", records=1, units=1)
    writer, other = Client(world, "w"), Client(world, "o")
    writer.reserve(keys(1))
    (write,) = writer.outstanding.values()
    writer.is_suspended = True
    world.restart_server()
    for _ in range(10):
        world.pass_time(1.0)
        donation.hand_over()
    assert other.reserve(keys(2)) == [DECLINED]
    writer.is_suspended = False
    world.pass_time(1.0)
    donation.hand_over()
    assert other.reserve(keys(2)) == [NO_SPACE], "the gate is open, its extent is its own"
    for _ in range(4):
        writer.advance(write)
    writer.flush()
    assert writer.hits(keys(1)) == 1, "and may be committed under the new term"
    world.check()


def test_a_gate_opens_when_the_attached_writer_is_proven_dead(world: World) -> None:
    donation = world.donor("d", records=1, units=1)
    writer = Client(world, "w")
    writer.reserve(keys(1))
    (write,) = writer.outstanding.values()
    writer.advance(write)
    writer.is_suspended = True
    world.restart_server()
    world.beat()
    donation.hand_over()
    writer.kill(messages_arrive=False)
    for _ in range(3):
        world.pass_time(1.0)
        donation.hand_over()
    world.settle()
    assert donation.memory.records[0].generation == 0, "the dead writer's record is retired"
    assert donation.donor.reserve(keys(2)) == [GRANTED]


def test_what_was_committed_between_the_scan_and_the_hello_is_found(world: World) -> None:
    """Found by the protocol's model: without a second scan nobody would know of the record, and its extent be granted."""
    donation = world.donor("d")
    writer = Client(world, "w")
    writer.reserve(keys(1))
    (write,) = writer.outstanding.values()
    world.restart_server()
    donation.donor.heartbeat()  # registers and scans: the record is still free
    for _ in range(4):
        writer.advance(write)
    writer.flush()  # the commit is of the old term
    writer.heartbeat()
    donation.hand_over()
    assert donation.donor.reserve(keys(2)) == [DECLINED]
    world.beat()
    donation.hand_over()
    world.check()
    assert writer.hits(keys(1)) == 1
    assert donation.donor.reserve(keys(2)) == [GRANTED]


def test_a_writer_that_says_hello_before_the_donor_registers_keeps_its_extent(world: World) -> None:
    donation = world.donor("d", records=1, units=1)
    writer = Client(world, "w")
    writer.reserve(keys(1))
    (write,) = writer.outstanding.values()
    world.restart_server()
    writer.heartbeat()
    world.beat()
    donation.hand_over()
    assert donation.donor.reserve(keys(2)) == [NO_SPACE]
    for _ in range(4):
        writer.advance(write)
    writer.flush()
    assert writer.hits(keys(1)) == 1


def test_two_restarts_in_a_row_grant_no_extent_twice(world: World) -> None:
    donation = world.donor("d", records=2, units=2)
    writer, other = Client(world, "w"), Client(world, "o")
    writer.store(keys(1))
    writer.reserve(keys(2))
    world.restart_server()
    donation.donor.heartbeat()
    world.restart_server()
    world.beat()
    donation.hand_over()
    world.beat()
    donation.hand_over()
    assert other.reserve(keys(3)) == [NO_SPACE]
    assert other.hits(keys(1)) == 1
    world.check()


def test_generations_never_repeat_over_terms(world: World) -> None:
    donation = world.donor("d")
    donation.donor.store(keys(1, 2))
    donation.memory.records[0].generation += 1 << 40  # as if the clock had been far ahead in an earlier term
    highest = donation.memory.records[0].generation
    world.restart_server()
    world.beat()
    donation.hand_over()
    donation.donor.reserve(keys(3))
    (write,) = donation.donor.outstanding.values()
    assert write.said.generation > highest and write.said.generation % 2 == 0


def test_records_that_contradict_each_other_cost_the_segment_not_the_server(world: World) -> None:
    donation = world.donor("d")
    donation.donor.store(keys(1, 2))
    donation.memory.records[1].offset = donation.memory.records[0].offset
    world.restart_server()
    world.beat()
    donation.hand_over()
    assert world.service.counters["segments_corrupt"] == 1
    assert donation.donor.hits(keys(1)) == 0
    donation.register(anew=False)  # refused, so it comes back empty
    donation.hand_over()
    assert donation.incarnation == 2
    assert donation.donor.store(keys(1)) == [GRANTED]
    world.check()


@pytest.mark.parametrize("offset", [0, UNIT + 1, 1 << 40])
def test_a_record_outside_its_segment_costs_the_segment(world: World, offset: int) -> None:
    donation = world.donor("d")
    donation.donor.store(keys(1))
    donation.memory.records[0].offset = offset
    world.restart_server()
    world.beat()
    donation.hand_over()
    assert world.service.counters["segments_corrupt"] == 1


def test_a_key_in_two_segments_is_served_from_the_nearer(world: World) -> None:
    first, second = world.donor("a", device="cuda:0"), world.donor("b", device="cuda:1")
    first.donor.store(keys(1))
    away = first.donor
    away.is_suspended = True
    world.pass_time(6.0)
    second.donor.store(keys(1))
    away.last_beat = world.now  # it was not suspended: the network was
    away.is_suspended = False
    world.restart_server()
    world.beat()
    for donation in (first, second):
        donation.hand_over()
    world.beat()
    for donation in (first, second):
        donation.hand_over()
    world.check()
    for donation in (first, second):
        reading = donation.donor.acquire(keys(1))
        assert donation.donor.infos[reading.placements[0][0]].segment_id == donation.memory.id
        assert reading.finish() == [True]
