"""What a load brings back from the store enters the pool as what it was stored as: the tenant's, after its parent."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from vcache_vllm.counters import ConnectorCounters
from vcache_vllm.lane import Lane
from vcache_vllm.loads import Loads
from vcache_vllm.metadata import LoadOrder

from tests.engine.conftest import donate, eventually
from tests.engine.kv import BLOCK, CHUNK, fill, model_of, new_tensors, slots_of
from tests.support.processes import PATIENCE_S, Child, Processes
from vcache.config import VCacheConfig
from vcache.engine import VCacheEngine
from vcache.failures import FailureLog

pytestmark = pytest.mark.vllm

TOKENS = list(range(3 * CHUNK))
PER_CHUNK = CHUNK // BLOCK
HERE = list(range(3 * PER_CHUNK))
THERE = np.arange(3 * PER_CHUNK, 6 * PER_CHUNK, dtype=np.int64).reshape(3, PER_CHUNK)


@pytest.fixture
def engine(config: VCacheConfig, server: Child, processes: Processes, tmp_path: Path) -> Iterator[VCacheEngine]:
    donate(processes, config)
    below = VCacheConfig(runtime_dir=config.runtime_dir, store={"files": {"directory": str(tmp_path / "store")}})
    with VCacheEngine(below, model=model_of(), kv_caches=new_tensors(8 * PER_CHUNK)) as engine:
        yield engine


@pytest.mark.parametrize(
    ("first", "kept"), [(0, 0), (1, 0), (0, 1)], ids=["from the start", "after local ones", "edge"]
)
def test_what_is_promoted_belongs_to_the_salt_it_was_stored_under(engine: VCacheEngine, first: int, kept: int) -> None:
    tensors = new_tensors(8 * PER_CHUNK)
    fill(tensors, TOKENS, HERE, salt="tenant")
    engine.store(TOKENS, kvcaches=tensors, slot_mapping=slots_of(HERE), salt="tenant")
    assert engine.flush(PATIENCE_S)
    assert engine.clear() == 3
    keys = engine.keys_of(TOKENS, salt="tenant")
    lane = Lane("load", torch.device("cpu"), FailureLog(logging.getLogger(__name__)))
    loads = Loads(engine, lane, ConnectorCounters(), FailureLog(logging.getLogger(__name__)), chunk_bytes=1)
    order = LoadOrder("a", tuple(keys[first:]), THERE[first:], kept, keys[first - 1] if first else None, "tenant")

    assert loads.load(order)

    eventually(lambda: engine.get_stats()["promoted_from_store"] == 3 - first, "promotion")
    assert engine.clear(salt="another") == 0
    assert engine.clear(salt="tenant") == 3 - first
    lane.close(PATIENCE_S)
