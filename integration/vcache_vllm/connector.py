"""VCacheConnector: vLLM's connector interface on one side, ``scheduler_side.py`` and ``worker_side.py`` on the other.

vLLM makes it twice, once in each worker and once in its scheduler. A bad option raises when it is made; after that nothing
raised by the pool, the server or our own mistakes reaches the engine: it becomes a miss, a counter and a line in the log.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Final, TypeVar

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorRole,
    SupportsHMA,
)
from vllm.v1.metrics.cache_hit_source import CacheHitSource

from vcache.engine import UNCONFIRMED, VCacheEngine
from vcache.errors import CapacityError, ConfigError
from vcache.failures import FailureLog
from vcache.log import configure
from vcache_vllm.counters import ConnectorCounters
from vcache_vllm.events import PoolEvents
from vcache_vllm.metadata import StepOrders, StepReport, StoreOrder, WorkerIntroduction
from vcache_vllm.metrics import VCachePromMetrics, VCacheStats
from vcache_vllm.model_spec import layer_specs, reason_to_decline
from vcache_vllm.options import ConnectorOptions
from vcache_vllm.parallel import this_place
from vcache_vllm.prompt_keys import KeySource
from vcache_vllm.scheduler_side import SchedulerRules, SchedulerSide
from vcache_vllm.worker_side import WorkerSide

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.distributed.kv_events import KVCacheEvent
    from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats
    from vllm.forward_context import ForwardContext
    from vllm.v1.attention.backend import AttentionMetadata
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

logger: Final = logging.getLogger(__name__)
T = TypeVar("T")


class VCacheConnector(KVConnectorBase_V1, SupportsHMA):
    """Loads prefixes from the pool before vLLM computes them, and stores the prompts' chunks that it computes.

    vLLM may keep its hybrid KV cache manager on beside it; what that makes several groups of is declined.

    Raises ``ConfigError`` from its constructor when an option in ``kv_connector_extra_config`` is wrong.
    """

    _cache_hit_source = CacheHitSource.P2P

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        transfer = self._kv_transfer_config
        self._options = ConnectorOptions.of(
            transfer.kv_connector_extra_config, block_size=vllm_config.cache_config.block_size
        )
        configure(self._options.config.log_level, "vllm")  # both roles may live in one process
        self._failures = FailureLog(logger)
        self._scheduler: SchedulerSide | None = None
        self._scheduler_counters = ConnectorCounters()
        self._events: PoolEvents | None = None
        self._worker: WorkerSide | None = None
        self._report: StepReport | None = None
        self._invalid_blocks: set[int] = set()
        self._engine: VCacheEngine | None = None  # the scheduler's
        self._block_pool: BlockPool | None = None
        if role is KVConnectorRole.WORKER:
            self._worker = WorkerSide(self._options, self._failures)
        elif transfer.kv_load_failure_policy != "recompute":
            logger.warning(
                "kv_load_failure_policy is %r: a request whose KV cannot be loaded will fail; set it to 'recompute'",
                transfer.kv_load_failure_policy,
            )

    @property
    def requires_kv_delivery(self) -> bool:
        return False  # a cache: a store that did not happen is a later miss

    def stats(self) -> dict[str, Any]:
        """The worker's figures once what was begun is done: ``VCacheEngine.get_stats``, and ``connector_*`` of our own."""
        return self._worker.stats() if self._worker is not None else {"connector_errors": self._failures.total}

    # The worker's side.

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Joins the pool with vLLM's KV tensors. Raises ``ConfigError`` or ``CapacityError``: this is still construction."""
        worker = self._the_worker
        if reason := reason_to_decline(self._vllm_config, self._kv_cache_config):
            worker.decline(reason)
            return
        try:
            place = this_place(self._vllm_config, layer_specs(self._kv_cache_config.kv_cache_groups[0]))
            worker.register(kv_caches, self._vllm_config, self._kv_cache_config, place)
        except (ConfigError, CapacityError):
            raise
        except Exception as error:
            self._failures.record("register_kv_caches", error)
            worker.decline(f"joining the pool failed: {error}")

    def get_handshake_metadata(self) -> KVConnectorHandshakeMetadata | None:
        return self._the_worker.introduction

    def handle_preemptions(self, kv_connector_metadata: KVConnectorMetadata) -> None:
        """The first call in a step, before any block is written."""
        assert isinstance(kv_connector_metadata, StepOrders)
        self._shielded("before_step", None, lambda: self._the_worker.before_step(kv_connector_metadata))

    def start_load_kv(self, forward_context: ForwardContext, **kwargs: Any) -> None:
        self._the_worker.load(self._orders())

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing to wait for: ``start_load_kv`` returns when the bytes are there."""

    def save_kv_layer(
        self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: AttentionMetadata, **kwargs: Any
    ) -> None:
        """Nothing to do by layers: ``wait_for_save`` stores whole chunks."""

    def wait_for_save(self) -> None:
        self._shielded("after_step", None, lambda: self._the_worker.after_step(self._orders()))

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        """The first of vLLM's questions after a step; what it asks next is of the same moment."""
        self._report, loaded, self._invalid_blocks = self._the_worker.take_results()
        return None, loaded

    def get_block_ids_with_load_errors(self) -> set[int]:
        return self._invalid_blocks

    def build_connector_worker_meta(self) -> StepReport | None:
        return self._report

    # The scheduler's side.

    def set_xfer_handshake_metadata_pp_aware(
        self, metadata: dict[tuple[int, int], KVConnectorHandshakeMetadata]
    ) -> None:
        """The workers have seen their KV tensors: only now is it known what may be shared, and with whom."""
        introductions = [item for item in metadata.values() if isinstance(item, WorkerIntroduction)]
        models = {item.model for item in introductions}
        reason = next((item.reason for item in introductions if item.model is None), "")
        if len(models) != 1:
            reason = reason or "its ranks describe their KV differently"
        model = next(iter(models), None)
        if reason or model is None:
            logger.warning("VCache takes no part in this engine: %s", reason or "no worker introduced itself")
            return
        options, transfer, cache = self._options, self._kv_transfer_config, self._vllm_config.cache_config
        self._engine = VCacheEngine(options.config, model=model, role="scheduler")
        announced = self._vllm_config.kv_events_config
        if announced is not None and announced.enable_kv_cache_events:
            self._events = PoolEvents(chunk_size=model.chunk_size, block_size=model.block_size)
        self._scheduler = SchedulerSide(
            self._engine,
            model,
            KeySource(model, hash_name=cache.prefix_caching_hash_algo),
            SchedulerRules(
                lease_s=options.config.client.lease,
                loads=transfer.is_kv_consumer,
                stores=transfer.is_kv_producer,
                load_async=options.load_async,
                store_decoded=options.store_decoded,
            ),
            self._scheduler_counters,
            self._events,
        )

    def bind_gpu_block_pool(self, gpu_block_pool: BlockPool) -> None:
        self._block_pool = gpu_block_pool

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int | None, bool]:
        scheduler = self._scheduler
        if scheduler is None:
            return 0, False
        tokens = self._shielded("lookup", 0, lambda: scheduler.loadable_tokens(request, num_computed_tokens))
        return tokens, self._options.load_async and tokens > 0

    def update_state_after_alloc(self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int) -> None:
        scheduler = self._scheduler
        if scheduler is None:
            return
        if num_external_tokens:
            (table,) = blocks.get_block_ids()
            scheduler.allocated(request.request_id, table, num_external_tokens)
        else:
            self._shielded("passed_over", None, lambda: scheduler.passed_over(request.request_id))

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        scheduler = self._scheduler
        if scheduler is None:
            return StepOrders()
        no_stores: tuple[StoreOrder, ...] = ()
        stores = self._shielded("plan", no_stores, lambda: scheduler.stores_of(scheduler_output))
        return scheduler.orders(scheduler_output, stores)

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        scheduler = self._scheduler
        if scheduler is None:
            return
        report = connector_output.kv_connector_worker_meta
        assert report is None or isinstance(report, StepReport)
        invalid = connector_output.invalid_block_ids
        self._shielded("update_connector_output", None, lambda: scheduler.step_done(report, invalid, self._evict))

    def request_finished_all_groups(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """Never holds back blocks: what is being stored has left them."""
        scheduler = self._scheduler
        if scheduler is not None:
            self._shielded("request_finished", None, lambda: scheduler.finished(request.request_id))
        return False, None

    def take_events(self) -> Iterable[KVCacheEvent]:
        return self._events.take() if self._events is not None else ()

    def reset_cache(self) -> bool:
        """Removes everything from the pool, for all its users: vLLM asks for it when weights have changed.

        False when that cannot be promised: the server does not confirm it, or a store below the pool keeps what it has.
        """
        engine, scheduler = self._engine, self._scheduler
        if engine is None or scheduler is None:
            return True
        return self._shielded("reset_cache", False, lambda: _cleared(engine, scheduler))

    # Both sides.

    def get_kv_connector_stats(self) -> KVConnectorStats | None:
        """What this side has counted since it was last asked."""
        if self._worker is not None:
            counts = self._worker.take_counts()
        else:
            counts = self._scheduler_counters.take(errors=self._failures.total)
        return VCacheStats(data=counts) if counts else None

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> KVConnectorStats | None:
        return VCacheStats(data=data or {})

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: VllmConfig,
        metric_types: dict[type[Any], type[Any]],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> KVConnectorPromMetrics | None:
        return VCachePromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    def shutdown(self) -> None:
        if self._worker is not None:
            self._shielded("shutdown", None, self._worker.close)
        if self._engine is not None:
            self._shielded("shutdown", None, self._engine.close)

    @property
    def _the_worker(self) -> WorkerSide:
        assert self._worker is not None
        return self._worker

    def _orders(self) -> StepOrders:
        orders = self._get_connector_metadata()
        assert isinstance(orders, StepOrders)
        return orders

    def _evict(self, blocks: set[int]) -> None:
        if self._block_pool is not None:
            self._block_pool.evict_blocks(blocks)

    def _shielded(self, operation: str, otherwise: T, call: Callable[[], T]) -> T:
        try:
            return call()
        except Exception as error:
            self._failures.record(operation, error)
            return otherwise


def _cleared(engine: VCacheEngine, scheduler: SchedulerSide) -> bool:
    if engine.config.store.resolved_kind != "none":
        logger.warning("reset of the connector's cache refused: the store below the pool keeps its objects")
        return False
    removed = engine.clear()
    scheduler.forget_lookups()
    return removed != UNCONFIRMED
