"""The state machine, message by message: what one host's VRAM has no room for, another host's donor pulls."""

from __future__ import annotations

import dataclasses

import pytest

from tests.server.test_service_demotion import TIERED, counted, fill, where
from tests.server.world import Client, Donation, World, keys
from vcache import protocol
from vcache.protocol import Tier

OTHER_HOST = b"another-host-016"
NAMES = keys(*range(6))


@pytest.fixture
def world() -> World:
    return World(TIERED)


@pytest.fixture
def near(world: World) -> Donation:
    """A segment of VRAM that other hosts can read; above 5 of 8 chunks eviction begins, and goes on down to 3."""
    return world.donor("n", tier=Tier.VRAM, device="gpu-0", remote=b"peer-n")


@pytest.fixture
def far(world: World) -> Donation:
    """One of another host whose donor reads from other hosts; up to 6 of its 16 chunks may be pulled."""
    return world.donor("f", records=16, units=16, host=OTHER_HOST, remote=b"peer-f")


def ordered(donation: Donation) -> list[bytes]:
    return [item.key for _, item in donation.pulls.orders.values()]


def test_victims_are_pulled_leaves_first_and_served_all_the_while(world: World, near: Donation, far: Donation) -> None:
    fill(near)
    reader = Client(world, "r")
    world.tick()
    assert ordered(far) == [NAMES[5], NAMES[4], NAMES[3]]
    assert not near.sinking, "their own donor has nothing to do"
    assert {source.remote for source, _ in far.pulls.orders.values()} == {b"peer-n"}
    while far.pulls.orders:
        far.pulls.read_payload()
        while far.pulls.staged:
            far.pulls.advance()
            assert reader.acquire(NAMES).finish() == [True] * 6
            reader.flush()
        far.donor.flush()
        world.tick()
        near.obey()
        world.check()
    assert [where(world, name) for name in NAMES] == [{near.memory.id}] * 3 + [{far.memory.id}] * 3
    assert (counted(world, "pulled"), counted(world, "evicted")) == (3, 0)
    assert reader.acquire(NAMES).finish() == [True] * 6
    assert Client(world, "q", host=OTHER_HOST).hits(NAMES) == 6


def test_the_own_hosts_tier_below_and_the_store_come_first(world: World, far: Donation) -> None:
    world.donor("d", records=16, units=16)
    fill(world.donor("n", tier=Tier.VRAM, remote=b"peer-n"))
    world.settle()
    assert (counted(world, "demoted"), counted(world, "pulled")) == (3, 0)
    third = world.donor("s", tier=Tier.VRAM, remote=b"peer-s", spills=True, host=b"a-third-host-016")
    third.donor.store(keys(*"abcdef"))
    world.settle()
    assert (counted(world, "spilled"), counted(world, "pulled")) == (3, 0)


@pytest.mark.parametrize(
    "why", ["switched off", "the segment is not announced", "the donor does not pull", "it is full", "same host"]
)
def test_nobody_pulls(why: str) -> None:
    world = World(dataclasses.replace(TIERED, pull=why != "switched off"))
    near = world.donor("n", tier=Tier.VRAM, remote=b"" if why == "the segment is not announced" else b"peer-n")
    host = near.donor.host if why == "same host" else OTHER_HOST
    tier = Tier.VRAM if why == "same host" else Tier.DRAM
    remote = b"" if why == "the donor does not pull" else b"peer-f"
    far = world.donor("f", records=4, units=4, tier=tier, host=host, remote=remote)
    if why == "it is full":
        far.donor.store(keys("x"))  # 1 of 4; with another one it would be above its low watermark
    fill(near)
    world.tick()
    assert not far.pulls.orders
    world.settle()
    assert counted(world, "pulled") == 0
    assert counted(world, "evicted") >= 1
    world.check()


def test_no_more_is_pulled_than_stays_below_the_low_watermark(world: World, near: Donation) -> None:
    far = world.donor("f", records=8, units=8, host=OTHER_HOST, remote=b"peer-f")
    far.donor.store(keys("x", "y"))
    fill(near)
    world.tick()
    assert len(ordered(far)) == 1, "2 of 8, and one more"
    assert counted(world, "evicted") == 2


def test_what_is_pulled_pushes_nothing_out(world: World, near: Donation, far: Donation) -> None:
    near.donor.store(keys("p"), units=6)
    world.tick()
    assert ordered(far) == keys("p")
    others = keys(*"abcdefghijk")
    far.donor.store(others)  # meanwhile: 11 of 16 are no reason to evict, and no room for 6 more
    far.pulls.work()
    assert counted(world, "demotion_failed") == 1
    world.settle()
    assert all(where(world, name) == {far.memory.id} for name in others)
    assert counted(world, "evicted") == 1
    world.check()


