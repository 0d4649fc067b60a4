"""The state machine, message by message: a pool in memory whose donors and clients keep the contract."""

from __future__ import annotations

from tests.server.world import Client, World, key
from vcache.protocol import Outcome

GRANTED, EXISTS, NO_SPACE, DECLINED = Outcome.GRANTED, Outcome.EXISTS, Outcome.NO_SPACE, Outcome.DECLINED


def keys(*names: str | int) -> list[bytes]:
    return [key(name) for name in names]


def test_a_stored_run_is_found_and_read_by_another_client() -> None:
    world = World()
    donation = world.donor("d")
    reader = Client(world, "r", writes=False)
    assert donation.donor.store(keys(1, 2, 3)) == [GRANTED] * 3
    assert reader.hits(keys(1, 2, 3, 4)) == 3
    reading = reader.acquire(keys(1, 2, 9))
    assert reading.finish() == [True, True]
    reader.flush()
    assert len(world.service.leases) == 0
    world.check()
