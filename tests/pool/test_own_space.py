"""A donor's own process: extents that are filled before they have keys, and payloads that are read where they lie."""

from __future__ import annotations

import threading

import pytest

from tests.pool.conftest import MIB
from tests.pool.payloads import NBYTES, load, new_keys, payload, peek, poke, store, until, until_serving
from tests.support.processes import Child
from vcache.config import VCacheConfig
from vcache.keys import ChunkKey
from vcache.pool.client import PoolClient
from vcache.pool.donor import Donor
from vcache.pool.own_space import Filled, OwnSpace
from vcache.pool.reading import begin_read
from vcache.protocol import Outcome

GRANTED, EXISTS, DECLINED = Outcome.GRANTED, Outcome.EXISTS, Outcome.DECLINED


class Own:
    """A process with a segment of its own, and another client of the pool."""

    def __init__(
        self, config: VCacheConfig, server: Child, client: PoolClient, donor: Donor, other: PoolClient
    ) -> None:
        self.config, self.server, self.client, self.donor, self.other = config, server, client, donor, other
        self.space = OwnSpace(client, donor, tenant=7)

    def filled(self, key: ChunkKey) -> Filled:
        extent = self.space.take(NBYTES)
        assert extent is not None
        poke(self.donor.segment, extent.offset, payload(key))
        return Filled(extent, key, layout=3, tokens=256)

    def reservations(self) -> int:
        stats = self.client.stats()
        assert stats is not None
        return stats.reservations


@pytest.fixture
def own(quick, open_client, open_donor):
    config, server = quick
    client = open_client(config)
    own = Own(config, server, client, open_donor(config, client), open_client(config))
    yield own
    own.space.close()


def test_what_was_filled_before_it_had_a_key_is_loaded_by_everybody(own: Own) -> None:
    keys = new_keys(5)
    filled = [own.filled(key) for key in keys]
    assert own.other.lookup(b"".join(keys)).hits == 0
    assert own.space.store(filled) == [GRANTED] * 5
    until(lambda: load(own.other, keys) == 5, "the server reads the commit")
    assert load(own.client, keys) == 5
    until(lambda: own.other.clear(7) == 5, "it is the tenant's")


def test_a_chunk_that_is_there_already_is_not_stored_and_its_extent_stays_the_callers(own: Own) -> None:
    keys = new_keys(2)
    assert store(own.other, keys[:1]) == 1
    filled = [own.filled(key) for key in keys]
    assert own.space.store(filled) == [EXISTS, GRANTED]
    assert own.space.store([filled[0]._replace(key=new_keys(1)[0])]) == [GRANTED], "for another chunk"
    assert load(own.other, keys) == 2


def test_most_takes_ask_nobody_and_closing_gives_everything_back(own: Own) -> None:
    first = own.space.take(NBYTES)
    assert first is not None
    before = own.client.counters["calls"]
    others = [own.space.take(NBYTES) for _ in range(10)]
    assert None not in others and own.client.counters["calls"] == before
    own.space.give_back([first, *(extent for extent in others if extent is not None)])
    own.space.close()
    until(lambda: own.reservations() == 0, "all space is free")
    assert own.space.take(NBYTES) is None


def test_after_a_clear_what_is_at_hand_is_renewed(own: Own) -> None:
    first, second, third, fourth = new_keys(4)
    assert own.space.store([own.filled(first)]) == [GRANTED]
    assert own.other.clear(7) == 1
    late = own.filled(second)
    assert own.space.store([late]) == [DECLINED], "the server cannot know that it was empty before"
    own.space.give_up([late.extent])
    assert own.space.store([own.filled(third)]) == [GRANTED], "what was at hand as long is not tried"
    until(lambda: own.client.clear(7) == 1, "the server reads the commit")
    own.space.renew()
    before = own.client.counters["calls"]
    filled = own.filled(fourth)
    assert own.client.counters["calls"] == before, "there are as many at hand as before"
    assert own.space.store([filled]) == [GRANTED]


