"""One rank's way to the store below the pool: runs that go on there, their bytes into the engine's blocks, writes behind.

The store answers in time and raises nothing (``store/guard.py``); what it does not deliver is a miss. Not here: when to come
here, which is ``block_cache.py``'s business.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Final

import numpy as np
import numpy.typing as npt

from vcache.heat import Heat
from vcache.keys import ChunkKey
from vcache.pool.read_back import Written, read_back
from vcache.stats import Counters, StatsValue
from vcache.store import open_store
from vcache.store.base import Shard
from vcache.store.guard import GuardedStore
from vcache.store.loaded import Loaded
from vcache.store.write_behind import WRITE_BEHIND_VALUES, WriteBehind

if TYPE_CHECKING:
    from vcache.config import VCacheConfig
    from vcache.keys import ModelSpec
    from vcache.paged_kv import PagedKV
    from vcache.pool.client import PlacementArray, PoolClient
    from vcache.store.staging import Staging

Int64Array = npt.NDArray[np.int64]
#: Chunks offered together: where the queue has no room for a long prompt, it takes the beginning.
CHUNKS_PER_OFFER: Final = 32


def open_store_tier(
    config: VCacheConfig, client: PoolClient, model: ModelSpec, *, rank: int, moves: bool, counters: Counters
) -> StoreTier | None:
    """The store that ``config`` names, or ``None``. ``moves``: whether this process reads and writes payloads."""
    store = open_store(config.store, moves=moves)
    if store is None:
        return None
    writer = None
    policy = config.store.write_policy
    if moves and policy in ("all", "hot"):  # evicted: donors write, workers do not

        def count(nbytes: int, seconds: float) -> None:
            counters.add(store_written_bytes=nbytes, store_written_seconds=seconds)

        writer = WriteBehind(
            store, max_bytes=config.store.queue_bytes, max_items=config.store.queue_items, written=count
        )
    hot_hits = config.store.hot_hits if policy == "hot" else 0
    return StoreTier(store, writer, client, rank=rank, ranks=model.ranks, hot_hits=hot_hits, counters=counters)


class StoreTier:
    """Owns the store and the queue of writes to it. Thread-safe."""

    def __init__(
        self,
        store: GuardedStore,
        writer: WriteBehind | None,
        client: PoolClient,
        *,
        rank: int,
        ranks: int,
        hot_hits: int,
        counters: Counters,
    ) -> None:
        """``hot_hits``: in how many hits a chunk is hot and only then written; 0: all are, as they enter the pool."""
        self.store = store
        self._writer = writer
        self._hot_hits = hot_hits
        self._heat = Heat()
        self._client = client
        self._rank = rank
        self._ranks = ranks
        self._counters = counters

    def run(self, keys: Sequence[ChunkKey]) -> int:
        """How many of ``keys``, from the first on, the store holds with the shards of all ranks. One batched call."""
        if not keys or not self.store.available:
            return 0
        present = self.store.contains(self._all_ranks(keys))
        return next((index // self._ranks for index, there in enumerate(present) if not there), len(keys))

    def load(self, kv: PagedKV, keys: Sequence[ChunkKey], block_ids: Int64Array) -> int:
        """Loads the leading run of ``keys`` into blocks ``[len(keys), blocks per chunk]``; how many chunks are there, whole.

        One batch, or as many as staging memory asks for. What has arrived is copied while the rest is under way. On a GPU
        this waits for the current stream.
        """
        if not keys or not self.store.available:
            return 0
        started = time.perf_counter()
        if self._ranks > 1:
            keys = keys[: self.run(keys)]
        nbytes = kv.payload_bytes(block_ids.shape[1])
        loaded = 0
        while loaded < len(keys):
            shards = [Shard(key, self._rank, self._ranks, kv.payload_layout) for key in keys[loaded:]]
            into = _Scatter(kv, block_ids[loaded:], self.store.staging, self._client.config.transfer.threads)
            with self.store.load(shards, [nbytes] * len(shards), arrived=into.go_on) as got:
                into.go_on(got)
            loaded += into.done
            if not into.done or into.done < len(got):
                break
        self._counters.add(
            store_hits=loaded,
            store_read_bytes=loaded * nbytes,
            store_read_seconds=time.perf_counter() - started,
        )
        return loaded

    def stored(self, keys: Sequence[ChunkKey], placements: PlacementArray, *, layout: int) -> None:
        """This rank's shards of ``keys`` entered the pool at ``placements``. ``layout``: ``PagedKV.payload_layout``."""
        if self._writer is not None and not self._hot_hits:
            self._offer(keys, placements, layout)

    def hit(self, keys: Sequence[ChunkKey], placements: PlacementArray, *, layout: int) -> None:
        """They were found there and loaded. With the 1st, 2nd, 4th, 8th... time that one becomes hot it is offered to the
        store, so that one that was dropped has another chance, and one that was not costs next to nothing."""
        if self._writer is not None and self._hot_hits:
            due = [index for index, count in enumerate(self._heat.hit(keys)) if _is_due(count, self._hot_hits)]
            self._offer([keys[index] for index in due], placements[due], layout)

    def _offer(self, keys: Sequence[ChunkKey], placements: PlacementArray, layout: int) -> None:
        """Has them written from where they are in the pool: in the background, or not at all."""
        if self._writer is None or not keys:
            return
        numbers = np.unique(placements["segment"]).tolist()
        infos = {number: info for number in numbers if (info := self._client.session.info(number)) is not None}
        for start in range(0, len(keys), CHUNKS_PER_OFFER):
            part = slice(start, start + CHUNKS_PER_OFFER)
            written = Written(keys[part], placements[part], infos)
            self._writer.offer(
                [Shard(key, self._rank, self._ranks, layout) for key in written.keys],
                written.placements["nbytes"].tolist(),
                partial(read_back, self._client, written),
            )

    def remove(self, keys: Sequence[ChunkKey]) -> bool:
        """Removes chunks that the pool has no longer; whether the store said so. What this process was writing of them is
        written first."""
        if self._writer is not None:
            self._writer.flush(self.store.write_timeout_s)
        return self.store.remove(self._all_ranks(keys)) is not None

    def flush(self, timeout_s: float) -> bool:
        """Waits until all that was offered is written or dropped: whether that came in time."""
        return self._writer is None or self._writer.flush(timeout_s)

    def stats(self) -> dict[str, StatsValue]:
        """By the names of docs/stores.md, the same ones whether or not this process writes."""
        queue = self._writer.stats() if self._writer is not None else dict.fromkeys(WRITE_BEHIND_VALUES, 0)
        return {**self.store.stats(), **queue}

    def close(self, timeout_s: float) -> None:
        """Writes what is queued, drops what takes too long, closes the store. Harmless when called twice."""
        deadline = time.monotonic() + timeout_s
        if self._writer is not None:
            self._writer.close(timeout_s)
        self.store.close(max(0.0, deadline - time.monotonic()))

    def _all_ranks(self, keys: Sequence[ChunkKey]) -> list[Shard]:
        return [Shard(key, rank) for key in keys for rank in range(self._ranks)]


class _Scatter:
    """Copies a batch into the engine's blocks, as far as its leading run is loaded. ``done``: chunks copied."""

    def __init__(self, kv: PagedKV, block_ids: Int64Array, staging: Staging, threads: int) -> None:
        self._kv = kv
        self._block_ids = block_ids
        self._staging = staging
        self._threads = threads
        self.done = 0

    def go_on(self, loaded: Loaded) -> None:
        """Copies what of the run has not been copied yet."""
        from vcache.transfer import scatter, settled  # loads torch

        run = loaded.run
        if run > self.done:
            blocks, offsets = self._block_ids[self.done : run], loaded.offsets(self.done, run)
            with settled(self._kv.device):  # staging memory goes to somebody else before long
                scatter(self._kv, blocks, self._staging.tensor, offsets, threads=self._threads)
            self.done = run


def _is_due(hits: int, hot_hits: int) -> bool:
    times, rest = divmod(hits, hot_hits)
    return rest == 0 and times & (times - 1) == 0
