"""The state machine, message by message: a pool in memory whose donors and clients keep the contract."""

from __future__ import annotations

import dataclasses
from typing import Any

import msgspec
import pytest

from tests.server.world import SETTINGS, UNIT, Client, Donation, SegmentMemory, World, Write, key
from vcache import protocol
from vcache.protocol import ErrorCode, Outcome

GRANTED, EXISTS, NO_SPACE, DECLINED = Outcome.GRANTED, Outcome.EXISTS, Outcome.NO_SPACE, Outcome.DECLINED


def keys(*names: str | int) -> list[bytes]:
    return [key(name) for name in names]


@pytest.fixture
def world() -> World:
    return World()


# --- reading and writing ------------------------------------------------------------------------------------------------


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


# --- evidence -----------------------------------------------------------------------------------------------------------


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


# --- donors come and go -------------------------------------------------------------------------------------------------


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


def test_only_its_donor_may_speak_for_a_segment(world: World) -> None:
    donation = world.donor("d")
    stranger = Client(world, "s")
    for kind, fields in ((protocol.DrainSegment, ()), (protocol.Retired, ([],)), (protocol.Handover, ([], True))):
        assert stranger.call(kind, donation.number, *fields).code is ErrorCode.REFUSED
    assert stranger.call(protocol.DrainSegment, 99).code is ErrorCode.UNKNOWN_SEGMENT


# --- a restart ----------------------------------------------------------------------------------------------------------


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


# --- eviction -----------------------------------------------------------------------------------------------------------


def test_eviction_runs_ahead_of_the_writes_and_takes_leaves_first(world: World) -> None:
    donation = world.donor("d", records=20, units=20)
    writer = donation.donor
    writer.store(keys(*range(19)))
    writer.store(keys("x"))  # above the high watermark now
    assert world.service.counters["evicted"] == 0
    world.settle()
    assert world.service.counters["evicted"] >= 2
    left = writer.hits(keys(*range(19)))
    assert 0 < left < 19, "the chain is shortened from its end"
    assert writer.hits(keys("x")) == 1
    world.check()


def test_a_write_that_finds_no_space_is_skipped_and_makes_room(world: World) -> None:
    donation = world.donor("d", records=4, units=4)
    writer = donation.donor
    writer.store(keys(1, 2, 3))
    assert writer.reserve(keys("y"), units=3) == [NO_SPACE]
    world.settle()
    assert writer.reserve(keys("y"), units=3) == [GRANTED]


def test_an_evicted_record_is_granted_only_after_it_was_retired_in_memory(world: World) -> None:
    donation = world.donor("d", records=1, units=1)
    writer = donation.donor
    writer.store(keys(1))
    assert writer.reserve(keys(2)) == [NO_SPACE]
    for _ in range(5):
        world.tick()
    assert writer.hits(keys(1)) == 0
    assert writer.reserve(keys(2)) == [NO_SPACE], "evicted, not yet retired"
    donation.obey()
    assert writer.reserve(keys(2)) == [GRANTED]


def test_leased_and_pinned_chunks_are_not_evicted(world: World) -> None:
    donation = world.donor("d", records=3, units=3)
    writer = donation.donor
    for name in (1, 2, 3):
        writer.store(keys(name))
    reading = writer.acquire(keys(1), lease_s=4.0)
    assert writer.call(protocol.Pin, b"".join(keys(2, 9)), 60.0).count == 1
    for _ in range(3):
        assert NO_SPACE in writer.reserve(keys(4, 5))
        world.settle()
        for write in list(writer.outstanding.values()):
            writer.abort(write)
        writer.flush()
        world.settle()
    assert (writer.hits(keys(1)), writer.hits(keys(2)), writer.hits(keys(3))) == (1, 1, 0)
    assert reading.finish() == [True]
    world.check()


def test_with_everything_pinned_a_store_is_skipped(world: World) -> None:
    writer = world.donor("d", records=2, units=2).donor
    writer.store(keys(1, 2), pin_s=60.0)
    for _ in range(3):
        assert writer.store(keys(3)) == [NO_SPACE]
        world.settle()
    assert writer.hits(keys(1, 2)) == 2
    assert writer.call(protocol.Unpin, b"".join(keys(1, 2))).count == 2
    writer.store(keys(3))
    world.settle()
    assert writer.store(keys(3)) == [GRANTED]


