"""The state machine, message by message: eviction, and what ends by a deadline."""

from __future__ import annotations

from tests.server.world import SETTINGS, Client, World, key, keys
from vcache import protocol
from vcache.protocol import Outcome

GRANTED, EXISTS, NO_SPACE, DECLINED = Outcome.GRANTED, Outcome.EXISTS, Outcome.NO_SPACE, Outcome.DECLINED


# --- eviction ---------------------------------------------------------------------------------------------------------


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


# --- deadlines --------------------------------------------------------------------------------------------------------


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
    Client(world, "o").send(protocol.Release, reading.lease, [reading.placements[0][2]])
    assert len(world.service.leases) == 1 and writer.hits(keys(1)) == 1


def test_a_lease_under_a_name_holds_what_is_there_and_ends_by_its_name(world: World) -> None:
    writer, other = world.donor("d").donor, Client(world, "o")
    writer.store(keys(1, 2))
    name = writer.send(protocol.LeaseRun, b"".join([*keys(1, 2), key(9)]), 3.0)
    [lease] = world.service.leases
    assert [entry.key for entry in lease.run] == keys(1, 2) and lease.name == name
    writer.send(protocol.LeaseRun, key(9), 3.0)
    other.send(protocol.Release, name, [], True)
    writer.send(protocol.Release, name, [])
    assert len(world.service.leases) == 1, "nothing was there, another session's name, an id that is none"
    writer.send(protocol.Release, name, [], True)
    assert len(world.service.leases) == 0
    writer.send(protocol.Release, name, [], True)
    writer.send(protocol.LeaseRun, key(1), 2.0)
    world.pass_time(2.5)
    assert len(world.service.leases) == 0 and world.service.counters["leases_expired"] == 1


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