def test_what_is_not_pulled_by_the_deadline_is_dropped_and_counted(world: World, near: Donation, far: Donation) -> None:
    fill(near)
    world.tick()
    world.pass_time(4.0)
    assert Client(world, "r").hits(NAMES) == 6
    world.pass_time(2.0)
    assert counted(world, "demotion_timed_out") == counted(world, "evicted") >= 1
    world.check()
    far.pulls.work()
    world.settle()
    world.check()


def test_orders_to_pull_are_repeated_until_they_are_done(world: World, near: Donation, far: Donation) -> None:
    fill(near)
    world.tick()
    far.pulls.forget()
    far.donor.heartbeat()
    assert len(ordered(far)) == 3
    far.pulls.work()
    far.donor.heartbeat()
    assert ordered(far) == []


def test_what_a_donor_cannot_pull_is_dropped_and_counted(world: World, near: Donation, far: Donation) -> None:
    fill(near)
    world.tick()
    far.donor.post(protocol.Pulled, far.number, [], list(far.pulls.orders))
    far.pulls.forget()
    far.donor.flush()
    world.settle()
    assert counted(world, "demotion_failed") == counted(world, "evicted") >= 1
    world.check()


def test_done_counts_only_with_a_copy_and_only_of_who_was_asked(world: World, near: Donation, far: Donation) -> None:
    fill(near)
    world.tick()
    other = world.donor("o", host=OTHER_HOST, remote=b"peer-o")
    other.donor.post(protocol.Pulled, other.number, [], list(far.pulls.orders))
    far.donor.post(protocol.Pulled, far.number, list(far.pulls.orders), [])
    far.donor.flush()
    other.donor.flush()
    world.tick()
    assert Client(world, "r").hits(NAMES) == 6
    assert counted(world, "pulled") == counted(world, "demotion_failed") == 0
    far.pulls.work()
    world.settle()
    assert counted(world, "pulled") == 3


def test_a_victim_in_use_when_it_is_pulled_stays(world: World, near: Donation, far: Donation) -> None:
    fill(near)
    world.tick()
    reading = Client(world, "r").acquire(NAMES, lease_s=4.0)
    far.pulls.work()
    world.tick()
    assert where(world, NAMES[5]) == {near.memory.id, far.memory.id}
    assert reading.finish() == [True] * 6
    world.check()


def test_all_ranks_go_together_or_none_does(world: World, near: Donation, far: Donation) -> None:
    for rank in range(2):
        near.donor.store(keys("a", "b", "c"), rank=rank, ranks=2)
    world.settle()
    moved = [name for name in keys("a", "b", "c") if far.memory.id in where(world, name)]
    assert moved and all(where(world, name) == {far.memory.id} for name in moved)
    assert counted(world, "pulled") == len(moved)
    assert Client(world, "r").hits(keys("a", "b", "c")) == 3
    world.check()


STEPS = ("ordered", "read", "proven", "reserved", "committed")


def advance_to(far: Donation, step: str) -> None:
    """The first pull is at this step; the others are still to be begun."""
    if step != "ordered":
        far.pulls.read_payload()
    for _ in range(STEPS.index(step) - 1):
        far.pulls.advance()
    far.donor.flush(1)  # the commit arrives; that it was a pull does not


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("who", ["the puller", "the source's donor"])
def test_whoever_dies_in_between_there_is_a_valid_copy_or_none(
    world: World, near: Donation, far: Donation, who: str, step: str
) -> None:
    fill(near)
    world.tick()
    advance_to(far, step)
    (far if who == "the puller" else near).donor.kill(messages_arrive=step == "committed")
    world.check()
    reader = Client(world, "r")
    reading = reader.acquire(NAMES)
    assert not any(reading.finish()) or all(reading.finish())
    world.pass_time(12.0)
    world.settle()
    world.check()
    if who == "the puller":
        assert reader.hits(NAMES) == 3, "nobody else could pull the others"
        assert counted(world, "pulls_sent_on") == (2 if step == "committed" else 3)
        assert counted(world, "demotion_timed_out") == 0
    else:
        assert where(world, NAMES[5]) == ({far.memory.id} if step == "committed" else set())
    assert not len(world.service.demotions)
    for segment in world.service.catalog.segments.values():
        assert not segment.pulling and not segment.demoting
        assert segment.staying_bytes == segment.used_bytes


