"""The connector's counters in vLLM's log lines and Prometheus metrics, through vLLM's own hooks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import prometheus_client
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

from vcache_vllm.counters import CONNECTOR_COUNTERS


class VCacheStats(KVConnectorStats):
    """What was counted in an interval, by the names of ``CONNECTOR_COUNTERS``; summed over the ranks."""

    def reset(self) -> None:
        self.data: dict[str, Any] = {}

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        total: Counter[str] = Counter(self.data)
        total.update(other.data)
        return VCacheStats(data=dict(total))

    def reduce(self) -> dict[str, int | float]:
        return {name: round(amount, 6) for name, amount in sorted(self.data.items())}

    def is_empty(self) -> bool:
        return not self.data


class VCachePromMetrics(KVConnectorPromMetrics):
    """A Prometheus counter ``vllm:vcache_<name>`` for each of ``CONNECTOR_COUNTERS``, by engine."""

    def __init__(
        self,
        vllm_config: Any,
        metric_types: Mapping[type, type],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        counter: Any = metric_types[prometheus_client.Counter]
        metrics = {
            name: counter(name=f"vllm:vcache_{name}", documentation=f"VCache: {meaning}.", labelnames=labelnames)
            for name, meaning in CONNECTOR_COUNTERS.items()
        }
        self._metrics = {
            (engine, name): metric.labels(*labels)
            for engine, labels in per_engine_labelvalues.items()
            for name, metric in metrics.items()
        }

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        for name, amount in transfer_stats_data.items():
            self._metrics[engine_idx, name].inc(amount)
