"""The state machine, message by message: several placements of a shard, where a copy may go, which one a reader is sent."""

from __future__ import annotations

import pytest

from tests.server.world import Client, Donation, World, key, keys
from vcache import protocol
from vcache.protocol import Outcome, Tier

GRANTED, EXISTS, NO_SPACE, DECLINED = Outcome.GRANTED, Outcome.EXISTS, Outcome.NO_SPACE, Outcome.DECLINED


@pytest.fixture
def vram(world: World) -> Donation:
    return world.donor("v", tier=Tier.VRAM, device="gpu-0")


@pytest.fixture
def dram(world: World) -> Donation:
    return world.donor("d", units=4)


def sent_to(client: Client, name: bytes) -> int:
    """The number of the segment whose copy the client is sent."""
    ((number, *_),) = client.acquire([name]).placements
    return number


def finish(client: Client) -> None:
    """All its writes are committed, told, and have arrived."""
    for write in list(client.outstanding.values()):
        while write.said.generation in client.outstanding:
            client.advance(write)
    client.flush()


def test_a_copy_is_granted_where_the_shard_is_not_yet(world: World, vram: Donation, dram: Donation) -> None:
    writer = vram.donor
    writer.store(keys(1))
    assert writer.reserve(keys(1)) == [EXISTS]
    assert writer.reserve(keys(1), into=vram.number) == [EXISTS]
    assert writer.reserve(keys(1), into_tier=Tier.VRAM) == [EXISTS]
    assert writer.reserve(keys(1, 2), into_tier=Tier.DRAM) == [GRANTED, DECLINED], "2 is nowhere: nothing to copy"
    assert writer.reserve(keys(1), into=dram.number) == [EXISTS], "it is being written there"
    finish(writer)
    world.check()
    assert {segment for _, _, segment, _, _ in world.placements()} == {vram.memory.id, dram.memory.id}
    assert writer.reserve(keys(1), into=dram.number) == [EXISTS]


def test_a_copy_goes_nowhere_else_when_its_segment_cannot_take_it(world: World, vram: Donation, dram: Donation) -> None:
    writer, elsewhere = vram.donor, world.donor("e", host=b"another-host-016")
    writer.store(keys(1, 2, 3, 4, 5))
    assert writer.reserve(keys(1), into=99) == [DECLINED]
    assert writer.reserve(keys(1), into=elsewhere.number) == [DECLINED]
    assert writer.reserve(keys(1), into=vram.number, into_tier=Tier.DRAM) == [DECLINED]
    assert writer.reserve(keys(1, 2, 3, 4, 5), into=dram.number) == [GRANTED] * 4 + [NO_SPACE]


def test_new_chunks_go_to_vram_first(world: World, dram: Donation, vram: Donation) -> None:
    writer = Client(world, "w")
    writer.store(keys(*range(9)))
    assert [sent_to(writer, name) for name in keys(*range(9))] == [vram.number] * 8 + [dram.number]


def test_a_reader_is_sent_the_nearest_copy(world: World, vram: Donation, dram: Donation) -> None:
    other = world.donor("o", tier=Tier.VRAM, device="gpu-1")
    near, far = Client(world, "n", device="gpu-1"), Client(world, "f", device="gpu-2")
    foreigner = Client(world, "h", host=b"another-host-016", device="gpu-1")
    dram.donor.store(keys(1), into=0)
    vram.donor.store(keys(1), into=dram.number)
    for number in (vram.number, dram.number, other.number):
        vram.donor.store(keys(1), into=number)
    world.check()
    assert [sent_to(client, key(1)) for client in (near, vram.donor)] == [other.number, vram.number]
    assert sent_to(far, key(1)) in (vram.number, other.number)
    assert sent_to(foreigner, key(1)) == other.number
    vram.donor.kill(messages_arrive=True)
    other.donor.kill(messages_arrive=True)
    world.pass_time(6.0)
    assert sent_to(far, key(1)) == dram.number, "the last copy"
    world.check()


def test_the_own_hosts_copy_comes_before_another_hosts(world: World, dram: Donation) -> None:
    elsewhere = world.donor("o", tier=Tier.VRAM, device="gpu-1", host=b"another-host-016", remote=b"peer-o")
    reader = Client(world, "r", device="gpu-1")
    elsewhere.donor.store(keys(1))
    assert sent_to(reader, key(1)) == elsewhere.number, "there is no other"
    dram.donor.store(keys(1), into=dram.number)
    assert sent_to(reader, key(1)) == dram.number
    assert sent_to(Client(world, "h", host=b"another-host-016"), key(1)) == elsewhere.number
    world.check()


