"""The state machine, message by message: writes, reads, and the evidence that gives space back."""

from __future__ import annotations

import dataclasses

from tests.server.world import SETTINGS, UNIT, Client, World, key, keys
from vcache import protocol
from vcache.protocol import ErrorCode, Outcome

GRANTED, EXISTS, NO_SPACE, DECLINED = Outcome.GRANTED, Outcome.EXISTS, Outcome.NO_SPACE, Outcome.DECLINED


# --- reading and writing ----------------------------------------------------------------------------------------------


def test_a_stored_run_is_found_and_read_by_another_client(world: World) -> None:
    donation = world.donor("d")
    reader = Client(world, "r", writes=False)
    assert donation.donor.store(keys(1, 2, 3)) == [GRANTED] * 3
    assert reader.hits(keys(1, 2, 3, 4)) == 3
    reading = reader.acquire(keys(1, 2, 9))
    assert reading.finish() == [True, True]
    assert len(world.service.leases) == 1
    reader.flush()
    assert len(world.service.leases) == 0
    world.check()


def test_a_run_ends_at_the_first_chunk_that_is_not_there(world: World) -> None:
    client = world.donor("d").donor
    client.store(keys(1, 3))
    assert client.hits(keys(1, 2, 3)) == 1
    assert client.hits(keys(2, 3)) == 0
    assert client.hits([]) == 0


def test_what_is_there_or_being_written_is_not_granted_again(world: World) -> None:
    writer, other = world.donor("d").donor, Client(world, "o")
    writer.store(keys(1))
    writer.reserve(keys(2))
    assert other.reserve(keys(1, 2, 3, 3)) == [EXISTS, EXISTS, GRANTED, EXISTS]


def test_a_write_is_invisible_until_its_commit_is_told(world: World) -> None:
    writer = world.donor("d").donor
    writer.reserve(keys(1))
    (write,) = writer.outstanding.values()
    for _ in range(4):
        assert writer.hits(keys(1)) == 0
        writer.advance(write)
    writer.flush()
    assert writer.hits(keys(1)) == 1


def test_a_chunk_is_a_hit_only_with_all_ranks(world: World) -> None:
    client = world.donor("d").donor
    client.store(keys(1), rank=0, ranks=2)
    assert client.hits(keys(1)) == 0
    client.store(keys(1), rank=1, ranks=2)
    assert client.hits(keys(1)) == 1
    for rank in (0, 1):
        assert client.acquire(keys(1), rank=rank).finish() == [True]
    assert client.acquire(keys(1), rank=2).placements == []
    world.check()


def test_a_reader_that_said_so_may_not_write(world: World) -> None:
    world.donor("d")
    reader = Client(world, "r", writes=False)
    reply = reader.call(protocol.Reserve, key(1), b"", 0, 1, UNIT, 256, 0, 0, 0.0)
    assert reply.code is ErrorCode.REFUSED


def test_a_writer_is_given_its_own_device_then_the_emptiest_then_nothing_elsewhere(world: World) -> None:
    near = world.donor("near", records=2, units=2, device="cuda:0")
    small = world.donor("small", records=2, units=2, device="cuda:1")
    large = world.donor("large", records=6, units=6, device="cuda:2")
    world.donor("far", device="cuda:0", host=b"h" * 16)
    writer = Client(world, "w", device="cuda:0")
    assert writer.reserve(keys(1, 2, 3, 4)) == [GRANTED] * 4
    where = [write.said.segment_id for write in writer.outstanding.values()]
    assert where == [near.memory.id] * 2 + [large.memory.id] * 2
    assert writer.reserve(keys(5, 6, 7, 8, 9, 10, 11)) == [GRANTED] * 6 + [NO_SPACE]
    assert {write.said.segment_id for write in writer.outstanding.values()} == {
        near.memory.id,
        small.memory.id,
        large.memory.id,
    }
    lonely = Client(world, "l", host=b"x" * 16)
    assert lonely.reserve(keys(20)) == [DECLINED]


def test_most_free_placement_ignores_the_device() -> None:
    world = World(dataclasses.replace(SETTINGS, placement="most_free"))
    world.donor("near", units=4, device="cuda:0")
    large = world.donor("large", units=8, device="cuda:1")
    writer = Client(world, "w", device="cuda:0")
    writer.reserve(keys(1))
    assert [write.said.segment_id for write in writer.outstanding.values()] == [large.memory.id]


def test_a_payload_larger_than_any_segment_is_declined(world: World) -> None:
    writer = world.donor("d", units=4).donor
    assert writer.reserve(keys(1), units=5) == [DECLINED]
    assert writer.reserve(keys(1), units=4) == [GRANTED]


def test_a_session_may_hold_only_so_many_reservations(world: World) -> None:
    writer = world.donor("d", records=5000, units=5000).donor
    names = keys(*range(4097))
    assert writer.reserve(names) == [GRANTED] * 4096 + [DECLINED]


# --- evidence ---------------------------------------------------------------------------------------------------------


