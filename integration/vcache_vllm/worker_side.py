"""The connector in vLLM's worker: which chunks are loaded and stored around a forward pass.

Nothing raised here leaves: see ``connector.py``. Not here: how a load is made (``loads.py``), how a store waits for nobody
(``stores.py``).
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Final

import torch

from vcache.engine import VCacheEngine
from vcache.paged_kv import PagedKV
from vcache_vllm.counters import ConnectorCounters
from vcache_vllm.lane import FLUSH_TIMEOUT_S, Lane
from vcache_vllm.loads import Loads
from vcache_vllm.metadata import StepOrders, StepReport, WorkerIntroduction
from vcache_vllm.model_spec import model_spec
from vcache_vllm.parallel import RankPlace
from vcache_vllm.stores import Stores

if TYPE_CHECKING:
    from vcache.failures import FailureLog
    from vcache_vllm.options import ConnectorOptions

logger: Final = logging.getLogger(__name__)
#: How long the end of the engine may take to finish what it was storing.
CLOSE_TIMEOUT_S: Final = 10.0


class WorkerSide:
    """One rank's KV tensors and its engine; made before the tensors exist, useless until they are registered."""

    def __init__(self, options: ConnectorOptions, failures: FailureLog) -> None:
        self._options = options
        self._failures = failures
        self._counters = ConnectorCounters()
        self._engine: VCacheEngine | None = None
        self._lanes: list[Lane] = []
        self._loads: Loads | None = None
        self._stores: Stores | None = None
        self.introduction = WorkerIntroduction(None, "the KV tensors were never registered")
        self._failed_steps = 0
        self._reported_failures = 0
        self._resets = 0

    def register(
        self, kv_caches: dict[str, torch.Tensor], vllm_config: Any, kv_cache_config: Any, place: RankPlace
    ) -> None:
        """Maps the tensors and joins the pool.

        Raises ``ConfigError`` when a setting cannot work with this model, ``CapacityError`` when there is not the memory to
        donate.
        """
        block_size, chunk_size = self._options.config.block_size, self._options.config.chunk_size
        try:
            kv = PagedKV(kv_caches, block_size=block_size, num_blocks=kv_cache_config.num_blocks)
        except ValueError as error:
            self.decline(f"its KV tensors cannot be mapped: {error}")
            return
        weights = self._options.weights
        model = model_spec(
            vllm_config, kv_cache_config, place, chunk_size=chunk_size, layout=kv.layout, weights=weights
        )
        self._engine = VCacheEngine(
            self._options.config,
            model=model,
            role="worker",
            rank=place.rank,
            device=self._options.device or str(kv.device),
            donate="auto" if self._options.donate else None,
        )
        self._engine.register_kv_caches(kv)
        if kv.device.type == "cuda":
            from vcache.pool.enqueued_records import prepare  # needs triton

            with self._failures.contained("prepare"):  # here, and not in a forward pass
                prepare(kv)
        loading, storing = (Lane(name, kv.device, self._failures) for name in ("load", "store"))
        reserving = Lane("reserve", torch.device("cpu"), self._failures)
        self._lanes = [loading, reserving, storing]
        chunk_bytes = kv.payload_bytes(model.blocks_per_chunk)
        self._loads = Loads(self._engine, loading, self._counters, self._failures, chunk_bytes=chunk_bytes)
        if place.stores:
            self._stores = Stores(self._engine, reserving, storing, self._counters, chunk_bytes=chunk_bytes)
        self.introduction = WorkerIntroduction(model)
        logger.info("VCache shares the KV of this worker, rank %d of %d: %s", place.rank, model.ranks, kv.describe())

    def decline(self, reason: str) -> None:
        """Stays out of the pool; serving goes on as if VCache were not there."""
        self.introduction = WorkerIntroduction(None, reason)

    def before_step(self, orders: StepOrders) -> None:
        """Before anything of a step is written."""
        if self._stores is not None:
            if orders.resets != self._resets:  # what was planned before has no place in the pool any more
                self._resets = orders.resets
                self._stores.give_back()
            stores = orders.stores if orders.failures_seen >= self._failed_steps else ()
            self._stores.before_step(stores, orders.gone)

    def load(self, orders: StepOrders) -> None:
        """Loads what the step needs, and begins to load what others wait for."""
        if self._loads is not None:
            failed = [order for order in orders.loads if not self._loads.load(order)]
            self._failed_steps += bool(failed)
            for order in orders.background_loads:
                self._loads.load_behind(order)

    def after_step(self, orders: StepOrders) -> None:
        """Stores what the step completed, unless it, or one planned before its failure was known, computed on garbage."""
        if self._stores is None:
            return
        if orders.failures_seen < self._failed_steps:
            self._stores.abandon_step()
        else:
            self._stores.after_step()

    def take_results(self) -> tuple[StepReport | None, set[str], set[int]]:
        """What the scheduler side should know, if anything; requests whose background loads are over; blocks not loaded."""
        if self._loads is None:
            return None, set(), set()
        over, behind = self._loads.take_over()
        invalid = self._loads.take_invalid_blocks()
        stored = self._stores.take_stored() if self._stores is not None else frozenset()
        report = None
        if over or stored or self._reported_failures != self._failed_steps:
            self._reported_failures = self._failed_steps
            report = StepReport(over, stored, self._failed_steps)
        return report, behind, invalid

    def take_counts(self) -> dict[str, float]:
        """What was counted since the last call."""
        return self._counters.take(errors=self._failures.total)

    def stats(self) -> dict[str, Any]:
        """Once what was begun is done: the engine's figures (``VCacheEngine.get_stats``), and ``connector_*`` of our own."""
        for lane in self._lanes:
            lane.flush(FLUSH_TIMEOUT_S)
        figures = dict(self._engine.get_stats()) if self._engine is not None else {}
        own = {f"connector_{name}": value for name, value in self._counters.snapshot().items()}
        return {**figures, **own, "connector_errors": self._failures.total}

    def close(self) -> None:
        """Finishes what was copied, gives back what was not, and leaves the pool; harmless when done before."""
        if self._stores is not None:
            self._stores.give_back()
        for lane in self._lanes:
            lane.close(CLOSE_TIMEOUT_S)
        if self._engine is not None:
            self._engine.close()