def test_a_run_of_copied_and_other_chunks_is_sent_whole(world: World, vram: Donation, dram: Donation) -> None:
    writer = vram.donor
    writer.store(keys(1, 2, 3))
    writer.store(keys(2), parent=key(1), into=dram.number)
    reading = Client(world, "r").acquire(keys(1, 2, 3))
    assert len(reading.placements) == 3 and reading.finish() == [True] * 3


@pytest.mark.parametrize("lost", ["vram", "dram"])
def test_a_chunk_lives_on_in_the_copy_that_is_left(world: World, vram: Donation, dram: Donation, lost: str) -> None:
    reader = Client(world, "r")
    vram.donor.store(keys(1))
    vram.donor.store(keys(1), into=dram.number)
    gone, left = (vram, dram) if lost == "vram" else (dram, vram)
    gone.donor.goodbye()
    assert reader.hits(keys(1)) == 1
    assert sent_to(reader, key(1)) == left.number
    world.settle()
    world.check()


def test_a_copy_that_did_not_validate_goes_alone(world: World, vram: Donation, dram: Donation) -> None:
    vram.donor.store(keys(1))
    vram.donor.store(keys(1), into=dram.number)
    reading = vram.donor.acquire(keys(1))
    assert reading.placements[0][0] == vram.number
    vram.donor.post(protocol.Release, reading.lease, [reading.placements[0][2]])
    assert sent_to(vram.donor, key(1)) == dram.number
    world.settle()
    world.check()


def test_a_copy_that_went_while_it_was_read_by_what_shared_memory_said_takes_no_other_with_it(
    world: World, vram: Donation, dram: Donation
) -> None:
    vram.donor.store(keys(1))
    world.check()
    reading = vram.donor.find(keys(1))
    assert reading.placements[0][0] == vram.number
    vram.donor.store(keys(1), into=dram.number)
    again = vram.donor.acquire(keys(1))
    vram.donor.post(protocol.Release, again.lease, [again.placements[0][2]])
    world.settle()
    assert reading.finish() == [False]
    assert sent_to(vram.donor, key(1)) == dram.number
    world.check()


def test_what_did_not_validate_by_what_shared_memory_said_goes(world: World, vram: Donation) -> None:
    vram.donor.store(keys(1, 2))
    world.check()
    reading = vram.donor.find(keys(1, 2))
    vram.donor.post(protocol.Release, reading.lease, [reading.placements[1][2]], True)
    assert vram.donor.hits(keys(1, 2)) == 1
    assert len(world.service.leases) == 0
    world.settle()
    world.check()


def test_removal_takes_all_copies(world: World, vram: Donation, dram: Donation) -> None:
    vram.donor.store(keys(1))
    vram.donor.store(keys(1), into=dram.number)
    number = vram.donor.send(protocol.Remove, key(1))
    assert vram.donor.hits(keys(1)) == 0
    vram.obey()
    assert vram.donor.answer(number) is None
    dram.obey()
    world.tick()
    dram.obey()
    vram.obey()
    assert vram.donor.answer(number).count == 1


@pytest.mark.parametrize("remove", ["remove", "clear"])
@pytest.mark.parametrize("restarted", [False, True])
def test_a_copy_under_way_is_no_way_back_for_what_is_removed(
    world: World, vram: Donation, dram: Donation, remove: str, restarted: bool
) -> None:
    writer, other = vram.donor, Client(world, "o")
    writer.store(keys(1))
    writer.reserve(keys(1), into=dram.number)
    (write,) = writer.outstanding.values()
    writer.advance(write)
    if restarted:
        world.restart_server()
        world.beat()
        for donation in (vram, dram):
            donation.hand_over()
    number = other.send(protocol.Remove, key(1)) if remove == "remove" else other.send(protocol.Clear, 0, True)
    world.settle()
    assert other.answer(number) is None, "answered while the copy is under way"
    while write.said.generation in writer.outstanding:
        writer.advance(write)
    for _ in range(2):  # gates open with the scan that begins after the last hello
        world.beat()
        for donation in (vram, dram):
            donation.hand_over()
        world.settle()
    assert other.answer(number) is not None
    assert not any(record.generation for memory in (vram.memory, dram.memory) for record in memory.records)
    world.restart_server()
    world.beat()
    for donation in (vram, dram):
        donation.hand_over()
    assert other.hits(keys(1)) == 0


def test_both_copies_are_handed_over(world: World, vram: Donation, dram: Donation) -> None:
    vram.donor.store(keys(1))
    vram.donor.store(keys(1), into=dram.number)
    before = world.placements()
    world.restart_server()
    world.beat()
    dram.hand_over()
    assert vram.donor.hits(keys(1)) == 1
    vram.hand_over()
    assert world.placements() == before
    world.check()
