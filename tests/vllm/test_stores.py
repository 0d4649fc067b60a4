"""Stores ask the server before a forward pass and copy after it; an answer that is late is used as long as the blocks last."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from vcache_vllm import stores
from vcache_vllm.counters import ConnectorCounters
from vcache_vllm.lane import Lane
from vcache_vllm.metadata import StoreOrder
from vcache_vllm.stores import Stores

from tests.engine.conftest import donate
from tests.engine.kv import BLOCK, CHUNK, fill, model_of, new_tensors, wrong_blocks
from tests.support.processes import PATIENCE_S, Child, Processes
from vcache.config import VCacheConfig
from vcache.engine import VCacheEngine
from vcache.failures import FailureLog
from vcache.keys import ChunkKey
from vcache.pending import PendingStore
from vcache.server_query import fetch_stats

pytestmark = pytest.mark.vllm

TOKENS = list(range(2 * CHUNK))
PER_CHUNK = CHUNK // BLOCK
BLOCKS = np.arange(2 * PER_CHUNK, dtype=np.int64).reshape(2, PER_CHUNK)


class GatedEngine(VCacheEngine):
    """The real engine; the server's answers wait at a gate."""

    gate: threading.Event

    def reserve_store(self, keys: Sequence[ChunkKey], parent: ChunkKey | None = None, **options: Any) -> PendingStore:
        pending = super().reserve_store(keys, parent, **options)
        assert self.gate.wait(PATIENCE_S)
        return pending


class Worker(NamedTuple):
    engine: GatedEngine
    stores: Stores
    asking: Lane
    committing: Lane
    counters: ConnectorCounters
    tensors: dict[str, torch.Tensor]
    order: Callable[[str], StoreOrder]

    def stored(self) -> int:
        """Chunks in the pool once everything begun is done."""
        assert self.asking.flush(PATIENCE_S) and self.committing.flush(PATIENCE_S)
        return self.engine.lookup(TOKENS) // CHUNK

    def intact(self) -> bool:
        """Whether what is in the pool is the prompt's KV."""
        slots = np.arange(2 * CHUNK) + 2 * CHUNK  # the blocks after the prompt's own
        loaded = self.engine.retrieve(TOKENS, slot_mapping=slots)
        blocks = list(range(2 * PER_CHUNK, 4 * PER_CHUNK))
        return bool(loaded.all()) and not wrong_blocks(self.tensors, TOKENS, blocks, loaded.tolist())


@pytest.fixture
def worker(
    config: VCacheConfig, server: Child, processes: Processes, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Worker]:
    monkeypatch.setattr(stores, "HOLD_S", PATIENCE_S)
    donate(processes, config)
    tensors = new_tensors(8 * PER_CHUNK)
    fill(tensors, TOKENS, BLOCKS.ravel().tolist())
    with GatedEngine(config, model=model_of(), kv_caches=tensors) as engine:
        engine.gate = threading.Event()
        failures = FailureLog(logging.getLogger(__name__))
        asking, committing = (Lane(name, torch.device("cpu"), failures) for name in ("reserve", "store"))
        counters = ConnectorCounters()
        keys = tuple(engine.keys_of(TOKENS))
        yield Worker(
            engine,
            Stores(engine, asking, committing, counters, chunk_bytes=1),
            asking,
            committing,
            counters,
            tensors,
            lambda name: StoreOrder(name, keys, None, BLOCKS, ""),
        )
        engine.gate.set()
        asking.close(PATIENCE_S)
        committing.close(PATIENCE_S)


def answered(worker: Worker) -> None:
    """Opens the gate, and waits until all answers have passed it."""
    worker.engine.gate.set()
    assert worker.asking.flush(PATIENCE_S)


def test_what_was_granted_before_the_forward_pass_ends_is_stored_after_it(worker: Worker) -> None:
    worker.stores.before_step([worker.order("a")], frozenset())
    answered(worker)
    worker.stores.after_step()
    assert worker.stored() == 2
    assert worker.stores.take_stored() == frozenset(worker.engine.keys_of(TOKENS))
    assert worker.intact()


def test_a_late_answer_is_used_after_a_later_step(worker: Worker) -> None:
    worker.stores.before_step([worker.order("a")], frozenset())
    worker.stores.after_step()
    worker.stores.before_step([], frozenset())
    answered(worker)
    worker.stores.after_step()
    assert worker.stored() == 2
    assert worker.intact()


def test_blocks_given_away_are_copied_before_they_are_overwritten_or_not_at_all(worker: Worker) -> None:
    worker.stores.before_step([worker.order("late")], frozenset())
    worker.stores.after_step()
    worker.stores.before_step([], frozenset({"late"}))
    fill(worker.tensors, TOKENS[::-1], BLOCKS.ravel().tolist())  # another request's
    answered(worker)
    worker.stores.after_step()
    assert worker.stored() == 0
    assert worker.counters.snapshot()["late_chunks"] == 2

    fill(worker.tensors, TOKENS, BLOCKS.ravel().tolist())
    worker.engine.gate.clear()
    worker.stores.before_step([worker.order("in time")], frozenset())
    worker.stores.after_step()
    answered(worker)
    worker.stores.before_step([], frozenset({"in time"}))
    fill(worker.tensors, TOKENS[::-1], BLOCKS.ravel().tolist())
    assert worker.stored() == 2
    assert worker.intact()


def test_a_step_that_computed_on_garbage_stores_nothing_and_gives_back_its_space(worker: Worker) -> None:
    worker.engine.gate.set()
    worker.stores.before_step([worker.order("a")], frozenset())
    worker.stores.abandon_step()
    assert worker.stored() == 0
    worker.stores.before_step([worker.order("a")], frozenset())
    answered(worker)
    worker.stores.after_step()
    assert worker.stored() == 2


def test_space_is_not_held_for_a_forward_pass_that_does_not_come(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stores, "HOLD_S", 0.1)
    worker.stores.before_step([worker.order("late")], frozenset())
    worker.stores.after_step()
    answered(worker)
    assert worker.engine.clear() == 0, "it is confirmed once the space was given back"
    worker.stores.after_step()
    assert worker.stored() == 0
    assert worker.counters.snapshot()["late_chunks"] == 2


def test_closing_gives_back_what_was_answered_late(worker: Worker, config: VCacheConfig) -> None:
    worker.stores.before_step([worker.order("late")], frozenset())
    worker.stores.after_step()
    answered(worker)
    assert fetch_stats(config, timeout_s=PATIENCE_S).reservations == 2
    worker.stores.give_back()
    worker.asking.close(PATIENCE_S)
    worker.committing.close(PATIENCE_S)
    worker.engine.close(PATIENCE_S)
    stats = fetch_stats(config, timeout_s=PATIENCE_S)
    assert (stats.reservations, stats.sessions) == (0, 1), "only the donor's session is left"
