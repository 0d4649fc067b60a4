"""The server runs without the cyclic collector, so nothing that comes and goes may leave anything behind."""

from __future__ import annotations

import gc
import logging
import tracemalloc
from collections.abc import Iterator

import pytest

from tests.server.world import Client, Donation, SegmentMemory, World, key
from vcache import protocol


@pytest.fixture
def _no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    logging.disable()  # else pytest keeps what is logged, and what that names
    yield
    logging.disable(logging.NOTSET)
    gc.enable()


def live(world: World, donation: Donation, cycle: int) -> None:
    """Everything that may happen to entries, once, with keys and sessions never seen before."""
    donor = donation.donor
    names = [key(f"{cycle}.{at}") for at in range(6)]
    donor.store(names, tenant=1)
    donor.store([key(f"{cycle}.r")], rank=0, ranks=2, ttl_s=5)
    reader = Client(world, f"r{cycle}")
    reading = reader.acquire(names)
    reading.finish()
    reader.acquire(names[:2], lease_s=1.0)
    donor.call(protocol.Pin, names[0], 2.0)
    donor.call(protocol.Remove, names[5])
    donor.send(protocol.Clear, 1, False)
    reader.reserve([key(f"{cycle}.w")])
    reader.goodbye()
    other = Donation(Client(world, f"d{cycle}"), SegmentMemory(f"m{cycle}", records=3, units=3))
    other.donor.store([key(f"{cycle}.o")])
    other.donor.goodbye()
    world.now += 3.0
    world.beat()
    world.tick()
    world.now += 3.0
    world.beat()
    world.tick()
    world.settle()
    donor.inbox.clear()
    for client in (reader, other.donor):
        world.clients.remove(client)
    world.gone_memories.clear()


@pytest.mark.usefixtures("_no_collector")
def test_what_came_and_went_leaves_nothing_behind() -> None:
    world = World()
    donation = world.donor("d")
    tracemalloc.start()
    sizes = []
    for cycle in range(400):
        live(world, donation, cycle)
        if cycle in (199, 399):
            assert len(world.service.catalog.index) == 0 and len(world.service.catalog.reservations) == 0
            world.check()
            sizes.append(_of_the_server())
    tracemalloc.stop()
    # Left on purpose: removed keys and dropped segments of this term, both bounded, some 100 bytes each.
    assert sizes[1] - sizes[0] < 200 * 400


def _of_the_server() -> int:
    server = tracemalloc.Filter(inclusive=True, filename_pattern="*/vram_metadata_server/*")
    return sum(trace.size for trace in tracemalloc.take_snapshot().filter_traces([server]).statistics("filename"))
