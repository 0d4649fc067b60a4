"""Mooncake's master and owners killed, hung and restarted: deadlines hold, others are not lost, recovery is unaided."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.store.mooncake import Mooncake, await_ready, fill, wait_for
from tests.store.shards import blank, payload, payloads, shards
from vcache.store.base import Got, Put, Shard
from vcache.store.guard import GuardedStore

pytestmark = pytest.mark.slow

NBYTES = 300_000
DEADLINE_S = 1.0
#: How much longer than its deadline a call may take on a busy machine; what it must not take is Mooncake's own time (4 to 60 s).
SLACK_S = 2.0
#: Calls that are certain to be skipped while the circuit is open.
SKIPPED = 200


def filled(mooncake: Mooncake, opened: Callable[..., GuardedStore], count: int = 4) -> GuardedStore:
    mooncake.start_master()
    mooncake.start_owner()
    store = opened({"probe_interval": 0.2, "max_probe_interval": 1.0})
    await_ready(store)
    fill(store, count, NBYTES)
    return store


def timed(call: Callable[[], Any]) -> tuple[Any, float]:
    started = time.monotonic()
    return call(), time.monotonic() - started


def misses_in_time_then_skips(store: GuardedStore) -> None:
    for _ in range(3):
        answer, seconds = timed(lambda: list(store.get_into(shards(4), blank(4, NBYTES))))
        assert answer == [Got.FAILED] * 4
        assert seconds < DEADLINE_S + SLACK_S
    wait_for(lambda: list(store.contains(shards(2))) == [False] * 2 and not store.available, "the open circuit")
    before = store.counters()["store_made_calls"]
    _, seconds = timed(lambda: [store.contains(shards(64)) for _ in range(SKIPPED)])
    made = store.counters()["store_made_calls"] - before
    assert made <= 1, "at most one call, in a half-open moment, reached the store"
    if not made:
        assert seconds / SKIPPED < 0.005


def loads_everything(store: GuardedStore, wanted: list[Shard]) -> bool:
    buffers = blank(len(wanted), NBYTES)
    return list(store.get_into(wanted, buffers)) == [Got.LOADED] * len(wanted) and all(
        torch.equal(buffer, payload(number, NBYTES)) for number, buffer in enumerate(buffers)
    )


def test_a_killed_master_is_a_miss_and_one_restarted_empty_is_used_again(mooncake, opened):
    store = filled(mooncake, opened)
    mooncake.master.kill()
    misses_in_time_then_skips(store)
    mooncake.start_master()
    await_ready(store)
    wait_for(lambda: list(store.contains(shards(4))) == [False] * 4, "the empty store")
    wait_for(
        lambda: set(store.put_from(shards(4), payloads(4, NBYTES))) <= {Put.STORED, Put.EXISTS}, "the owner's return"
    )
    assert loads_everything(store, shards(4))


def test_a_hung_master_is_a_miss_and_one_resumed_is_used_again(mooncake, opened):
    store = filled(mooncake, opened)
    mooncake.master.suspend()
    misses_in_time_then_skips(store)
    mooncake.master.resume()
    await_ready(store)
    wait_for(lambda: set(store.put_from(shards(4), payloads(4, NBYTES))) <= {Put.STORED, Put.EXISTS}, "writing again")
    assert loads_everything(store, shards(4))
    wait_for(lambda: store.stats()["store_busy_threads"] == 0, "the late calls' end")
    store.contains(shards(1))
    assert store.staging.free_bytes == store.staging.nbytes


def on_two_owners(mooncake: Mooncake, opened: Callable[..., GuardedStore]):
    """A store whose shards 0..15 lie with two owners; both, and how many each has is for the test to find out."""
    mooncake.start_master()
    owners = [mooncake.start_owner(), mooncake.start_owner()]
    store = opened()
    await_ready(store)
    fill(store, 16, NBYTES)
    assert loads_everything(store, shards(16))
    return store, owners


@pytest.mark.parametrize("spoken_to_before", [True, False], ids=["known", "never spoken to"])
def test_a_hung_owner_costs_only_its_own_objects(mooncake, opened, spoken_to_before):
    writer, (_, hung) = on_two_owners(mooncake, opened)
    store = writer if spoken_to_before else opened()
    await_ready(store)
    hung.suspend()
    buffers = blank(16, NBYTES)
    answer, seconds = timed(lambda: list(store.get_into(shards(16), buffers)))
    assert seconds < DEADLINE_S + SLACK_S
    assert set(answer) == {Got.LOADED, Got.FAILED}, "the other owner's objects were lost as well"
    for number, got in enumerate(answer):
        assert got is not Got.LOADED or torch.equal(buffers[number], payload(number, NBYTES))
    again, seconds = timed(lambda: list(store.get_into(shards(16), blank(16, NBYTES))))
    assert again.count(Got.LOADED) == answer.count(Got.LOADED)
    assert seconds < DEADLINE_S / 2 + SLACK_S, "an owner known to hang is not waited for"
    assert store.stats()["store_circuit"] == "closed"
    assert store.stats()["store_overdue_calls"] == 0
    hung.resume()


def test_a_killed_owner_costs_only_its_own_objects(mooncake, opened):
    store, (_, killed) = on_two_owners(mooncake, opened)
    killed.kill()
    buffers = blank(16, NBYTES)
    answer, seconds = timed(lambda: list(store.get_into(shards(16), buffers)))
    assert seconds < DEADLINE_S + SLACK_S
    assert Got.LOADED in answer
    assert set(answer) - {Got.LOADED} <= {Got.FAILED, Got.ABSENT, Got.INTERRUPTED}
    assert len(set(answer)) > 1
    for number, got in enumerate(answer):
        assert got is not Got.LOADED or torch.equal(buffers[number], payload(number, NBYTES))
    assert store.stats()["store_circuit"] == "closed"


def test_memory_of_failed_transfers_stays_taken_until_the_mooncake_process_is_replaced(mooncake, opened):
    store, (_, killed) = on_two_owners(mooncake, opened)
    killed.kill()
    starts = store.counters()["store_process_starts"]
    wait_for(
        lambda: Got.FAILED not in store.get_into(shards(16), blank(16, NBYTES)) or replaced(store, starts), "an end"
    )
    kept = store.staging.nbytes - store.staging.free_bytes
    process = store._store._process
    assert replaced(store, starts) or kept == 0 or process.tainted_bytes > 0
    process.kill()
    assert store.staging.free_bytes == store.staging.nbytes
    store.staging.check_integrity()


def replaced(store: GuardedStore, starts: int) -> bool:
    return store.counters()["store_process_starts"] > starts
