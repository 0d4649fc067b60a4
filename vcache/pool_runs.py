"""Runs of any length in the pool, whose calls take so many keys at a time (``keys.parts_of``).

What the pool raises is raised: what becomes of that, and of what had begun by then, is up to the caller (``block_cache.py``).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from vcache.joined_keys import join_keys
from vcache.keys import ChunkKey, parts_of
from vcache.pool.reading import PendingRead, begin_read
from vcache.pool.writing import PendingWrite, begin_write
from vcache.protocol import Tier

if TYPE_CHECKING:
    from vcache.keys import ModelSpec
    from vcache.paged_kv import PagedKV
    from vcache.pool.client import PlacementArray, PoolClient

Int64Array = npt.NDArray[np.int64]


class PoolRuns:
    """One rank's runs. Thread-safe."""

    def __init__(self, client: PoolClient, model: ModelSpec, rank: int) -> None:
        self._client = client
        self._model = model
        self._rank = rank

    def lookup(self, keys: Sequence[ChunkKey], lease_s: float = 0.0, *, waits: bool = True) -> tuple[int, int]:
        """Leading chunks with all ranks' shards, and a lease on them (0: none) that covers the first part at most."""
        hits = lease = 0
        for part in parts_of(keys):
            found = self._client.lookup(join_keys(part), 0.0 if hits else lease_s, waits=waits)
            hits += found.hits
            lease = lease or found.lease
            if found.hits < len(part):
                break
        return hits, lease

    def read(
        self, reads: list[tuple[PendingRead, bool]], kv: PagedKV, keys: Sequence[ChunkKey], block_ids: Int64Array
    ) -> None:
        """Begins to load the leading run into blocks ``[len(keys), blocks per chunk]``.

        Adds to ``reads`` what is to be completed, with whether its copies were enqueued.
        """
        start = 0
        for part in parts_of(keys):
            read = begin_read(self._client, part, self._rank)
            reads.append((read, False))
            read.copy_to(kv, block_ids[start : start + read.hits])
            reads[-1] = (read, True)
            if read.hits < len(part):
                return
            start += len(part)

    def reserve(
        self,
        writes: list[PendingWrite],
        kv: PagedKV,
        keys: Sequence[ChunkKey],
        *,
        parent: ChunkKey | None,
        tenant: int,
        pin_s: float,
    ) -> None:
        """Begins to store consecutive chunks after ``parent``, adding to ``writes``, a part each, what is to be completed."""
        for part in parts_of(keys):
            write = begin_write(
                self._client,
                part,
                parent=parent or b"",
                rank=self._rank,
                ranks=self._model.ranks,
                nbytes=kv.payload_bytes(self._model.blocks_per_chunk),
                tokens=self._model.chunk_size,
                tenant=tenant,
                pin_s=pin_s,
                layout=kv.payload_layout,
                device=kv.device,
            )
            writes.append(write)
            parent = part[-1]

    def pin(self, keys: Sequence[ChunkKey], pin_s: float) -> int:
        """Keeps present chunks from eviction; how many."""
        return sum(self._client.pin(join_keys(part), pin_s) for part in parts_of(keys))

    def unpin(self, keys: Sequence[ChunkKey]) -> int:
        """Ends pins; how many."""
        return sum(self._client.unpin(join_keys(part)) for part in parts_of(keys))

    def remove(self, keys: Sequence[ChunkKey]) -> int | None:
        """Removes chunks with all ranks' shards; how many it had. ``None``: of some it does not say that they are gone."""
        removed = 0
        for part in parts_of(keys):
            count = self._client.remove(join_keys(part))
            if count is None:
                return None
            removed += count
        return removed

    def bytes_by_tier(self, placements: PlacementArray) -> Counter[Tier]:
        """Bytes of these placements; of segments that the present server does not know, none."""
        moved: Counter[Tier] = Counter()
        for number, *_, nbytes in placements.tolist():
            info = self._client.session.info(number)
            if info is not None:
                moved[info.tier] += nbytes
        return moved
