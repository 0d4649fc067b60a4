"""The state machine, message by message: victims go to the tier below, and are served from one valid place at every instant."""

from __future__ import annotations

import dataclasses

import pytest

from tests.server.world import SETTINGS, Client, Donation, World, key, keys
from vcache import protocol
from vcache.protocol import Destination, Outcome, Tier

#: Above 5 of 8 chunks demotion begins, and goes on down to 3.
TIERED = dataclasses.replace(SETTINGS, high_watermark=0.7, low_watermark=0.4, demotion_s=5.0)


@pytest.fixture
def world() -> World:
    return World(TIERED)


@pytest.fixture
def vram(world: World) -> Donation:
    return world.donor("v", tier=Tier.VRAM, device="gpu-0")


@pytest.fixture
def dram(world: World) -> Donation:
    return world.donor("d", records=16, units=16)


def counted(world: World, name: str) -> int:
    return world.service.counters[name]


def fill(donation: Donation, count: int = 6) -> list[bytes]:
    """A chain of chunks in the donation's segment, enough for demotion to begin."""
    names = keys(*range(count))
    assert donation.donor.store(names) == [Outcome.GRANTED] * count
    return names


def where(world: World, name: bytes) -> set[bytes]:
    """The segments that the chunk lies in."""
    return {segment for found, _, segment, _, _ in world.placements() if found == name}


def ordered(donation: Donation) -> list[bytes]:
    """The chunks that the donor is to demote."""
    return [donation.memory.records[item.record].key for item in donation.sinking.values()]


def test_victims_are_demoted_leaves_first_and_served_all_the_while(
    world: World, vram: Donation, dram: Donation
) -> None:
    names = fill(vram)
    reader = Client(world, "r")
    world.tick()
    assert ordered(vram) == [names[5], names[4], names[3]], "leaves first, none waiting for the other's copy"
    for _ in range(3):
        vram.begin_demotion()
        assert reader.acquire(names).finish() == [True] * 6
        reader.flush()
        vram.finish_demotion()
        assert reader.acquire(names).finish() == [True] * 6
        reader.flush()
        vram.donor.flush()
        world.tick()
        vram.obey()
        world.check()
    assert [where(world, name) for name in names] == [{vram.memory.id}] * 3 + [{dram.memory.id}] * 3
    assert (counted(world, "demoted"), counted(world, "evicted")) == (3, 0)
    assert reader.acquire(names).finish() == [True] * 6


def test_another_host_is_no_tier_below(world: World, vram: Donation) -> None:
    world.donor("d", host=b"another-host-016")
    fill(vram)
    world.settle()
    assert (counted(world, "demoted"), counted(world, "evicted")) == (0, 3)


def test_a_victim_in_use_when_its_copy_is_done_stays(world: World, vram: Donation, dram: Donation) -> None:
    names = fill(vram)
    world.tick()
    reading = Client(world, "r").acquire(names, lease_s=4.0)
    vram.demote()
    world.tick()
    assert where(world, names[5]) == {vram.memory.id, dram.memory.id}
    assert reading.finish() == [True] * 6
    world.pass_time(5.0)
    copied = counted(world, "committed")
    reading.client.store(keys("x"))
    world.tick()
    assert where(world, names[3]) == {dram.memory.id}
    assert counted(world, "committed") == copied + 1, "nothing is copied twice"
    world.check()


def test_a_victim_that_is_not_demoted_by_the_deadline_is_dropped_and_counted(
    world: World, vram: Donation, dram: Donation
) -> None:
    names = fill(vram)
    world.tick()
    world.pass_time(4.0)
    assert Client(world, "r").hits(names) == 6
    world.pass_time(2.0)
    assert counted(world, "demotion_timed_out") == counted(world, "evicted") >= 1
    world.check()
    vram.demote()
    world.settle()
    world.check()


def test_what_a_donor_cannot_demote_is_dropped_and_counted(world: World, vram: Donation, dram: Donation) -> None:
    fill(vram)
    world.tick()
    vram.donor.post(protocol.Demoted, vram.number, [], list(vram.sinking))
    vram.donor.flush()
    world.settle()
    assert counted(world, "demotion_failed") == counted(world, "evicted") >= 1
    world.check()


def test_done_counts_only_with_a_copy(world: World, vram: Donation, dram: Donation) -> None:
    names = fill(vram)
    world.tick()
    vram.donor.post(protocol.Demoted, vram.number, list(vram.sinking), [])
    vram.donor.flush()
    world.tick()
    assert where(world, names[5]) == {vram.memory.id}


def test_orders_are_repeated_until_they_are_done(world: World, vram: Donation, dram: Donation) -> None:
    fill(vram)
    world.tick()
    first = dict(vram.sinking)
    vram.sinking.clear()
    vram.donor.heartbeat()
    assert vram.sinking == first
    vram.demote()
    world.settle()
    vram.donor.heartbeat()
    assert not vram.sinking


def test_host_memory_makes_room_for_what_comes_from_above(world: World, vram: Donation) -> None:
    world.donor("d", records=4, units=4)
    for number in range(4):
        for at in range(6):
            vram.donor.store([key(f"{number}-{at}")])
        world.settle()
        world.check()
    assert counted(world, "demoted") >= 6
    assert counted(world, "evicted") >= 2, "its oldest"
    assert counted(world, "demotion_timed_out") == 0


