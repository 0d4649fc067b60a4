"""Chunks moved by key and block id: the level of the engine that integrations use, which have both already.

Beneath it the pool (``vcache/pool``) and the store; above it tokens, masks and slots (``vcache/engine.py``), and the checks of
arguments. Nothing the pool, the server or the store raises leaves this module: it becomes a miss, a counter and a line in
the log.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final, TypeVar

import numpy as np
import numpy.typing as npt

from vcache.completions import Completions
from vcache.errors import UnavailableError
from vcache.failures import FailureLog
from vcache.in_flight import InFlight
from vcache.keys import ChunkKey, parts_of
from vcache.log import KeyText
from vcache.moving_up import Run
from vcache.pending import KeyHits, PendingRetrieve, PendingStore
from vcache.pool_runs import PoolRuns
from vcache.prefetch import PrefetchHandle
from vcache.promotion import PROMOTION_VALUES, Promotion
from vcache.protocol import Outcome, Tier
from vcache.stats import Counters, StatsValue, server_values

if TYPE_CHECKING:
    from vcache.keys import ModelSpec
    from vcache.paged_kv import PagedKV
    from vcache.pool.client import PoolClient
    from vcache.pool.reading import PendingRead
    from vcache.pool.writing import PendingWrite
    from vcache.store_tier import StoreTier

logger = logging.getLogger("vcache.engine")

Int64Array = npt.NDArray[np.int64]
T = TypeVar("T")
#: How long a removal waits for the chunks that are being promoted at the moment: longer than a part can take.
PART_PATIENCE_S: Final = 5.0


class BlockCache:
    """One rank's way to the pool and the store. Thread-safe; owns neither."""

    def __init__(
        self,
        client: PoolClient,
        below: StoreTier | None,
        promotion: Promotion | None,
        *,
        model: ModelSpec,
        rank: int,
        counters: Counters,
        completions: Completions | None = None,
    ) -> None:
        """``completions``: who ends stores that need not be waited for (``end_store``); without, they are ended at once."""
        self._client = client
        self._below = below
        self._promotion = promotion
        self._model = model
        self._runs = PoolRuns(client, model, rank)
        self._counters = counters
        self._completions = completions
        self._in_flight = InFlight()
        self._failures = FailureLog(logger)

    def lookup(
        self, keys: Sequence[ChunkKey], *, lease_s: float = 0.0, waits: bool = True, pin_s: float = 0.0
    ) -> KeyHits:
        """The leading run of ``keys`` with all ranks' shards: in the pool, then going on in the store.

        A lease covers at most the first ``protocol.MAX_KEYS_PER_CALL`` chunks; ``waits``: for the server to grant it.
        """
        started = time.perf_counter()
        pool, lease = self._behind_stores("lookup", lambda: self._runs.lookup(keys, lease_s, waits=waits), (0, 0))
        if pin_s and pool:
            self.pin(keys[:pool], pin_s)
        store = self._run_below("lookup", keys[pool:])
        self._counters.add(
            lookup_calls=1,
            lookup_seconds=time.perf_counter() - started,
            lookup_chunks=len(keys),
            lookup_hits=pool + store,
        )
        if logger.isEnabledFor(logging.DEBUG):
            found = "lookup: %d of %d chunks in the pool, %d in the store: %s"
            logger.debug(found, pool, len(keys), store, _span(keys))
        return KeyHits(pool, store, lease)

    def contains(self, key: ChunkKey) -> int:
        """0: in the pool with all ranks' shards, 1: in the store, -1: nowhere."""
        if self._behind_stores("contains", lambda: self._client.lookup(key).hits, 0):
            return 0
        return 1 if self._run_below("contains", [key]) else -1

    def begin_retrieve(
        self, kv: PagedKV, keys: Sequence[ChunkKey], block_ids: Int64Array, *, parent: ChunkKey | None, tenant: int
    ) -> PendingRetrieve:
        """Starts to load the leading run of ``keys``, consecutive chunks after ``parent``, into blocks ``[len(keys), blocks
        per chunk]`` of ``kv``."""
        self._await_own_stores()
        entered = self._in_flight.enter()
        pending = PendingRetrieve(self if entered else None, kv, keys, block_ids, parent=parent, tenant=tenant)
        if not entered:
            return pending
        try:
            with self._failures.contained("retrieve"):
                self._runs.read(pending.reads, kv, keys, block_ids)
        except BaseException:  # an interrupt: nobody else will complete it
            pending.abandon()
            raise
        return pending

    def complete_retrieve(self, retrieve: PendingRetrieve, *, go_on: bool) -> int:
        """The second half of ``begin_retrieve``; its result calls it, once. ``go_on``: in the store, where the pool ends."""
        keys = retrieve.keys
        below = 0
        try:
            pool, invalid, moved = self._complete_reads(retrieve.reads)
            seconds = time.perf_counter() - retrieve.started
            if go_on and self._below is not None and pool < len(keys):
                with self._failures.contained("retrieve"):
                    below = self._below.load(retrieve.kv, keys[pool:], retrieve.block_ids[pool:])
            with self._failures.contained("promotion"):
                self._was_hit(retrieve, pool, below)
        finally:
            self._in_flight.leave()
        loaded = pool + below
        self._counters.add(
            retrieve_calls=1,
            retrieve_seconds=time.perf_counter() - retrieve.started,
            hits=loaded,
            misses=len(keys) - loaded,
            validation_failures=invalid,
        )
        self._counters.moved("read", moved, seconds)
        logger.debug("retrieve: loaded %d of %d chunks, %d from the store: %s", loaded, len(keys), below, _span(keys))
        return loaded

    def reserve_store(
        self, kv: PagedKV, keys: Sequence[ChunkKey], *, parent: ChunkKey | None, tenant: int, pin_s: float
    ) -> PendingStore:
        """Asks for space for ``keys``, consecutive chunks after ``parent``; what it gives is to be copied and completed."""
        if not self._in_flight.enter():
            return PendingStore(None, kv, keys)
        pending = PendingStore(self, kv, keys)
        try:
            with self._failures.contained("store"):
                self._runs.reserve(pending.writes, kv, keys, parent=parent, tenant=tenant, pin_s=pin_s)
        except BaseException:  # an interrupt: nobody else will complete it
            pending.complete()
            raise
        pending.asked()
        self._counters.add(
            store_exists=_count(pending.writes, Outcome.EXISTS),
            store_no_space=_count(pending.writes, Outcome.NO_SPACE),
            store_declined=_count(pending.writes, Outcome.DECLINED),
        )
        return pending

    def copy_store(
        self, kv: PagedKV, writes: Sequence[PendingWrite], keys: Sequence[ChunkKey], block_ids: Int64Array
    ) -> None:
        """Copies into what ``reserve_store`` was granted; completing a copy that failed gives it back."""
        start = 0
        with self._failures.contained("store"):
            for write, part in zip(writes, parts_of(keys), strict=False):  # fewer, after a failure
                write.copy_from(kv, block_ids[start + write.granted])
                start += len(part)

    def end_store(self, store: PendingStore) -> None:
        """Completes it; where the copies are a GPU's, later, in the background. Then this cache's other calls wait for it."""
        if self._completions is not None:
            self._completions.add(store)
        else:
            store.complete()

    def complete_store(self, writes: Sequence[PendingWrite], keys: Sequence[ChunkKey], started: float) -> int:
        """The second half of ``begin_store``; its result calls it, once."""
        stored = granted = 0
        moved: Counter[Tier] = Counter()
        try:
            for write, part in zip(writes, parts_of(keys), strict=False):  # fewer, after a failure
                granted += len(write.granted)
                with self._failures.contained("store"):
                    count = write.complete()
                    stored += count
                    moved.update(self._runs.bytes_by_tier(write.placements) if count else {})
                    if count and self._below is not None:
                        chunks = [part[index] for index in write.granted.tolist()]
                        self._below.stored(chunks, write.placements, layout=write.layout)
        finally:
            self._in_flight.leave()
        seconds = time.perf_counter() - started
        self._counters.add(store_calls=1, store_seconds=seconds, stored=stored, store_lost=granted - stored)
        self._counters.moved("written", moved, seconds)
        logger.debug("store: stored %d of %d chunks: %s", stored, len(keys), _span(keys))
        return stored

    def prefetch(
        self, kv: PagedKV, keys: Sequence[ChunkKey], *, parent: ChunkKey | None, tenant: int
    ) -> PrefetchHandle:
        """Begins to bring into the pool what the store has of ``keys`` after the pool's run, for tensors like ``kv``."""
        keys = list(keys)
        handle = PrefetchHandle(lambda: self._behind_stores("prefetch", lambda: self._runs.lookup(keys)[0], 0))
        pool = self._behind_stores("prefetch", lambda: self._runs.lookup(keys)[0], len(keys))
        if self._promotion is None or self._below is None or pool == len(keys):
            handle.end()
        else:
            self._promotion.prefetch(self._run_of(kv, keys, parent=parent, tenant=tenant).beyond(pool), handle)
        return handle

    def release(self, lease: int) -> None:
        """Ends a lease. Asynchronous."""
        if lease:
            self._shielded("release", lambda: self._client.release(lease), None)

    def pin(self, keys: Sequence[ChunkKey], pin_s: float) -> int:
        """Keeps present chunks from eviction; how many."""
        return self._behind_stores("pin", lambda: self._runs.pin(keys, pin_s), 0)

    def unpin(self, keys: Sequence[ChunkKey]) -> int:
        """Ends pins; how many."""
        return self._behind_stores("unpin", lambda: self._runs.unpin(keys), 0)

    def remove(self, keys: Sequence[ChunkKey]) -> int | None:
        """Removes chunks with all ranks' shards from pool and store; how many the pool had. ``None``: not all confirmed it."""
        removed = self._behind_stores("remove", lambda: self._runs.remove(keys), None)
        below = self._below
        if below is not None:  # after the pool: what it has no longer cannot be written to the store again
            if not self._shielded("remove", lambda: below.remove(keys), False):
                removed = None
            if self._promotion is not None:
                self._promotion.pause(PART_PATIENCE_S)
            if self._behind_stores("remove", lambda: self._runs.remove(keys), None) is None:
                removed = None  # what was promoted before the store had lost it may be there
        return self._confirmed(removed)

    def clear(self, tenant: int | None) -> int | None:
        """Removes a tenant's chunks, or all, from the pool; how many. ``None``: that was not confirmed."""
        return self._confirmed(self._behind_stores("clear", lambda: self._client.clear(tenant), None))

    def stats(self) -> dict[str, StatsValue]:
        """Counters and the server's state, by the names of ``vcache/stats.py``."""
        server = self._behind_stores("stats", self._client.stats, None)
        client = {f"client_{name}": value for name, value in self._client.counters.items()}
        below = self._below.stats() if self._below is not None else {}
        promotion = self._promotion.stats() if self._promotion is not None else dict.fromkeys(PROMOTION_VALUES, 0)
        return {
            **self._counters.snapshot(),
            **promotion,
            "failures": self._failures.total,
            **client,
            **server_values(server),
            **below,
        }

    def close(self, timeout_s: float) -> bool:
        """Lets no more calls in and waits for those inside; whether all have ended."""
        inside = self._in_flight.close(timeout_s)
        if inside:
            logger.warning("%d calls did not end within %g s; the engine keeps what they use", inside, timeout_s)
        return not inside

    def flush(self, timeout_s: float) -> bool:
        """Waits until the server has read of all that was stored, and the store below has it, or it was dropped: whether
        that came in time. For a server that is away it waits as long as a new engine does."""
        deadline = time.monotonic() + timeout_s
        is_ended = self._completions is None or self._completions.wait(timeout_s)
        patience_s = min(max(0.0, deadline - time.monotonic()), self._client.config.client.connect_timeout)
        is_told = self._shielded("flush", lambda: self._client.settle(patience_s), False)
        is_written = self._below is None or self._below.flush(max(0.0, deadline - time.monotonic()))
        return is_ended and is_told and is_written

    def _await_own_stores(self) -> None:
        """What this cache was given to store is found by its other calls, as if the store had ended when it returned."""
        if self._completions is not None:
            self._completions.wait(self._client.config.client.call_timeout)

    def _run_below(self, operation: str, keys: Sequence[ChunkKey]) -> int:
        below = self._below if keys else None
        return self._shielded(operation, lambda: below.run(keys), 0) if below and below.store.available else 0

    def _was_hit(self, retrieve: PendingRetrieve, pool: int, below: int) -> None:
        """Makes known to the write policy and to promotion what was loaded: ``pool`` chunks, then ``below`` from the store."""
        run = self._run_of(retrieve.kv, retrieve.keys, parent=retrieve.parent, tenant=retrieve.tenant)
        if pool:
            first, *others = (read.placements for read, _ in retrieve.reads)
            placements = (np.concatenate([first, *others]) if others else first)[:pool]
            if self._below is not None:
                self._below.hit(retrieve.keys[:pool], placements, layout=run.layout)
            if self._promotion is not None:
                self._promotion.loaded_from_pool(run.first(pool), placements)
        if below and self._promotion is not None:
            self._promotion.loaded_from_store(run.first(pool + below).beyond(pool))

    def _run_of(self, kv: PagedKV, keys: Sequence[ChunkKey], *, parent: ChunkKey | None, tenant: int) -> Run:
        return Run(keys, parent, tenant, kv.payload_bytes(self._model.blocks_per_chunk), kv.payload_layout)

    def _confirmed(self, removed: int | None) -> int | None:
        """Counts and says a removal that was not confirmed: it must not pass for one that found nothing."""
        if removed is None:
            self._counters.add(unconfirmed_removals=1)
            self._failures.record("remove", UnavailableError("not confirmed by all; some chunks may still be there"))
        return removed

    def _complete_reads(self, reads: Sequence[tuple[PendingRead, bool]]) -> tuple[int, int, Counter[Tier]]:
        """Leading chunks that are valid, chunks that are not any more, and the bytes of the former."""
        loaded = invalid = 0
        unbroken = True
        moved: Counter[Tier] = Counter()
        for read, copied in reads:
            valid, begun = 0, read.hits  # it may turn out shorter
            with self._failures.contained("retrieve"):
                valid = read.complete()  # each of them: it ends the lease
            invalid += read.hits - valid if copied else 0
            if unbroken:
                loaded += valid
                moved.update(self._runs.bytes_by_tier(read.placements[:valid]))
            unbroken = unbroken and valid == begun
        return loaded, invalid, moved

    def _behind_stores(self, operation: str, call: Callable[[], T], otherwise: T) -> T:
        """As ``_shielded``, once what this cache was given to store is there to be found."""
        self._await_own_stores()
        return self._shielded(operation, call, otherwise)

    def _shielded(self, operation: str, call: Callable[[], T], otherwise: T) -> T:
        """The call's result, or ``otherwise`` when it fails or the engine is closed."""
        if not self._in_flight.enter():
            return otherwise
        try:
            return call()
        except Exception as error:
            self._failures.record(operation, error)
            return otherwise
        finally:
            self._in_flight.leave()


def _count(writes: Sequence[PendingWrite], outcome: Outcome) -> int:
    return sum(write.outcomes.count(outcome) for write in writes)


def _span(keys: Sequence[ChunkKey]) -> KeyText:
    """The first and the last key, for the log; the pool names each."""
    return KeyText(keys if len(keys) < 2 else (keys[0], keys[-1]))