def test_a_prefix_is_not_evicted_while_its_continuation_is_being_written(world: World) -> None:
    donation = world.donor("d", records=2, units=2)
    writer = donation.donor
    writer.store(keys(1))
    writer.reserve(keys(2), parent=key(1))
    assert writer.reserve(keys(3)) == [NO_SPACE]
    world.settle()
    assert writer.hits(keys(1)) == 1


def test_the_least_recently_used_leaf_goes_first(world: World) -> None:
    writer = world.donor("d", records=3, units=3).donor
    for name in (1, 2, 3):
        writer.store(keys(name))
    writer.hits(keys(1))
    writer.call(protocol.Lookup, key(3), 0.0)
    world.service.settings = SETTINGS
    writer.reserve(keys(4), units=1)
    world.service.tick(world.now, False)
    assert writer.hits(keys(2)) == 0


# --- deadlines ----------------------------------------------------------------------------------------------------------


def test_a_lease_ends_at_its_deadline_and_never_later_than_the_longest(world: World) -> None:
    writer = world.donor("d").donor
    writer.store(keys(1))
    writer.acquire(keys(1), lease_s=2.0)
    writer.acquire(keys(1), lease_s=1000.0)
    assert writer.call(protocol.Lookup, key(1), 3.0).lease > 0
    assert len(world.service.leases) == 3
    world.pass_time(2.0)
    assert len(world.service.leases) == 2
    world.pass_time(2.0)
    assert len(world.service.leases) == 0
    assert world.service.counters["leases_expired"] == 3


def test_a_silent_sessions_leases_end(world: World) -> None:
    world.donor("d").donor.store(keys(1))
    reader = Client(world, "r", writes=False)
    reader.acquire(keys(1), lease_s=4.0)
    reader.is_suspended = True
    world.now += 3.9
    world.beat()
    reader.kill(messages_arrive=False)
    world.pass_time(3.0)
    assert len(world.service.leases) == 0


def test_a_lease_cannot_be_released_by_another_session(world: World) -> None:
    writer = world.donor("d").donor
    writer.store(keys(1))
    reading = writer.acquire(keys(1))
    Client(world, "o").send(protocol.Release, reading.lease, [0])
    assert len(world.service.leases) == 1 and writer.hits(keys(1)) == 1


def test_a_chunk_with_a_time_to_live_ends_also_after_a_restart(world: World) -> None:
    donation = world.donor("d")
    donation.donor.store(keys(1), ttl_s=10)
    donation.donor.store(keys(2))
    world.pass_time(5.0)
    world.restart_server()
    world.beat()
    donation.hand_over()
    assert donation.donor.hits(keys(1)) == 1
    world.pass_time(6.0)
    assert (donation.donor.hits(keys(1)), donation.donor.hits(keys(2))) == (0, 1)
    world.restart_server()
    world.beat()
    donation.hand_over()
    assert donation.donor.hits(keys(1)) == 0


def test_an_incomplete_chunk_expires(world: World) -> None:
    writer = world.donor("d").donor
    writer.store(keys(1), rank=0, ranks=2)
    world.pass_time(7.0)
    assert len(world.service.catalog.index) == 1
    world.pass_time(2.0)
    assert len(world.service.catalog.index) == 0
    assert world.service.counters["incomplete_expired"] == 1
    world.check()


def test_an_incomplete_chunk_waits_for_the_writer_of_its_last_shard(world: World) -> None:
    writer = world.donor("d").donor
    writer.store(keys(1), rank=0, ranks=2)
    world.pass_time(6.0)
    writer.reserve(keys(1), rank=1, ranks=2)
    world.pass_time(2.5)
    for write in list(writer.outstanding.values()):
        for _ in range(4):
            writer.advance(write)
    writer.flush()
    assert writer.hits(keys(1)) == 1


def test_a_chunk_that_loses_a_rank_with_its_donor_is_incomplete_then_gone(world: World) -> None:
    first, second = world.donor("a", device="cuda:0"), world.donor("b", device="cuda:1")
    first.donor.store(keys(1), rank=0, ranks=2)
    second.donor.store(keys(1), rank=1, ranks=2)
    assert first.donor.hits(keys(1)) == 1
    second.donor.goodbye()
    assert first.donor.hits(keys(1)) == 0
    world.settle()
    world.pass_time(9.0)
    assert len(world.service.catalog.index) == 0
    world.check()


# --- removing -----------------------------------------------------------------------------------------------------------