@pytest.mark.parametrize("who", ["vram", "dram"])
def test_a_donor_killed_before_the_copy_is_committed_leaves_no_trace(
    world: World, vram: Donation, dram: Donation, who: str
) -> None:
    names = fill(vram)
    world.tick()
    vram.begin_demotion()
    (vram if who == "vram" else dram).donor.kill(messages_arrive=False)
    if who == "dram":
        vram.finish_demotion()
    world.pass_time(12.0)
    world.settle()
    world.check()
    assert not world.service.catalog.reservations.of_tenant(None)
    if who == "vram":
        assert not any(record.generation for record in dram.memory.records), "space below is given back"
    else:
        assert Client(world, "r").hits(names) >= 3


def test_a_donor_killed_after_the_copy_was_told_leaves_the_copy(world: World, vram: Donation, dram: Donation) -> None:
    (name,) = keys("only")
    vram.donor.store([name])
    fill(vram, 5)
    world.tick()
    assert ordered(vram)[0] == name
    vram.demote()
    vram.donor.kill(messages_arrive=True)
    world.pass_time(6.0)
    assert Client(world, "r").acquire([name]).finish() == [True]
    assert where(world, name) == {dram.memory.id}
    world.check()


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_a_server_killed_at_any_step_of_a_demotion_finds_every_chunk(
    world: World, vram: Donation, dram: Donation, steps: int
) -> None:
    names = fill(vram)
    world.tick()
    for step in (vram.begin_demotion, vram.finish_demotion)[:steps]:
        step()
    world.restart_server()
    world.beat()
    for donation in (vram, dram):
        donation.hand_over()
    world.check()
    assert Client(world, "r").hits(names) == 6
    vram.demote()
    world.pass_time(4.0)
    world.settle()
    world.check()
    assert Client(world, "q").acquire(names).finish() == [True] * 6


def test_a_removal_during_a_demotion_is_final(world: World, vram: Donation, dram: Donation) -> None:
    names = fill(vram)
    world.tick()
    vram.begin_demotion()
    other = Client(world, "o")
    number = other.send(protocol.Remove, names[5])
    vram.finish_demotion()
    assert other.answer(number) is None
    world.settle()
    assert other.answer(number).count == 1
    assert where(world, names[5]) == set()
    world.restart_server()
    world.beat()
    for donation in (vram, dram):
        donation.hand_over()
    assert where(world, names[5]) == set()


def test_a_chunks_ranks_are_demoted_together(world: World, dram: Donation) -> None:
    first, second = (world.donor(name, tier=Tier.VRAM, device=name) for name in ("gpu-0", "gpu-1"))
    names = keys(*range(6))
    for rank, donation in enumerate((first, second)):
        donation.donor.store(names, rank=rank, ranks=2)
    world.tick()
    assert ordered(first) == ordered(second) == [names[5], names[4], names[3]]
    first.demote()
    world.tick()
    assert where(world, names[5]) == {first.memory.id, second.memory.id, dram.memory.id}
    world.settle()
    assert where(world, names[5]) == {dram.memory.id}
    assert Client(world, "r").hits(names) == 6
    world.check()


@pytest.mark.parametrize("tier", [Tier.VRAM, Tier.DRAM])
def test_the_last_tier_of_the_pool_goes_to_the_store(world: World, tier: Tier) -> None:
    donation = world.donor("d", tier=tier, spills=True)
    names = fill(donation)
    world.tick()
    assert {item.destination for item in donation.sinking.values()} == {Destination.STORE}
    assert donation.donor.hits(names) == 6
    world.settle()
    assert world.store == {(name, 0) for name in names[3:]}
    assert donation.donor.hits(names) == 3
    assert (counted(world, "spilled"), counted(world, "evicted")) == (3, 3)
    world.check()


def test_a_chunk_goes_to_the_store_with_all_ranks(world: World) -> None:
    first, second = world.donor("a", spills=True), world.donor("b", spills=True, device="cpu:1")
    names = keys(*range(6))
    for rank, donation in enumerate((first, second)):
        donation.donor.store(names, rank=rank, ranks=2)
    world.settle()
    stored = {name for name, _ in world.store}
    assert stored and world.store == {(name, rank) for name in stored for rank in (0, 1)}
    world.check()


def test_in_vram_a_chunk_follows_its_children_down(world: World, vram: Donation, dram: Donation) -> None:
    old, new = keys("a", "b", "c", "d"), keys("x", "y")
    vram.donor.store(old)
    vram.donor.store(new)
    world.settle()
    assert [where(world, name) for name in old] == [{vram.memory.id}] + [{dram.memory.id}] * 3
    assert all(where(world, name) == {vram.memory.id} for name in new), "the newest leaves stay"
    world.check()


def states(world: World) -> set[str]:
    return {segment.state.value for segment in world.service.catalog.segments.values()}


def test_after_a_restart_vram_waits_for_the_tier_below(world: World, vram: Donation, dram: Donation) -> None:
    names = fill(vram)
    world.restart_server()
    for _ in range(3):
        world.beat()
        vram.hand_over()
        world.tick()
    assert states(world) == {"serving", "gated"}
    assert counted(world, "evicted") == 0 and not vram.sinking
    dram.hand_over()
    world.settle()
    assert (counted(world, "evicted"), counted(world, "demoted")) == (0, 3)
    assert Client(world, "r").hits(names) == 6


def test_a_tier_below_that_does_not_come_back_is_not_waited_for_long(
    world: World, vram: Donation, dram: Donation
) -> None:
    fill(vram)
    dram.donor.kill(messages_arrive=False)
    world.restart_server()
    for _ in range(3):
        world.beat()
        vram.hand_over()
        world.tick()
    assert states(world) == {"serving"} and counted(world, "evicted") == 0
    world.pass_time(6.0)
    world.settle()
    assert counted(world, "evicted") == 3
