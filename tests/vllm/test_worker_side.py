"""The worker's side over a real pool whose server answers late: what was asked for and not copied ends with a reset, and with the worker."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from vcache_vllm import stores
from vcache_vllm.metadata import StepOrders, StoreOrder
from vcache_vllm.options import ConnectorOptions
from vcache_vllm.parallel import RankPlace
from vcache_vllm.worker_side import WorkerSide

from tests.engine.conftest import donate
from tests.support.processes import PATIENCE_S, Child, Processes
from tests.vllm.configurations import BLOCK_SIZE, engine_config, kv_cache_config, kv_caches, save_model
from vcache.config import VCacheConfig
from vcache.failures import FailureLog
from vcache.keys import chunk_keys
from vcache.protocol import ServerStats
from vcache.server_query import fetch_stats

pytestmark = pytest.mark.vllm


class Late(NamedTuple):
    """A worker, one of whose stores was answered only after its forward pass."""

    side: WorkerSide
    config: VCacheConfig

    def server(self) -> ServerStats:
        return fetch_stats(self.config, timeout_s=PATIENCE_S)


@pytest.fixture
def late(
    config: VCacheConfig, server: Child, processes: Processes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Late]:
    monkeypatch.setattr(stores, "HOLD_S", PATIENCE_S)
    donate(processes, config)
    save_model(tmp_path)
    options = ConnectorOptions.of(
        {"runtime_dir": config.runtime_dir, "chunk_size": BLOCK_SIZE, "client": {"call_timeout": "60s"}},
        block_size=BLOCK_SIZE,
    )
    side = WorkerSide(options, FailureLog(logging.getLogger(__name__)))
    side.register(kv_caches(), engine_config(tmp_path), kv_cache_config(), RankPlace(0, 1, 1))
    model = side.introduction.model
    assert model is not None, side.introduction.reason
    (key,) = chunk_keys(list(range(BLOCK_SIZE)), chunk_size=BLOCK_SIZE, fingerprint=model.fingerprint())
    order = StoreOrder("a request", (key,), None, np.array([[1]], dtype=np.int64), "")
    server.suspend()
    side.before_step(StepOrders(stores=(order,)))
    side.after_step(StepOrders(stores=(order,)))
    server.resume()
    side.stats()  # once the lanes have done what they had to do
    assert fetch_stats(config, timeout_s=PATIENCE_S).reservations == 1
    yield Late(side, config)
    side.close()


def test_a_late_store_is_made_after_the_next_step(late: Late) -> None:
    late.side.before_step(StepOrders())
    late.side.after_step(StepOrders())
    assert late.side.stats()["connector_stored_chunks"] == 1
    assert late.server().entries == 1


def test_a_late_store_from_before_a_reset_is_not_made(late: Late) -> None:
    late.side.before_step(StepOrders(resets=1, gone=frozenset({"a request"})))
    late.side.after_step(StepOrders(resets=1))
    assert late.side.stats()["connector_stored_chunks"] == 0
    assert (late.server().entries, late.server().reservations) == (0, 0)


def test_a_worker_that_ends_leaves_no_late_store_behind(late: Late) -> None:
    late.side.close()
    stats = late.server()
    assert (stats.reservations, stats.sessions) == (0, 1), "only the donor's session is left"