def test_time_frees_the_key_and_nothing_else(world: World) -> None:
    donation = world.donor("d", records=2, units=2)
    slow, other = Client(world, "slow"), Client(world, "o")
    slow.reserve(keys(1))
    (write,) = slow.outstanding.values()
    world.pass_time(4.0)
    assert other.reserve(keys(1)) == [GRANTED], "the key is free"
    assert other.reserve(keys(2)) == [NO_SPACE], "record and extent are not"
    for _ in range(4):
        slow.advance(write)
    slow.flush()
    assert world.service.counters["commits_refused"] == 1
    donation.obey()
    assert other.reserve(keys(2)) == [NO_SPACE]
    world.settle()
    assert other.reserve(keys(2)) == [GRANTED], "the refused commit was the evidence"
    world.check()


def test_an_aborted_reservation_is_retired_before_it_is_free(world: World) -> None:
    donation = world.donor("d", records=1, units=1)
    writer = donation.donor
    writer.reserve(keys(1))
    (write,) = writer.outstanding.values()
    writer.advance(write)
    writer.abort(write)
    assert writer.reserve(keys(2)) == [NO_SPACE]
    world.tick()
    assert donation.memory.records[0].generation == write.said.generation - 1
    donation.obey()
    assert donation.memory.records[0].generation == 0
    assert writer.reserve(keys(2)) == [GRANTED]


def test_a_heartbeat_settles_what_it_does_not_list(world: World) -> None:
    world.donor("d", records=1, units=1)
    writer = Client(world, "w")
    writer.reserve(keys(1))
    writer.outstanding.clear()  # its commit or abort was lost
    world.pass_time(1.0)
    world.settle()
    assert writer.reserve(keys(2)) == [NO_SPACE], "a commit may still be on its way"
    world.pass_time(3.0)
    world.settle()
    assert writer.reserve(keys(2)) == [GRANTED]


def test_a_heartbeat_before_the_commit_it_followed_loses_nothing(world: World) -> None:
    writer = world.donor("d").donor
    writer.reserve(keys(1))
    (write,) = writer.outstanding.values()
    for _ in range(4):
        writer.advance(write)
    writer.heartbeat()
    writer.flush()
    assert writer.hits(keys(1)) == 1


def test_a_heartbeat_settles_no_grant_that_is_still_on_its_way(world: World) -> None:
    writer = world.donor("d", records=1, units=1).donor
    number = writer.send(protocol.Reserve, key(1), b"", 0, 1, UNIT, 256, 0, 0, 0.0)
    world.pass_time(4.0)  # the answer lies in the socket; the heartbeats' thread has not seen it
    world.settle()
    assert len(world.service.catalog.reservations) == 1
    assert writer.answer(number) is not None
    assert writer.reserve(keys(2)) == [NO_SPACE]


def test_a_dead_writers_space_comes_back_by_proof(world: World) -> None:
    world.donor("d", records=1, units=1)
    writer, other = Client(world, "w"), Client(world, "o")
    writer.reserve(keys(1))
    writer.kill(messages_arrive=False)
    world.pass_time(4.0)
    assert other.reserve(keys(2)) == [NO_SPACE], "not yet silent for long enough to be suspected"
    world.pass_time(3.0)
    world.settle()
    assert world.service.counters["sessions_dead"] == 1
    assert other.reserve(keys(2)) == [GRANTED]


def test_a_suspended_writers_space_does_not_come_back_however_long_it_takes(world: World) -> None:
    world.donor("d", records=1, units=1)
    writer, other = Client(world, "w"), Client(world, "o")
    writer.reserve(keys(1))
    (write,) = writer.outstanding.values()
    writer.is_suspended = True
    world.pass_time(100.0, beat_s=2.0)
    world.settle()
    assert other.reserve(keys(2)) == [NO_SPACE]
    writer.is_suspended = False
    for _ in range(4):
        writer.advance(write)
    writer.flush()
    world.check()
    assert writer.hits(keys(1)) == 0
    world.pass_time(1.0)
    world.settle()
    assert other.reserve(keys(2)) == [GRANTED]


def test_a_donor_cannot_declare_a_writer_of_another_host_dead(world: World) -> None:
    donor = world.donor("d").donor
    far = Client(world, "far", host=b"x" * 16)
    donor.call(protocol.Heartbeat, [], 0, [], [far.session], socket="background")
    assert far.hits(keys(1)) == 0 and world.service.counters["sessions_dead"] == 0


def test_a_client_that_donates_nothing_cannot_declare_anybody_dead(world: World) -> None:
    world.donor("d")
    writer, liar = Client(world, "w"), Client(world, "liar")
    writer.reserve(keys(1))
    liar.call(protocol.Heartbeat, [], 0, [], [writer.session], socket="background")
    assert world.service.counters["sessions_dead"] == 0


def test_a_commit_after_a_goodbye_still_counts(world: World) -> None:
    donation = world.donor("d")
    writer = Client(world, "w")
    writer.reserve(keys(1))
    (write,) = writer.outstanding.values()
    for _ in range(4):
        writer.advance(write)
    late = list(writer.on_its_way)
    writer.goodbye()
    for message in late:
        world.deliver("w/calls", message)
    assert donation.donor.hits(keys(1)) == 1
