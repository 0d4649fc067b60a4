"""The guard: whatever the store does, an answer in time, no exception, no wrong byte, no pile of threads."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.store.conftest import STAGING_BYTES
from tests.store.shards import Gate, blank, payload, payloads, shard, shards
from vcache.errors import UnavailableError
from vcache.store.base import Got, Put
from vcache.store.guard import GUARD_VALUES, GuardedStore

PATIENCE_S = 60.0


@pytest.fixture
def gate(file_store) -> Iterator[Gate]:
    gate = Gate(file_store)
    yield gate
    gate.open.set()


def wait_for(condition) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def hang(gate: Gate, guard: GuardedStore, call) -> object:
    """What ``call`` answered while the store hung."""
    gate.open.clear()
    answer = call()
    assert gate.inside == 1
    return answer


def test_a_healthy_store_is_seen_through_it(file_store, guarded):
    guard = guarded(file_store)
    assert list(guard.put_from(shards(3), payloads(3))) == [Put.STORED] * 3
    assert list(guard.contains(shards(4))) == [True] * 3 + [False]
    buffers = blank(4)
    assert list(guard.get_into(shards(4), buffers)) == [Got.LOADED] * 3 + [Got.ABSENT]
    assert all(torch.equal(buffers[number], payload(number)) for number in range(3))
    with guard.load(shards(4), [10_000] * 4) as loaded:
        assert loaded.run == 3
        assert torch.equal(loaded.buffer(1), payload(1))
        with pytest.raises(ValueError, match="was not loaded"):
            loaded.buffer(3)
    assert guard.remove(shards(4)) == 3
    assert guard.staging.free_bytes == STAGING_BYTES
    stats = guard.stats()
    assert stats["store_circuit"] == "closed"
    assert set(GUARD_VALUES) <= set(stats)


def test_more_than_staging_holds_goes_in_rounds(file_store, guarded):
    guard = guarded(file_store)
    size = STAGING_BYTES // 3
    assert list(guard.put_from(shards(7), payloads(7, size))) == [Put.STORED] * 7
    buffers = blank(7, size)
    assert list(guard.get_into(shards(7), buffers)) == [Got.LOADED] * 7
    assert all(torch.equal(buffers[number], payload(number, size)) for number in range(7))
    assert len(guard.load(shards(7), [size] * 7)) == 2


def test_what_never_fits_into_staging_is_a_miss(file_store, guarded):
    guard = guarded(file_store)
    assert list(guard.get_into([shard(0)], blank(1, STAGING_BYTES))) == [Got.FAILED]
    assert list(guard.put_from([shard(0)], blank(1, STAGING_BYTES))) == [Put.FAILED]
    assert guard.stats()["store_no_staging"] == 2


@pytest.mark.parametrize("operation", ["contains", "get_into", "put_from", "remove"])
@pytest.mark.parametrize("error", [OSError("boom"), UnavailableError("gone"), MemoryError(), ValueError("bug")])
def test_an_exception_is_a_miss(gate, guarded, operation, error):
    gate.error = error
    guard = guarded(gate)
    arguments = (shards(2), blank(2)) if operation in {"get_into", "put_from"} else (shards(2),)
    answer = getattr(guard, operation)(*arguments)
    misses = {"contains": [False] * 2, "get_into": [Got.FAILED] * 2, "put_from": [Put.FAILED] * 2, "remove": None}
    assert answer == misses[operation]
    assert guard.stats()["store_failed_calls"] == 1
    assert guard.staging.free_bytes == STAGING_BYTES


@pytest.mark.parametrize("operation", ["contains", "get_into", "put_from"])
def test_an_answer_of_the_wrong_length_is_a_miss(gate, guarded, operation, monkeypatch):
    monkeypatch.setattr(gate, operation, lambda *_: [True])
    answer = getattr(guarded(gate), operation)(*((shards(2),) if operation == "contains" else (shards(2), blank(2))))
    assert len(answer) == 2
    assert True not in answer
    assert Got.LOADED not in answer or operation == "contains"


def test_a_hanging_store_is_a_miss(gate, guarded):
    guard = guarded(gate)
    assert hang(gate, guard, lambda: guard.contains(shards(2))) == [False, False]
    assert guard.stats()["store_overdue_calls"] == 1


def test_a_late_read_cannot_touch_what_later_calls_use(gate, guarded):
    """The one way to a wrong byte: the hung call writes into a buffer that somebody else uses by now."""
    gate._store.put_from(shards(2), payloads(2, 1 << 20))
    guard = guarded(gate, failures=1000)
    callers = blank(1, 1 << 20)
    assert hang(gate, guard, lambda: guard.get_into([shard(0)], callers)) == [Got.FAILED]
    free_meanwhile = guard.staging.free_bytes
    assert free_meanwhile < STAGING_BYTES, "the late call's block is still its own"
    others = guard.staging.take([1 << 20] * 6)
    for block in others:
        block.tensor.fill_(42)
    gate.open.set()
    wait_for(lambda: guard.stats()["store_busy_threads"] == 0)
    assert all((block.tensor == 42).all() for block in others)
    assert not callers[0].any()
    for block in others:
        block.release()
    assert guard.staging.free_bytes == STAGING_BYTES
    guard.staging.check_integrity()


def test_a_late_write_keeps_its_bytes(gate, guarded, file_store):
    guard = guarded(gate, failures=1000)
    assert hang(gate, guard, lambda: guard.put_from([shard(0)], [payload(0)])) == [Put.FAILED]
    for block in (blocks := guard.staging.take([10_000] * 100)):
        block.tensor.fill_(42)
    gate.open.set()
    wait_for(lambda: guard.stats()["store_busy_threads"] == 0)
    for block in blocks:
        block.release()
    buffers = blank(1)
    assert list(file_store.get_into([shard(0)], buffers)) == [Got.LOADED]
    assert torch.equal(buffers[0], payload(0))
    assert guard.staging.free_bytes == STAGING_BYTES


def test_hung_threads_do_not_pile_up(gate, guarded):
    guard = guarded(gate, threads=2, failures=1000, timeout=0.05)
    gate.open.clear()
    before = threading.active_count()
    for _ in range(10):
        assert list(guard.contains(shards(1))) == [False]
    assert threading.active_count() - before <= 2
    stats = guard.stats()
    assert stats["store_overdue_calls"] == 2
    assert stats["store_unbegun_calls"] == 8
    gate.open.set()
    wait_for(lambda: guard.stats()["store_busy_threads"] == 0)
    assert list(guard.contains(shards(1))) == [False]
    assert guard.stats()["store_made_calls"] == 3, "the unbegun calls never ran"


def test_hung_writes_do_not_keep_readers_out(gate, guarded):
    gate._store.put_from(shards(1), payloads(1))
    guard = guarded(gate, write_threads=1, failures=1000)
    hang(gate, guard, lambda: guard.put_from([shard(1)], payloads(1)))
    gate.open.set()
    assert list(guard.contains(shards(1))) == [True]


def test_the_circuit_opens_skips_and_closes_by_itself(gate, guarded, caplog):
    caplog.set_level(logging.INFO, "vcache.store.guard")
    guard = guarded(gate, failures=3)
    gate.error = UnavailableError("no such host")
    for _ in range(3):
        guard.contains(shards(1))
    assert guard.stats()["store_circuit"] == "open"
    assert not guard.available
    assert list(guard.get_into(shards(2), blank(2))) == [Got.FAILED] * 2
    assert guard.stats()["store_made_calls"] == 3, "calls while it is open do not reach the store"
    wait_for(lambda: guard.stats()["store_probes"] >= 2)
    gate.error = None
    wait_for(lambda: guard.available)
    guard.contains(shards(1))
    assert guard.stats()["store_circuit"] == "closed"
    assert guard.stats()["store_opened"] == 1
    assert [text for text in caplog.messages if "circuit open" in text and "no such host" in text]
    assert [text for text in caplog.messages if "circuit closed" in text]


def test_a_hanging_store_is_probed_by_one_thread_only(gate, guarded):
    guard = guarded(gate, failures=1, timeout=0.05)
    gate.open.clear()
    guard.contains(shards(1))
    wait_for(lambda: gate.inside == 2)  # the call and the probe
    before = threading.active_count()
    started = time.monotonic()
    while time.monotonic() - started < 0.5:
        assert list(guard.contains(shards(3))) == [False] * 3
        time.sleep(0.01)
    assert gate.inside == 2
    assert threading.active_count() <= before
    gate.open.set()
    wait_for(lambda: guard.available)


def test_one_invalid_object_is_counted_and_opens_nothing(gate, guarded, file_store):
    guard = guarded(gate, failures=1)
    file_store.put_from(shards(3), payloads(3))
    Path(file_store._path(shard(1))).write_bytes(b"x" * 20_000)
    buffers = blank(3)
    assert list(guard.get_into(shards(3), buffers)) == [Got.LOADED, Got.INVALID, Got.LOADED]
    assert torch.equal(buffers[2], payload(2))
    assert guard.stats()["store_invalid"] == 1
    assert guard.stats()["store_circuit"] == "closed"


@pytest.mark.parametrize("times", [1, 3])
def test_what_is_transient_is_tried_again(gate, guarded, monkeypatch, times):
    left = [times]

    def interrupted_first(wanted, buffers):
        gate.calls += 1
        results = list(gate._store.get_into(wanted, buffers))
        if left[0]:
            left[0] -= 1
            results[-1] = Got.INTERRUPTED
        return results

    monkeypatch.setattr(gate, "get_into", interrupted_first)
    gate._store.put_from(shards(3), payloads(3))
    guard = guarded(gate, retries=3, timeout=5.0)
    buffers = blank(3)
    assert list(guard.get_into(shards(3), buffers)) == [Got.LOADED] * 3
    assert all(torch.equal(buffers[number], payload(number)) for number in range(3))
    assert guard.stats()["store_retries"] == times


def test_retries_end(gate, guarded, monkeypatch):
    monkeypatch.setattr(gate, "get_into", lambda wanted, buffers: [Got.INTERRUPTED] * len(wanted))
    guard = guarded(gate, retries=2, timeout=5.0)
    assert list(guard.get_into(shards(2), blank(2))) == [Got.INTERRUPTED] * 2
    assert guard.stats()["store_made_calls"] == 3
    assert guard.stats()["store_failed_reads"] == 2
    assert guard.staging.free_bytes == STAGING_BYTES


def test_what_arrived_before_a_store_hung_counts(gate, guarded, monkeypatch):
    """What arrives after the deadline does not, though its bytes may be there."""
    size = 10_000

    def hang_in_between(wanted, buffers, arrived):
        results = list(gate._store.get_into(wanted[:2], buffers[:2]))
        arrived([0, 1])
        gate._pass()
        results += gate._store.get_into(wanted[2:], buffers[2:])
        arrived([2])
        return results

    monkeypatch.setattr(gate, "get_into", hang_in_between)
    gate._store.put_from(shards(3), payloads(3, size))
    guard = guarded(gate)
    gate.open.clear()
    seen: list[list[torch.Tensor]] = []
    with guard.load(
        shards(3), [size] * 3, arrived=lambda got: seen.append([got.buffer(at).clone() for at in range(got.run)])
    ) as loaded:
        assert loaded.results == [Got.LOADED, Got.LOADED, Got.FAILED]
        with pytest.raises(ValueError, match="released"):
            loaded.buffer(0)  # the call still has it
    gate.open.set()
    wait_for(lambda: guard.stats()["store_busy_threads"] == 0)
    assert len(seen) == 1
    assert all(torch.equal(seen[0][number], payload(number, size)) for number in range(2))
    assert guard.stats()["store_overdue_calls"] == 1
    assert guard.staging.free_bytes == STAGING_BYTES
    guard.staging.check_integrity()


def test_what_arrived_before_an_interruption_is_not_asked_for_again(gate, guarded, monkeypatch):
    asked: list[int] = []

    def interrupted_first(wanted, buffers, arrived):
        asked.append(len(wanted))
        results = list(gate._store.get_into(wanted, buffers))
        arrived([0])
        return results if len(asked) > 1 else [results[0], *[Got.INTERRUPTED] * (len(wanted) - 1)]

    monkeypatch.setattr(gate, "get_into", interrupted_first)
    gate._store.put_from(shards(3), payloads(3))
    runs: list[int] = []
    guard = guarded(gate, retries=3, timeout=5.0)
    with guard.load(shards(3), [10_000] * 3, arrived=lambda got: runs.append(got.run)) as loaded:
        assert loaded.run == 3
        assert all(torch.equal(loaded.buffer(number), payload(number)) for number in range(3))
    assert asked == [3, 2]
    assert runs == [1, 2]


def test_a_reaction_that_fails_is_raised_once_the_store_is_done(file_store, guarded):
    size = 3 << 20  # enough for the store to tell of some before it has all
    file_store.put_from(shards(2), payloads(2, size))
    guard = guarded(file_store, timeout=10.0)

    def fail(_) -> None:
        raise ArithmeticError

    with pytest.raises(ArithmeticError):
        guard.load(shards(2), [size] * 2, arrived=fail)
    assert guard.staging.free_bytes == STAGING_BYTES
    assert guard.stats()["store_circuit"] == "closed"


def test_closing_waits_for_nobody_who_hangs(gate, guarded):
    guard = guarded(gate)
    hang(gate, guard, lambda: guard.contains(shards(1)))
    guard.close(timeout_s=5.0)
    guard.close(timeout_s=5.0)
    gate.open.set()
    assert list(guard.contains(shards(1))) == [False]
    assert list(guard.get_into(shards(1), blank(1))) == [Got.FAILED]
    assert list(guard.put_from(shards(1), payloads(1))) == [Put.FAILED]
    assert guard.remove(shards(1)) is None


def test_closing_during_traffic_is_quiet(file_store, guarded):
    guard = guarded(file_store, timeout=10.0, write_timeout=10.0)
    guard.put_from(shards(4), payloads(4))
    errors: list[BaseException] = []
    stop = threading.Event()

    def traffic() -> None:
        try:
            while not stop.is_set():
                buffers = blank(4)
                for number, got in enumerate(guard.get_into(shards(4), buffers)):
                    assert got is not Got.LOADED or torch.equal(buffers[number], payload(number))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=traffic) for _ in range(3)]
    for thread in threads:
        thread.start()
    wait_for(lambda: guard.stats()["store_made_calls"] > 10)
    guard.close()
    stop.set()
    for thread in threads:
        thread.join()
    assert not errors