def test_a_removal_is_answered_when_it_is_gone_from_memory(world: World) -> None:
    donation = world.donor("d")
    donation.donor.store(keys(1, 2))
    number = donation.donor.send(protocol.Remove, b"".join(keys(1, 2, 3)))
    assert donation.donor.hits(keys(1)) == 0
    world.tick()
    assert donation.donor.answer(number) is None
    donation.obey(1)
    assert donation.donor.answer(number) is None
    donation.obey()
    assert donation.donor.answer(number).count == 2
    world.restart_server()
    world.beat()
    donation.hand_over()
    assert donation.donor.hits(keys(1)) == 0


def test_a_removal_waits_for_an_eviction_of_the_same_key(world: World) -> None:
    donation = world.donor("d", records=1, units=1)
    donation.donor.store(keys(1))
    donation.donor.reserve(keys(2))
    world.tick()
    assert donation.donor.hits(keys(1)) == 0
    number = donation.donor.send(protocol.Remove, key(1))
    assert donation.donor.answer(number) is None
    donation.obey()
    assert donation.donor.answer(number).count == 0


def test_a_removal_of_nothing_is_answered_at_once(world: World) -> None:
    assert world.donor("d").donor.call(protocol.Remove, key(1)).count == 0


def test_a_removal_during_a_handover_catches_what_comes_later(world: World) -> None:
    donation = world.donor("d")
    donation.donor.store(keys(1, 2, 3))
    world.restart_server()
    world.beat()
    donation.hand_over(pages=1)
    number = donation.donor.send(protocol.Remove, b"".join(keys(1, 3)))
    donation.hand_over()
    assert donation.donor.hits(keys(2)) == 1 and donation.donor.hits(keys(3)) == 0
    assert donation.donor.answer(number) is None
    world.settle()
    assert donation.donor.answer(number) is not None
    assert [record.key for record in donation.memory.records if record.generation] == keys(2)


def test_a_removal_before_a_donor_is_back_is_remembered(world: World) -> None:
    donation = world.donor("d")
    donation.donor.store(keys(1, 2))
    world.restart_server()
    other = Client(world, "o")
    assert other.call(protocol.Remove, key(1)).count == 0
    world.beat()
    donation.hand_over()
    assert (other.hits(keys(1)), other.hits(keys(2))) == (0, 1)


def test_a_removal_is_answered_when_the_donor_dies(world: World) -> None:
    donation = world.donor("d")
    other = Client(world, "o")
    donation.donor.store(keys(1))
    number = other.send(protocol.Remove, key(1))
    donation.donor.kill(messages_arrive=False)
    world.pass_time(6.0)
    world.settle()
    assert other.answer(number).count == 1


def test_clear_takes_one_tenant_at_once_and_answers_when_memory_agrees(world: World) -> None:
    donation = world.donor("d")
    client = donation.donor
    client.store(keys(1, 2, 3), tenant=7)
    client.store(keys(4), tenant=8)
    number = client.send(protocol.Clear, 7, False)
    assert client.hits(keys(1)) == 0, "hidden before the sweep has come to it"
    assert client.hits(keys(4)) == 1
    assert client.store(keys(2), tenant=7) == [GRANTED], "and may be written anew"
    world.tick()
    assert client.answer(number) is None
    world.settle()
    assert client.answer(number).count == 3
    assert client.hits(keys(2)) == 1
    world.check()


def test_clear_everything(world: World) -> None:
    first, second = world.donor("a"), world.donor("b")
    first.donor.store(keys(1, 2), tenant=1)
    second.donor.store(keys(3))
    number = first.donor.send(protocol.Clear, 0, True)
    world.settle()
    assert first.donor.answer(number).count == 3
    assert all(record.generation == 0 for donation in (first, second) for record in donation.memory.records)


def test_removing_a_chunk_ends_its_leases_usefulness_not_the_lease(world: World) -> None:
    writer = world.donor("d").donor
    writer.store(keys(1))
    reading = writer.acquire(keys(1))
    writer.send(protocol.Remove, key(1))
    world.settle()
    assert reading.finish() == [False], "a miss, never wrong bytes"
    writer.flush()
    assert len(world.service.leases) == 0
    world.check()


def test_a_placement_that_did_not_validate_is_dropped(world: World) -> None:
    donation = world.donor("d")
    donation.donor.store(keys(1, 2))
    donation.memory.records[1].generation = 0  # somebody's bug, or a bit that fell over
    reading = donation.donor.acquire(keys(1, 2))
    assert reading.finish() == [True, False]
    donation.donor.flush()
    assert world.service.counters["validation_failures"] == 1
    assert donation.donor.hits(keys(1, 2)) == 1
    world.settle()
    world.check()


# --- sessions and bad requests ------------------------------------------------------------------------------------------


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
