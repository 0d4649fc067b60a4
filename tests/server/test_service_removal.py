"""The state machine, message by message: removed means gone."""

from __future__ import annotations

import pytest

from tests.server.world import Client, World, key, keys
from vcache import protocol
from vcache.protocol import Outcome

GRANTED, EXISTS, NO_SPACE, DECLINED = Outcome.GRANTED, Outcome.EXISTS, Outcome.NO_SPACE, Outcome.DECLINED


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


@pytest.mark.parametrize("remove", ["remove", "clear"])
@pytest.mark.parametrize("steps", [0, 1, 3])
def test_what_was_reserved_before_a_removal_is_not_found_after_it(world: World, remove: str, steps: int) -> None:
    writer, other = world.donor("d").donor, Client(world, "o")
    writer.reserve(keys(1), rank=1, ranks=2, tenant=7)
    (write,) = writer.outstanding.values()
    for _ in range(steps):
        writer.advance(write)
    number = other.send(protocol.Remove, key(1)) if remove == "remove" else other.send(protocol.Clear, 7, False)
    world.settle()
    assert other.answer(number) is None, "it may be committed in memory, and found there by the next server"
    assert Client(world, "w").reserve(keys(1), rank=1, ranks=2, tenant=7) == [GRANTED], "but its key is free"
    while write.said.generation in writer.outstanding:
        writer.advance(write)
    world.settle()
    assert other.answer(number).count == 0
    assert world.placements() == set()
    world.check()


def test_what_is_written_of_another_key_or_tenant_outlives_a_removal(world: World) -> None:
    writer, other = world.donor("d").donor, Client(world, "o")
    for number, tenant in ((1, 7), (2, 8)):
        writer.reserve(keys(number), tenant=tenant)
    clear = other.send(protocol.Clear, 9, False)
    world.settle()
    assert other.answer(clear).count == 0
    assert other.call(protocol.Remove, key(3)).count == 0
    for write in list(writer.outstanding.values()):
        while write.said.generation in writer.outstanding:
            writer.advance(write)
    writer.flush()
    assert other.hits(keys(1)) == other.hits(keys(2)) == 1


@pytest.mark.parametrize("end", ["commit", "abort", "death", "goodbye", "silence"])
def test_a_clear_is_answered_whatever_becomes_of_the_writer_it_has_called_off(world: World, end: str) -> None:
    donation, writer, other = world.donor("d"), Client(world, "w"), Client(world, "o")
    writer.reserve(keys(1))
    (write,) = writer.outstanding.values()
    number = other.send(protocol.Clear, 0, True)
    if end == "commit":
        while write.said.generation in writer.outstanding:
            writer.advance(write)
    elif end == "abort":
        writer.abort(write)
    elif end == "death":
        writer.kill(messages_arrive=False)
    elif end == "goodbye":
        writer.goodbye()
    else:
        donation.donor.kill(messages_arrive=False)  # with the segment; nobody is left to prove anything
        writer.is_suspended = True
    for _ in range(3):
        world.pass_time(6.0)
        world.settle()
    assert other.answer(number).count == 0
    assert world.placements() == set()
    world.check()


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_a_clear_after_a_restart_calls_off_what_its_writer_has_yet_to_claim(world: World, steps: int) -> None:
    donation, writer, other = world.donor("d"), Client(world, "w"), Client(world, "o")
    writer.reserve(keys(1))
    (write,) = writer.outstanding.values()
    for _ in range(steps):
        writer.advance(write)
    writer.is_suspended = True
    world.restart_server()
    world.beat()
    donation.hand_over()
    number = other.send(protocol.Clear, 0, True)
    world.settle()
    assert other.answer(number) is None, "a writer has not been heard of"
    writer.is_suspended = False
    writer.heartbeat()
    while write.said.generation in writer.outstanding:
        writer.advance(write)
    writer.flush()
    for _ in range(3):
        world.beat()
        donation.hand_over()
        world.settle()
    assert other.answer(number) is not None
    world.restart_server()
    world.beat()
    donation.hand_over()
    assert other.hits(keys(1)) == 0
    world.check()


def test_a_writer_called_off_is_waited_for_although_its_segment_goes_and_comes_back(world: World) -> None:
    donation, writer, other = world.donor("d"), Client(world, "w"), Client(world, "o")
    writer.reserve(keys(1))
    (write,) = writer.outstanding.values()
    number = other.send(protocol.Clear, 0, True)
    donation.donor.is_suspended = True
    world.pass_time(6.0)
    donation.donor.is_suspended = False
    world.pass_time(2.0)
    donation.hand_over()
    assert other.answer(number) is None
    for _ in range(3):
        writer.advance(write)
    world.restart_server()  # before it is told
    world.beat()
    donation.hand_over()
    assert other.answer(number) is None, "it was never answered: what is there is no broken promise"


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
