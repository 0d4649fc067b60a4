"""The state machine, message by message: what is there key by key, and keys that are no run."""

from __future__ import annotations

from tests.server.world import Client, World, key, keys
from vcache import protocol
from vcache.protocol import PLACEMENT, Outcome


def located(client: Client, names: list[bytes], lease_s: float = 0.0) -> protocol.Located:
    reply = client.call(protocol.Locate, b"".join(names), lease_s)
    assert isinstance(reply, protocol.Located)
    return reply


def test_every_key_is_answered_for_by_itself(world: World) -> None:
    donor = world.donor("d").donor
    donor.store(keys(1, 2))
    donor.store(keys(4))
    donor.reserve(keys(5))
    assert list(located(donor, keys(0, 1, 2, 3, 4, 5, 1)).present) == [0, 1, 1, 0, 1, 0, 1]
    assert located(donor, keys(9), 1.0).lease == 0


def test_what_is_located_with_a_lease_is_not_evicted_and_the_rest_is(world: World) -> None:
    donation = world.donor("d", units=4)
    donor = donation.donor
    for name in (1, 2, 3, 4):
        donor.store(keys(name))
    found = located(donor, keys(1, 9, 3), 4.0)
    assert list(found.present) == [1, 0, 1] and found.lease
    assert donor.reserve(keys(5, 6)) == [Outcome.NO_SPACE] * 2
    world.settle()
    assert list(located(donor, keys(1, 2, 3, 4)).present) == [1, 0, 1, 0]
    donor.post(protocol.Release, found.lease, [])
    donor.flush()
    assert not len(world.service.leases)
    world.check()


def test_what_a_clear_has_buried_is_not_located(world: World) -> None:
    donor = world.donor("d").donor
    donor.store(keys(*range(6)))
    donor.send(protocol.Clear, 0, True)
    assert not any(located(donor, keys(*range(6))).present)


def test_the_last_of_what_is_located_together_goes_first(world: World) -> None:
    donor = world.donor("d", units=4).donor
    for name in (1, 2, 3, 4):
        donor.store(keys(name))
    located(donor, keys(1, 2, 3, 4))
    assert donor.reserve(keys(5), units=2) == [Outcome.NO_SPACE]
    world.tick()
    gone = [at for at, is_there in enumerate(located(donor, keys(1, 2, 3, 4)).present, 1) if not is_there]
    assert gone == list(range(gone[0], 5)), "a suffix"


def test_keys_that_are_no_run_have_no_key_before_them(world: World) -> None:
    donation = world.donor("d", units=2)
    donor = donation.donor
    reply = donor.call(protocol.Reserve, key(1) + key(2), b"", 0, 1, 4096, 0, 0, 0, 0.0, 0, None, False)
    for _, record, generation, offset, nbytes in PLACEMENT.iter_unpack(reply.placements):
        donation.memory.records[record].generation = generation
        donation.memory.records[record].key = key(1 + record)
        donation.memory.records[record].offset, donation.memory.records[record].nbytes = offset, nbytes
        donor.post(protocol.Commit, [generation])
    donor.flush()
    index = world.service.catalog.index
    assert [index.whole[name].parent for name in keys(1, 2)] == [b"", b""]
