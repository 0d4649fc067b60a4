"""The state machine, message by message: allocations without keys, and the keys they are given."""

from __future__ import annotations

import pytest

from tests.server.allocating import allocate, assign, finish, unnamed
from tests.server.world import Client, Donation, World, key, keys
from vcache import protocol
from vcache.protocol import ErrorCode, Outcome

GRANTED, EXISTS, NO_SPACE, DECLINED = Outcome.GRANTED, Outcome.EXISTS, Outcome.NO_SPACE, Outcome.DECLINED


@pytest.fixture
def own(world: World) -> Donation:
    return world.donor("d", units=4)


def test_what_is_filled_first_and_named_later_is_found_under_its_name(world: World, own: Donation) -> None:
    donor, reader = own.donor, Client(world, "r")
    assert allocate(own, 2) == [GRANTED] * 2
    assert reader.hits(keys(1)) == 0
    assert assign(donor, keys(1, 2)) == [GRANTED] * 2
    world.check()
    assert reader.hits(keys(1)) == 0, "it is not committed"
    finish(donor)
    world.check()
    reading = reader.acquire(keys(1, 2))
    assert reading.finish() == [True] * 2


def test_an_allocation_takes_no_key_and_outlives_every_deadline(world: World, own: Donation) -> None:
    donor, writer = own.donor, Client(world, "w")
    allocate(own, 1)
    assert writer.store(keys(1)) == [GRANTED]
    world.pass_time(10 * world.settings.reservation_s)
    assert assign(donor, keys(1)) == [EXISTS], "and stays what it was"
    assert assign(donor, keys(2)) == [GRANTED]
    finish(donor)
    assert writer.hits(keys(2)) == 1
    world.check()


def test_a_key_that_is_given_has_its_deadline(world: World, own: Donation) -> None:
    donor, writer = own.donor, Client(world, "w")
    allocate(own, 1)
    assign(donor, keys(1))
    assert writer.reserve(keys(1)) == [EXISTS]
    world.pass_time(2 * world.settings.reservation_s)
    assert writer.reserve(keys(1)) == [GRANTED]
    finish(donor)
    world.check()
    assert writer.hits(keys(1)) == 0, "its commit came too late"


def test_what_was_allocated_before_a_clear_is_given_no_name_after_it(world: World, own: Donation) -> None:
    donor, other = own.donor, Client(world, "o")
    allocate(own, 3)
    assert assign(donor, keys(1)) == [GRANTED]
    number = other.send(protocol.Clear, 0, True)
    assert assign(donor, keys(2)) == [DECLINED], "it may have been filled before"
    finish(donor)
    world.settle()
    assert other.answer(number).count == 0, "not for what has no name"
    assert other.hits(keys(1)) == 0
    for write in unnamed(donor):
        donor.abort(write)
    donor.flush()
    world.settle()
    allocate(own, 1)
    assert assign(donor, keys(1)) == [GRANTED]
    finish(donor)
    assert other.hits(keys(1)) == 1
    world.check()


def test_what_was_allocated_before_a_removal_may_be_named_after_it(world: World, own: Donation) -> None:
    allocate(own, 1)
    assert Client(world, "o").call(protocol.Remove, key(1)).count == 0
    assert assign(own.donor, keys(1)) == [GRANTED]
    finish(own.donor)
    assert own.donor.hits(keys(1)) == 1
    world.check()


def test_a_full_segment_allocates_what_it_has_and_makes_room(world: World, own: Donation) -> None:
    donor = own.donor
    donor.store(keys(1, 2))
    assert allocate(own, 3) == [GRANTED, GRANTED, NO_SPACE]
    world.settle()
    assert allocate(own, 1) == [GRANTED], "of what was evicted"
    assert allocate(own, 1, units=9) == [DECLINED], "larger than the segment"
    world.check()


def test_space_comes_back_by_evidence_only(world: World, own: Donation) -> None:
    donor = own.donor
    allocate(own, 4)
    world.pass_time(3 * world.settings.reservation_s)
    assert Client(world, "w").reserve(keys(1)) == [NO_SPACE]
    for write in unnamed(donor):
        donor.abort(write)
    donor.flush()
    world.settle()
    assert Client(world, "v").reserve(keys(1)) == [GRANTED]
    world.check()


def test_only_the_donor_of_a_segment_allocates_in_it_and_only_it_names_what_it_has(world: World, own: Donation) -> None:
    stranger = Client(world, "s")
    assert stranger.call(protocol.Allocate, own.number, 1, 4096, 0).code is ErrorCode.REFUSED
    allocate(own, 1)
    (write,) = unnamed(own.donor)
    reply = stranger.call(protocol.Assign, [write.said.generation], key(1), b"")
    assert list(reply.outcomes) == [DECLINED]
    assert own.donor.call(protocol.Assign, [write.said.generation], b"", b"").code is ErrorCode.BAD_REQUEST
    assert own.donor.call(protocol.Allocate, own.number, 1, 0, 0).code is ErrorCode.BAD_REQUEST


def test_a_restarted_server_gives_nobody_what_is_allocated_and_names_it_still(world: World, own: Donation) -> None:
    donor, writer = own.donor, Client(world, "w")
    allocate(own, 3)
    assign(donor, keys(1))
    world.restart_server()
    for _ in range(3):
        world.beat()
        own.hand_over()
    assert writer.store(keys(5, 6)) == [GRANTED, NO_SPACE], "three of the four are taken"
    assert assign(donor, keys(2)) == [GRANTED]
    finish(donor)
    assert writer.hits(keys(1)) == writer.hits(keys(2)) == 1
    world.check()


def test_nothing_is_named_in_an_earlier_incarnation(world: World, own: Donation) -> None:
    donor = own.donor
    allocate(own, 1)
    donor.is_suspended = True
    world.pass_time(2 * world.settings.liveness_s)
    donor.is_suspended = False
    world.pass_time(2.0)
    world.settle()
    assert assign(donor, keys(1)) == [DECLINED]
    world.check()
