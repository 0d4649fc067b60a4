"""Stores that are ended in the background, as those of GPUs are: on the host by the same means, and on a GPU where there is one."""

from __future__ import annotations

import threading

import pytest
import torch

from tests.engine.conftest import NUM_BLOCKS, eventually
from tests.engine.kv import CHUNK, fill, new_tensors, slots_of, wrong_blocks
from vcache.completions import Completions
from vcache.engine import VCacheEngine
from vcache.errors import UnavailableError
from vcache.pool.writing import PendingWrite

HERE, THERE = list(range(8)), [20, 19, 40, 41, 5, 63, 0, 30]
TOKENS = [7] * (4 * CHUNK)


@pytest.fixture
def device_is_done(monkeypatch) -> threading.Event:
    """No store is completed before it is set: as if the device were still at what was enqueued before."""
    event = threading.Event()
    complete = PendingWrite.complete

    def held_up(write: PendingWrite) -> int:
        assert event.wait(60)
        return complete(write)

    monkeypatch.setattr(PendingWrite, "complete", held_up)
    return event


@pytest.fixture
def engine(start_server, start_donor, open_engine, device) -> VCacheEngine:
    config, _ = start_server()
    start_donor(config, device=device)
    tensors = new_tensors(NUM_BLOCKS, device=device)
    fill(tensors, TOKENS, HERE)
    opened: VCacheEngine = open_engine(config, device=device, kv_caches=tensors)
    if not device.startswith("cuda"):
        opened._cache._completions = Completions(torch.device("cpu"))
    return opened


@pytest.fixture
def somebody_waits(monkeypatch) -> threading.Event:
    """Set when a call begins to wait for the stores before it."""
    event = threading.Event()
    wait = Completions.wait

    def noticed(completions: Completions, timeout_s: float) -> bool:
        event.set()
        return wait(completions, timeout_s)

    monkeypatch.setattr(Completions, "wait", noticed)
    return event


def test_whoever_stores_does_not_wait_but_finds_it(engine, open_engine, device, device_is_done, somebody_waits):
    other = open_engine(engine.config, device=device)
    engine.store(TOKENS, slot_mapping=slots_of(HERE))
    assert other.lookup(TOKENS) == 0
    found: list[int] = []
    looking = threading.Thread(target=lambda: found.append(engine.lookup(TOKENS)))
    looking.start()
    assert somebody_waits.wait(60)
    device_is_done.set()
    looking.join()
    assert found == [4 * CHUNK]
    loaded = new_tensors(NUM_BLOCKS, device=device)
    mask = engine.retrieve(TOKENS, kvcaches=loaded, slot_mapping=slots_of(THERE))
    assert mask.all() and not wrong_blocks(loaded, TOKENS, THERE, mask.tolist())
    assert engine.get_stats()["stored"] == 4


def test_after_a_flush_others_find_it(engine, open_engine, device, device_is_done):
    other = open_engine(engine.config, device=device)
    engine.store(TOKENS, slot_mapping=slots_of(HERE))
    assert not engine.flush(0.05), "it says that it was not done in time"
    device_is_done.set()
    assert engine.flush()
    assert other.lookup(TOKENS) == 4 * CHUNK


def test_closing_waits_for_what_was_stored(engine, open_engine, device, device_is_done):
    other = open_engine(engine.config, device=device)
    engine.store(TOKENS, slot_mapping=slots_of(HERE))
    closing = threading.Thread(target=engine.close)
    closing.start()
    device_is_done.set()
    closing.join()
    eventually(lambda: other.lookup(TOKENS) == 4 * CHUNK, "the server has read of it")
    engine.store(TOKENS, slot_mapping=slots_of(HERE))
    assert engine.lookup(TOKENS) == 0, "a closed engine is an empty cache"


def test_where_a_broken_device_has_no_stream_to_give_a_store_is_ended_all_the_same(
    start_server, start_donor, open_engine, monkeypatch
):
    config, _ = start_server()
    start_donor(config)
    tensors = new_tensors(NUM_BLOCKS)
    fill(tensors, TOKENS, HERE)
    engine = open_engine(config, device="cpu:0", kv_caches=tensors)
    engine._cache._completions = Completions(torch.device("cpu"))

    def broken(device: torch.device) -> None:
        raise UnavailableError("cuCtxPushCurrent: CUDA_ERROR_ILLEGAL_ADDRESS")

    monkeypatch.setattr("vcache.completions.aside_on", broken)
    engine.store(TOKENS, slot_mapping=slots_of(HERE))
    engine.flush()
    stats = engine.get_stats()
    assert (stats["store_calls"], stats["server_reservations"]) == (1, 0)