def test_a_full_segment_has_no_extent(own: Own) -> None:
    assert own.space.take(own.donor.segment.nbytes) is None
    taken = []
    while (extent := own.space.take(MIB)) is not None:
        taken.append(extent)
    assert len({extent.offset for extent in taken}) == len(taken) == 7
    own.space.give_back(taken)
    assert own.space.take(MIB) is not None


def test_what_is_filled_outlives_a_restart_of_the_server(own: Own, processes) -> None:
    keys = new_keys(3)
    filled = [own.filled(key) for key in keys]
    term = own.client.term
    own.server.kill()
    assert own.space.store(filled[:1]) == [DECLINED], "while it is away"
    own.space.give_up([filled[0].extent])
    processes.server(own.config)
    until(lambda: own.client.term > term and own.donor.term > term and own.donor.registered, "the donor is back")
    until_serving(own.client)
    assert store(own.other, new_keys(4)) == 4
    assert own.space.store(filled[1:]) == [GRANTED] * 2
    until(lambda: own.other.wait_available(60) and load(own.other, keys[1:]) == 2, "the server reads the commit")


def test_extents_of_an_earlier_incarnation_are_given_up(own: Own) -> None:
    (key,) = new_keys(1)
    filled = own.filled(key)
    before = own.donor.segment.incarnation
    own.client.background.end_session(own.client.session.epoch)
    until(lambda: own.donor.segment.incarnation > before and own.donor.registered, "a new incarnation is registered")
    assert own.space.store([filled]) == [DECLINED]
    own.space.give_up([filled.extent])
    until_serving(own.client)
    extent = own.filled(key)
    assert extent.extent.incarnation > before
    assert own.space.store([extent]) == [GRANTED]
    until(lambda: load(own.other, [key]) == 1, "the server reads the commit")


# --- holds ------------------------------------------------------------------------------------------------------------


def test_a_record_that_is_held_is_not_retired_and_its_removal_waits(own: Own) -> None:
    (key,) = new_keys(1)
    assert store(own.other, [key]) == 1
    read = begin_read(own.client, [key], 0)
    _, record, _, offset, _ = read.placements[0].tolist()
    assert own.donor.holds.take(record)
    read.complete()
    removed: list[int | None] = []
    removing = threading.Thread(target=lambda: removed.append(own.other.remove(key)))
    removing.start()
    until(lambda: own.client.lookup(key).hits == 0, "it is removed")
    assert store(own.other, [key]) == 1, "elsewhere"
    assert peek(own.donor.segment, offset, NBYTES) == payload(key)
    assert own.donor.segment.generation(record) and not removed
    own.donor.holds.release(record)
    removing.join(60)
    assert removed == [1] and not len(own.donor.holds)


def test_no_new_incarnation_begins_while_a_record_is_held(own: Own) -> None:
    (key,) = new_keys(1)
    assert store(own.other, [key]) == 1
    read = begin_read(own.client, [key], 0)
    _, record, _, offset, _ = read.placements[0].tolist()
    assert own.donor.holds.take(record) and own.donor.holds.take(record)
    read.complete()
    before = own.donor.segment.incarnation
    epoch = own.client.session.epoch
    own.client.background.end_session(epoch)

    def is_closed() -> bool:
        is_taken = own.donor.holds.take(record)
        if is_taken:
            own.donor.holds.release(record)
        return not is_taken

    until(is_closed, "the donor wants to begin a new incarnation: nothing more is read in place")
    own.donor.holds.release(record)
    assert own.donor.segment.incarnation == before and peek(own.donor.segment, offset, NBYTES) == payload(key)
    own.donor.holds.release(record)
    until(lambda: own.donor.segment.incarnation > before and own.donor.registered, "a new incarnation is registered")
    assert own.donor.holds.take(record)
    own.donor.holds.release(record)
    assert load(own.other, [key]) == 0
