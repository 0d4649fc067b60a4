"""What passes between the two sides of the connector, through vLLM: plain values only, so that any executor can carry it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorWorkerMetadata,
)

from vcache.keys import ChunkKey, ModelSpec

BlockIds = npt.NDArray[np.int64]


@dataclass(frozen=True)
class LoadOrder:
    """Consecutive chunks to be loaded for one request; ``parent`` is the key before them.

    ``blocks[i, j]`` takes the j-th block of chunk ``i``. The first ``kept`` blocks of the first chunk are there already (a
    local hit, perhaps shared with others) and must not be touched; there is then a second chunk. ``keys`` is empty for an
    order that can only fail.
    """

    request_id: str
    keys: tuple[ChunkKey, ...]
    blocks: BlockIds
    kept: int = 0
    parent: ChunkKey | None = None
    salt: str = ""


@dataclass(frozen=True)
class StoreOrder:
    """Consecutive chunks of one request that this step's forward pass completes; ``parent`` is the key before them."""

    request_id: str
    keys: tuple[ChunkKey, ...]
    parent: ChunkKey | None
    blocks: BlockIds
    salt: str


@dataclass(frozen=True)
class StepOrders(KVConnectorMetadata):
    """One step's work.

    loads: needed by this step's forward pass. background_loads: of requests that wait outside of the steps.
    gone: requests that had stores ordered and whose blocks may be overwritten from this step's forward pass on.
    failures_seen: how many failed steps of the worker the scheduler knew of when it planned this. resets: how many times it had
    cleared the pool by then.
    """

    loads: tuple[LoadOrder, ...] = ()
    background_loads: tuple[LoadOrder, ...] = ()
    stores: tuple[StoreOrder, ...] = ()
    gone: frozenset[str] = field(default_factory=frozenset)
    failures_seen: int = 0
    resets: int = 0


@dataclass(frozen=True)
class StepReport(KVConnectorWorkerMetadata):
    """The worker's answer. ``failures``: how many steps so far had a load that failed before their forward pass."""

    loaded: frozenset[str] = field(default_factory=frozenset)  # requests whose loads are over, well or not
    stored: frozenset[ChunkKey] = field(default_factory=frozenset)  # committed to the pool by this worker
    failures: int = 0

    def aggregate(self, other: KVConnectorWorkerMetadata) -> StepReport:
        assert isinstance(other, StepReport)
        return StepReport(self.loaded | other.loaded, self.stored | other.stored, max(self.failures, other.failures))


@dataclass(frozen=True)
class WorkerIntroduction(KVConnectorHandshakeMetadata):
    """Said once, after the worker has seen its KV tensors: only it knows how the bytes in a block lie.

    ``model`` is None when the worker declined; ``reason`` then says why.
    """

    model: ModelSpec | None
    reason: str = ""


def block_ids(values: Any) -> BlockIds:
    """Block ids as the data path takes them."""
    return np.asarray(values, dtype=np.int64)
