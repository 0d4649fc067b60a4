"""The state machine, message by message: removed means gone."""

from __future__ import annotations

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
