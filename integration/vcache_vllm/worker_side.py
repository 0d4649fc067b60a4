"""The connector in vLLM's worker: loads chunks before the forward pass that needs them, stores those that it completed.

A load that fails is reported by its blocks, so that vLLM computes exactly those. Nothing raised here leaves: see
``connector.py``.
"""

from __future__ import annotations

import logging
from typing import Any, Final

import torch

from vcache.engine import VCacheEngine
from vcache.failures import FailureLog
from vcache.keys import format_key
from vcache.paged_kv import PagedKV
from vcache_vllm.metadata import LoadOrder, StepOrders, StepReport, StoreOrder, WorkerIntroduction
from vcache_vllm.model_spec import model_spec
from vcache_vllm.options import ConnectorOptions

logger: Final = logging.getLogger(__name__)


class WorkerSide:
    """One rank's KV tensors and its engine; made before the tensors exist, useless until they are registered."""

    def __init__(self, options: ConnectorOptions, failures: FailureLog) -> None:
        self._options = options
        self._failures = failures
        self._engine: VCacheEngine | None = None
        self.introduction = WorkerIntroduction(None, "the KV tensors were never registered")
        self._loaded: set[str] = set()
        self._invalid_blocks: set[int] = set()
        self._failed_steps = 0
        self._reported_failures = 0

    def register(self, kv_caches: dict[str, torch.Tensor], vllm_config: Any, kv_cache_config: Any) -> None:
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
        model = model_spec(vllm_config, kv_cache_config, chunk_size=chunk_size, layout=kv.layout)
        self._engine = VCacheEngine(
            self._options.config,
            model=model,
            role="worker",
            device=self._options.device or str(kv.device),
            donate="auto" if self._options.donate else None,
        )
        self._engine.register_kv_caches(kv)
        self.introduction = WorkerIntroduction(model)
        logger.info("VCache shares this worker's KV: %s", kv.describe())

    def decline(self, reason: str) -> None:
        """Stays out of the pool; serving goes on as if VCache were not there."""
        self.introduction = WorkerIntroduction(None, reason)

    def load(self, orders: StepOrders) -> None:
        """Loads what the step needs; returns when the bytes are there, or noted as failed."""
        for order in orders.loads:
            loaded = self._load(order)
            self._loaded.add(order.request_id)
            missing = set(order.blocks[loaded:].ravel().tolist()[order.kept if not loaded else 0 :])
            if missing:
                self._failed_steps += not self._invalid_blocks
                self._invalid_blocks |= missing

    def store(self, orders: StepOrders) -> None:
        """Stores what the step completed, unless it, or one planned before its failure was known, computed on garbage."""
        if orders.failures_seen < self._failed_steps:
            return
        for order in orders.stores:
            self._store(order)

    def take_invalid_blocks(self) -> set[int]:
        """The blocks whose load failed in this step."""
        taken, self._invalid_blocks = self._invalid_blocks, set()
        return taken

    def take_report(self) -> StepReport | None:
        """What the scheduler side should know; None when there is nothing."""
        if not self._loaded and self._reported_failures == self._failed_steps:
            return None
        loaded, self._loaded = frozenset(self._loaded), set()
        self._reported_failures = self._failed_steps
        return StepReport(loaded, self._failed_steps)

    def stats(self) -> dict[str, Any]:
        """The engine's figures (``VCacheEngine.get_stats``) and the errors that were kept from vLLM."""
        figures = dict(self._engine.get_stats()) if self._engine is not None else {}
        return {**figures, "connector_errors": self._failures.total}

    def close(self) -> None:
        """Leaves the pool; harmless when done before."""
        if self._engine is not None:
            self._engine.close()

    def _load(self, order: LoadOrder) -> int:
        """How many leading chunks of the order were loaded."""
        loaded = 0
        try:
            loaded = self._retrieve(order)
        except Exception as error:
            self._failures.record("load", error)
        if loaded < len(order.keys):
            logger.warning(
                "%d of %d chunks of request %s could not be loaded, from %s on; vLLM computes them",
                len(order.keys) - loaded,
                len(order.keys),
                order.request_id,
                format_key(order.keys[loaded]),
            )
        return loaded

    def _retrieve(self, order: LoadOrder) -> int:
        """A payload is loaded whole, but the first ``kept`` blocks of the first chunk are not ours to write.

        What belongs there goes into blocks of the second chunk, which is loaded over it afterwards.
        """
        assert self._engine is not None
        if not order.kept:
            return self._engine.begin_retrieve(order.keys, order.blocks).complete()
        edge = order.blocks[:1].copy()
        edge[0, : order.kept] = order.blocks[1, : order.kept]
        if not self._engine.begin_retrieve(order.keys[:1], edge).complete():
            return 0
        return 1 + self._engine.begin_retrieve(order.keys[1:], order.blocks[1:]).complete()

    def _store(self, order: StoreOrder) -> None:
        assert self._engine is not None
        try:
            self._engine.begin_store(order.keys, order.blocks, parent=order.parent, salt=order.salt).complete()
        except Exception as error:
            self._failures.record("store", error)
