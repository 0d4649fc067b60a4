"""Writing behind: never waits, drops and counts beyond its bounds, drains on flush and close, writes no lost payload."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch

from tests.store.conftest import STAGING_BYTES
from tests.store.shards import Gate, blank, payload, shard, shards
from vcache.errors import UnavailableError
from vcache.store.base import Got
from vcache.store.write_behind import WRITE_BEHIND_VALUES, WriteBehind

NBYTES = 10_000
PATIENCE_S = 60.0


@pytest.fixture
def gate(file_store) -> Iterator[Gate]:
    gate = Gate(file_store)
    yield gate
    gate.open.set()


@pytest.fixture
def writing(guarded) -> Iterator[Callable[..., WriteBehind]]:
    writers: list[WriteBehind] = []

    def start(store, *, max_bytes=1 << 30, max_items=1000, **settings) -> WriteBehind:
        guard = guarded(store, write_timeout=PATIENCE_S, timeout=PATIENCE_S, **settings)
        writers.append(WriteBehind(guard, max_bytes=max_bytes, max_items=max_items))
        return writers[-1]

    yield start
    for writer in writers:
        writer.close(timeout_s=5.0)


class Pool:
    """Hands out payloads as the pool would: positions of an offer are the shards from ``first`` on."""

    def __init__(self, first: int = 0, lost: Sequence[int] = ()) -> None:
        self.first, self.lost = first, lost
        self.asked: list[int] = []

    def fill(self, positions: Sequence[int], buffers: Sequence[torch.Tensor]) -> list[bool]:
        self.asked += positions
        for position, buffer in zip(positions, buffers, strict=True):
            buffer.copy_(payload(self.first + position, buffer.nbytes))
        return [position not in self.lost for position in positions]


def offer(
    writer: WriteBehind, numbers: Sequence[int], pool: Pool | None = None, nbytes: int = NBYTES
) -> tuple[bool, Pool]:
    pool = pool or Pool(numbers[0])
    taken = writer.offer([shard(number) for number in numbers], [nbytes] * len(numbers), pool.fill)
    return taken, pool


def test_what_is_offered_is_written(writing, file_store):
    writer = writing(file_store)
    assert offer(writer, range(3))[0]
    assert writer.flush(PATIENCE_S)
    buffers = blank(3)
    assert list(file_store.get_into(shards(3), buffers)) == [Got.LOADED] * 3
    assert torch.equal(buffers[2], payload(2))
    stats = writer.stats()
    assert stats["store_written"] == stats["store_offered"] == 3
    assert stats["store_queue_items"] == stats["store_queue_bytes"] == 0
    assert set(stats) == set(WRITE_BEHIND_VALUES)


def test_what_the_store_has_is_not_read_again(writing, file_store):
    writer = writing(file_store)
    offer(writer, [1])
    _, pool = offer(writer, range(3))
    writer.flush(PATIENCE_S)
    assert pool.asked == [0, 2]
    assert writer.stats()["store_present"] == 1


def test_what_the_pool_lost_is_not_written(writing, file_store):
    writer = writing(file_store)
    offer(writer, range(4), Pool(lost=[1, 3]))
    writer.flush(PATIENCE_S)
    assert list(file_store.contains(shards(4))) == [True, False, True, False]
    assert writer.stats()["store_dropped_lost"] == 2


def test_a_pool_that_fails_to_deliver_harms_nothing(writing, file_store):
    writer = writing(file_store)

    def fail(positions, buffers):
        raise OSError("the segment is gone")

    writer.offer(shards(2), [NBYTES] * 2, fail)
    offer(writer, [7])
    assert writer.flush(PATIENCE_S)
    assert list(file_store.contains([shard(0), shard(7)])) == [False, True]
    assert writer.stats()["store_dropped_failed"] == 2
    assert writer._store.staging.free_bytes == STAGING_BYTES


@pytest.mark.parametrize("bounds", [{"max_items": 4}, {"max_bytes": 4 * NBYTES}])
def test_beyond_its_bounds_it_drops_at_once(writing, gate, bounds):
    gate.open.clear()
    writer = writing(gate, **bounds)
    assert offer(writer, range(2))[0]
    assert offer(writer, range(2, 4))[0]
    assert not offer(writer, range(4, 6))[0]
    assert writer.stats()["store_dropped_queue"] == 2
    assert writer.stats()["store_queue_items"] == 4
    assert not writer.flush(0.01)
    gate.open.set()
    assert writer.flush(PATIENCE_S)
    assert list(gate.contains(shards(6))) == [True] * 4 + [False] * 2


def test_an_offer_larger_than_staging_goes_in_rounds(writing, file_store):
    writer = writing(file_store)
    size = STAGING_BYTES // 5
    _, pool = offer(writer, range(12), nbytes=size)
    assert writer.flush(PATIENCE_S)
    assert list(file_store.contains(shards(12))) == [True] * 12
    assert pool.asked == list(range(12))


def test_while_the_circuit_is_open_offers_are_dropped(writing, gate):
    writer = writing(gate, failures=1, probe_interval=60.0, max_probe_interval=60.0)
    gate.error = UnavailableError("gone")
    offer(writer, range(2))
    writer.flush(PATIENCE_S)
    taken, pool = offer(writer, range(2))
    assert not taken
    assert pool.asked == []
    assert writer.stats()["store_dropped_down"] == 2


def test_close_writes_what_is_queued(writing, file_store):
    writer = writing(file_store)
    for number in range(20):
        offer(writer, [number])
    writer.close(PATIENCE_S)
    assert list(file_store.contains(shards(20))) == [True] * 20
    assert not offer(writer, [30])[0]


def test_close_does_not_wait_for_a_hung_store(writing, gate):
    gate.open.clear()
    writer = writing(gate)
    for number in range(3):
        offer(writer, [number])
    writer.close(timeout_s=0.05)
    assert writer.stats()["store_dropped_queue"] == 2


def test_many_offer_at_once(writing, file_store):
    writer = writing(file_store, max_items=40)

    def offers(first: int) -> None:
        for number in range(first, first + 50):
            offer(writer, [number])

    threads = [threading.Thread(target=offers, args=(first,)) for first in (0, 100, 200)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert writer.flush(PATIENCE_S)
    stats = writer.stats()
    assert stats["store_written"] + stats["store_dropped_queue"] == stats["store_offered"] == 150
