"""Loads: a request's chunks from the pool or the store into vLLM's blocks, before a forward pass or beside it.

What cannot be loaded is told by its blocks, so that vLLM computes exactly those. Nothing raised here leaves.
"""

from __future__ import annotations

import logging
import threading
import time
from functools import partial
from typing import TYPE_CHECKING, Final

from vcache.failures import FailureLog
from vcache.keys import format_key
from vcache_vllm.lane import Lane

if TYPE_CHECKING:
    from vcache.engine import VCacheEngine
    from vcache_vllm.counters import ConnectorCounters
    from vcache_vllm.metadata import LoadOrder

logger: Final = logging.getLogger(__name__)


class Loads:
    """The loads of one worker."""

    def __init__(
        self,
        engine: VCacheEngine,
        lane: Lane,
        counters: ConnectorCounters,
        failures: FailureLog,
        *,
        chunk_bytes: int,
    ) -> None:
        self._engine = engine
        self._lane = lane
        self._counters = counters
        self._failures = failures
        self._chunk_bytes = chunk_bytes
        self._lock = threading.Lock()
        self._over: set[str] = set()
        self._over_behind: set[str] = set()
        self._invalid_blocks: set[int] = set()

    def load(self, order: LoadOrder) -> bool:
        """Loads for this step's forward pass: returns when the bytes are there, or noted as failed; whether all are there."""
        missing = self._load(order)
        with self._lock:
            self._over.add(order.request_id)
            self._invalid_blocks |= missing
        return not missing

    def load_behind(self, order: LoadOrder) -> None:
        """Loads for a request that waits outside of the steps. Returns at once."""
        done = self._lane.run(partial(self._load, order), _blocks_missing(order, 0))
        done.add_done_callback(lambda missing: self._behind_over(order.request_id, missing.result()))

    def take_over(self) -> tuple[frozenset[str], set[str]]:
        """Requests whose loads are over since the last call, well or not: all, and those that waited outside of the steps."""
        with self._lock:
            over, self._over = self._over, set()
            behind, self._over_behind = self._over_behind, set()
        return frozenset(over | behind), behind

    def take_invalid_blocks(self) -> set[int]:
        """The blocks that could not be loaded. Of a load that is over, all have been told when ``take_over`` tells it."""
        with self._lock:
            taken, self._invalid_blocks = self._invalid_blocks, set()
        return taken

    def _behind_over(self, request_id: str, missing: set[int]) -> None:
        with self._lock:
            self._over_behind.add(request_id)
            self._invalid_blocks |= missing

    def _load(self, order: LoadOrder) -> set[int]:
        """Loads what it can; the blocks that it could not load."""
        started = time.perf_counter()
        loaded = 0
        try:
            loaded = self._retrieve(order)
        except Exception as error:
            self._failures.record("load", error)
        failed = len(order.keys) - loaded
        self._counters.add(
            loaded_chunks=loaded,
            failed_chunks=failed,
            loaded_bytes=loaded * self._chunk_bytes,
            load_seconds=time.perf_counter() - started,
        )
        if failed:
            logger.warning(
                "%d of %d chunks of request %s could not be loaded, from %s on; vLLM computes them",
                failed,
                len(order.keys),
                order.request_id,
                format_key(order.keys[loaded]),
            )
        return _blocks_missing(order, loaded)

    def _retrieve(self, order: LoadOrder) -> int:
        """A payload is loaded whole, but the first ``kept`` blocks of the first chunk are not ours to write.

        What belongs there goes into blocks of the second chunk, which is loaded over it afterwards.
        """
        engine, salt = self._engine, order.salt
        if not order.kept:
            return engine.begin_retrieve(order.keys, order.blocks, order.parent, salt=salt).complete()
        edge = order.blocks[:1].copy()
        edge[0, : order.kept] = order.blocks[1, : order.kept]
        if not engine.begin_retrieve(order.keys[:1], edge, order.parent, salt=salt).complete():
            return 0
        return 1 + engine.begin_retrieve(order.keys[1:], order.blocks[1:], order.keys[0], salt=salt).complete()


def _blocks_missing(order: LoadOrder, loaded: int) -> set[int]:
    """The blocks of ``order`` that are to be computed when its first ``loaded`` chunks are there."""
    return set(order.blocks[loaded:].ravel().tolist()[order.kept if not loaded else 0 :])