def goes(far: Donation, how: str) -> None:
    """Its segment goes; known to the server when this returns."""
    if how == "drained":
        far.drain()
    elif how == "gone in good order":
        far.donor.goodbye()
    else:
        far.donor.kill(messages_arrive=False)
        far.donor.world.pass_time(far.donor.world.service.settings.liveness_s + 0.1, beat_s=0.1)
    far.donor.world.tick()


@pytest.mark.parametrize("how", ["killed", "drained", "gone in good order"])
@pytest.mark.parametrize("step", STEPS)
def test_when_a_puller_goes_another_one_takes_over_at_once(
    world: World, near: Donation, far: Donation, how: str, step: str
) -> None:
    fill(near)
    world.tick()
    advance_to(far, step)
    third = world.donor("t", records=16, units=16, host=b"a-third-host-016", remote=b"peer-t")
    goes(far, how)
    assert ordered(third) == [NAMES[5], NAMES[4], NAMES[3]]
    assert Client(world, "r").hits(NAMES) == 6, "served from where they are"
    assert counted(world, "pulls_sent_on") == 3
    world.settle()
    assert [where(world, name) for name in NAMES] == [{near.memory.id}] * 3 + [{third.memory.id}] * 3
    assert (counted(world, "pulled"), counted(world, "evicted"), counted(world, "demotion_timed_out")) == (3, 0, 0)
    world.check()


def test_when_a_puller_goes_and_nobody_else_pulls_its_victims_go_at_once_but_not_those_in_use(
    world: World, near: Donation, far: Donation
) -> None:
    fill(near)
    world.tick()
    reading = Client(world, "r").acquire(NAMES[:5], lease_s=60.0)
    goes(far, "drained")
    assert [where(world, name) for name in NAMES] == [{near.memory.id}] * 5 + [set()]
    assert reading.finish() == [True] * 5
    world.settle()
    assert Client(world, "q").hits(NAMES) == 5, "without them there is room enough"
    assert counted(world, "demotion_timed_out") == 0
    world.check()


def test_when_a_puller_goes_the_own_hosts_tier_below_takes_over(world: World, near: Donation, far: Donation) -> None:
    fill(near)
    world.tick()
    below = world.donor("d", records=16, units=16)
    goes(far, "drained")
    assert len(near.sinking) == 3
    world.settle()
    assert [where(world, name) for name in NAMES[3:]] == [{below.memory.id}] * 3
    assert (counted(world, "demoted"), counted(world, "evicted")) == (3, 0)
    world.check()


@pytest.mark.parametrize("step", STEPS)
def test_a_server_restarted_in_between_finds_one_placement_or_two(
    world: World, near: Donation, far: Donation, step: str
) -> None:
    fill(near)
    world.tick()
    advance_to(far, step)
    world.restart_server()
    for _ in range(3):
        world.beat()
        for donation in (near, far):
            donation.hand_over()
        world.tick()
    world.check()
    assert Client(world, "r").hits(NAMES) == 6
    expected = {near.memory.id, far.memory.id} if step == "committed" else {near.memory.id}
    assert where(world, NAMES[5]) == expected
    world.pass_time(6.0)
    world.settle()
    world.check()
    assert Client(world, "q").hits(NAMES) == 6, "it begins anew"
    assert counted(world, "pulled") + counted(world, "copies_evicted") >= 3


@pytest.mark.parametrize("step", STEPS)
def test_what_is_removed_meanwhile_does_not_come_back(world: World, near: Donation, far: Donation, step: str) -> None:
    fill(near)
    world.tick()
    advance_to(far, step)
    client = Client(world, "r")
    number = client.send(protocol.Remove, NAMES[5])
    world.settle()
    assert isinstance(client.answer(number), protocol.Done)
    assert where(world, NAMES[5]) == set()
    world.settle()
    world.check()
    assert not any(
        order.item.key == NAMES[5] for s in world.service.catalog.segments.values() for order in s.pulling.values()
    )


def test_a_source_overwritten_between_payload_and_record_is_not_committed(
    world: World, near: Donation, far: Donation
) -> None:
    fill(near)
    world.tick()
    far.pulls.read_payload()
    item = far.pulls.staged[0].item
    near.memory.retire(item.record, item.generation)
    far.pulls.advance()
    far.donor.flush()
    assert not far.pulls.staged and not far.donor.outstanding
    assert counted(world, "demotion_failed") == 1
