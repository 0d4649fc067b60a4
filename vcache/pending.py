"""What is under way between the two halves of a retrieve or a store, and what a lookup found."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from vcache.keys import ChunkKey

if TYPE_CHECKING:
    from vcache.paged_kv import PagedKV
    from vcache.pool.reading import PendingRead
    from vcache.pool.writing import PendingWrite

Int64Array = npt.NDArray[np.int64]


class KeyHits(NamedTuple):
    """A leading run of chunks: ``pool`` in the pool, then ``store`` in the store.

    ``lease`` (0 = none) keeps those in the pool from eviction until it is released or runs out.
    """

    pool: int = 0
    store: int = 0
    lease: int = 0

    @property
    def hits(self) -> int:
        return self.pool + self.store


class Cache(Protocol):
    """What both halves are calls of."""

    def complete_retrieve(self, retrieve: PendingRetrieve, *, go_on: bool) -> int:
        """The second half of a retrieve; ``go_on``: in the store, where the pool ends."""

    def copy_store(
        self, kv: PagedKV, writes: Sequence[PendingWrite], keys: Sequence[ChunkKey], block_ids: Int64Array
    ) -> None:
        """Copies what a store was granted."""

    def complete_store(self, writes: Sequence[PendingWrite], keys: Sequence[ChunkKey], started: float) -> int:
        """The second half of a store."""


class PendingRetrieve:
    """Chunks on their way into the engine's blocks. Nothing may be taken for loaded before ``complete`` says so."""

    def __init__(
        self,
        cache: Cache | None,
        kv: PagedKV,
        keys: Sequence[ChunkKey],
        block_ids: Int64Array,
        *,
        parent: ChunkKey | None,
        tenant: int,
    ) -> None:
        self._cache = cache
        self.kv = kv
        self.keys = keys
        self.block_ids = block_ids
        self.parent = parent
        self.tenant = tenant
        self.started = time.perf_counter()
        self._loaded = 0
        #: What was begun, and whether its copies were enqueued without an error.
        self.reads: list[tuple[PendingRead, bool]] = []

    def complete(self) -> int:
        """Leading chunks loaded, each byte of them valid. Waits for the copies. Calling it again is harmless.

        Where the pool's valid run ends it goes on in the store, and waits for that too.
        """
        return self._end(go_on=True)

    def abandon(self) -> None:
        """Ends what was begun, going nowhere else."""
        self._end(go_on=False)

    def _end(self, *, go_on: bool) -> int:
        cache, self._cache = self._cache, None
        if cache is not None:
            self._loaded = cache.complete_retrieve(self, go_on=go_on)
        return self._loaded


class PendingStore:
    """Chunks on their way into the pool, invisible to readers until ``complete``."""

    def __init__(self, cache: Cache | None, kv: PagedKV, keys: Sequence[ChunkKey]) -> None:
        self._cache = cache
        self._kv = kv
        self._keys = keys
        self._started = time.perf_counter()
        self._asked = self._started  # when the server had answered
        self._stored = 0
        self.writes: list[PendingWrite] = []

    def asked(self) -> None:
        """The asking is over. What passes until ``copy_from`` is the caller's own time, and not counted as storing."""
        self._asked = time.perf_counter()

    def copy_from(self, block_ids: Int64Array) -> None:
        """Copies what was granted from blocks ``[keys, blocks per chunk]``; on a GPU, enqueues it on the current stream.

        Asks nobody for anything. The blocks must not change until the copy is done.
        """
        now = time.perf_counter()
        self._started, self._asked = self._started + now - self._asked, now
        try:
            if self._cache is not None:
                self._cache.copy_store(self._kv, self.writes, self._keys, block_ids)
        except BaseException:  # an interrupt: nobody else will complete it
            self.complete()
            raise

    def complete(self) -> int:
        """Chunks committed. Waits for the copies; gives back what was not copied. Calling it again is harmless."""
        cache, self._cache = self._cache, None
        if cache is not None:
            self._stored = cache.complete_store(self.writes, self._keys, self._started)
        return self._stored
