"""Writes to the store in the background: a bounded queue that drops and counts rather than make anyone wait.

Offering costs the caller no copy: an offer says how to *read* the payloads later (from the pool, validated as for any
reader), and the writer thread calls that when their turn comes. What the pool has lost meanwhile is not written. A write
that fails leaves the pool's copy as it was.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final, NamedTuple

from vcache.failures import FailureLog
from vcache.store.base import Put, Shard

if TYPE_CHECKING:
    import torch

    from vcache.store.guard import GuardedStore

logger = logging.getLogger(__name__)

#: Reads payloads into buffers (uint8, of exactly their sizes); which of them now hold a whole, validated payload. Called in
#: the writer's thread with positions within the offer, several times for a large one; those the store has are left out.
Fill = Callable[[Sequence[int], "Sequence[torch.Tensor]"], Sequence[bool]]

#: Of staging memory, what one round of writing takes at most (but at least one payload): most is for readers.
STAGING_SHARE: Final = 8
#: How long a round waits for readers to leave some of it.
STAGING_PATIENCE_S: Final = 1.0

WRITE_BEHIND_VALUES: Final = {
    "store_queue_items": "chunks' shards now waiting to be written",
    "store_queue_bytes": "their size",
    "store_offered": "shards offered for writing",
    "store_written": "shards written",
    "store_present": "shards the store had already",
    "store_dropped_queue": "shards dropped: the queue was full, or closed",
    "store_dropped_down": "shards dropped: the store's circuit was open",
    "store_dropped_lost": "shards dropped: the pool no longer had them when their turn came",
    "store_dropped_failed": "shards dropped: the store was full, failed or late",
}


class _Offer(NamedTuple):
    shards: Sequence[Shard]
    sizes: Sequence[int]
    fill: Fill

    @property
    def nbytes(self) -> int:
        return sum(self.sizes)


class WriteBehind:
    """Owns one daemon thread. Thread-safe; nothing it does raises on the caller's side."""

    def __init__(
        self,
        store: GuardedStore,
        *,
        max_bytes: int,
        max_items: int,
        written: Callable[[int, float], None] = lambda nbytes, seconds: None,
    ) -> None:
        """``store`` stays the caller's: close this first, then the store.

        ``written``: told, in the writer's thread, of each round's bytes written and the seconds that took.
        """
        self._store = store
        self._max_bytes = max_bytes
        self._max_items = max_items
        self._written = written
        self._changed = threading.Condition()
        self._queue: deque[_Offer] = deque()
        self._counts = dict.fromkeys(WRITE_BEHIND_VALUES, 0)
        self._offered = 0  # offers taken ...
        self._settled = 0  # ... and offers written or dropped
        self._closed = False
        self._abandoned = False
        self._failures = FailureLog(logger)
        self._thread = threading.Thread(target=self._run, name="vcache-write-behind", daemon=True)
        self._thread.start()

    def offer(self, shards: Sequence[Shard], sizes: Sequence[int], fill: Fill) -> bool:
        """Queues shards whose payloads have ``sizes`` bytes: whether they were taken, all or none. Never waits."""
        offer = _Offer(shards, sizes, fill)
        with self._changed:
            counts = self._counts
            counts["store_offered"] += len(shards)
            taken = (
                not self._closed
                and self._store.available
                and counts["store_queue_items"] + len(shards) <= self._max_items
                and counts["store_queue_bytes"] + offer.nbytes <= self._max_bytes
            )
            if taken:
                self._queue.append(offer)
                self._offered += 1
                counts["store_queue_items"] += len(shards)
                counts["store_queue_bytes"] += offer.nbytes
                self._changed.notify_all()
            else:
                reason = "store_dropped_queue" if self._closed or self._store.available else "store_dropped_down"
                counts[reason] += len(shards)
        return taken

    def flush(self, timeout_s: float) -> bool:
        """Waits until all that was offered before this call is written or dropped: whether that came in time."""
        with self._changed:
            until = self._offered
            return self._changed.wait_for(lambda: self._settled >= until, timeout_s)

    def stats(self) -> dict[str, int]:
        """``WRITE_BEHIND_VALUES``."""
        with self._changed:
            return dict(self._counts)

    def close(self, timeout_s: float = 10.0) -> None:
        """Takes no more, writes what is queued for at most ``timeout_s``, drops the rest. Harmless when repeated."""
        deadline = time.monotonic() + timeout_s
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self.flush(timeout_s)
        with self._changed:
            self._abandoned = True
            left, self._queue = list(self._queue), deque()
            self._changed.notify_all()
        for offer in left:
            self._settle(offer, store_dropped_queue=len(offer.shards))
        self._thread.join(max(0.0, deadline - time.monotonic()))

    def _run(self) -> None:
        while (offer := self._next()) is not None:
            try:
                outcome = self._write(offer)
            except Exception as error:
                self._failures.record("writing to the store", error)
                outcome = {"store_dropped_failed": len(offer.shards)}
            self._settle(offer, **outcome)

    def _next(self) -> _Offer | None:
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._closed)
            return self._queue.popleft() if self._queue else None

    def _write(self, offer: _Offer) -> dict[str, int]:
        """Writes one offer, in rounds that leave most of staging memory to readers. What became of its shards."""
        if not self._store.available:
            return {"store_dropped_down": len(offer.shards)}
        present = self._store.contains(offer.shards)
        missing = [index for index, there in enumerate(present) if not there]
        outcome = dict.fromkeys(
            ("store_written", "store_present", "store_dropped_lost", "store_dropped_failed", "store_dropped_queue"), 0
        )
        outcome["store_present"] = len(offer.shards) - len(missing)
        while missing:
            count = 0 if self._abandoned else self._write_round(offer, missing, outcome)
            if not count:
                outcome["store_dropped_queue" if self._abandoned else "store_dropped_failed"] += len(missing)
                break
            missing = missing[count:]
        return outcome

    def _write_round(self, offer: _Offer, missing: Sequence[int], outcome: dict[str, int]) -> int:
        """Writes the first few of ``missing``: how many were dealt with; 0 when staging memory is full."""
        room = self._store.staging.nbytes // STAGING_SHARE
        sizes: list[int] = []
        for index in missing:
            if sizes and sum(sizes) + offer.sizes[index] > room:
                break
            sizes.append(offer.sizes[index])
        blocks = self._store.staging.take(sizes, wait_s=STAGING_PATIENCE_S)
        chosen = missing[: len(blocks)]
        whole: Sequence[bool] = [False] * len(blocks)
        try:
            whole = offer.fill(chosen, [block.tensor for block in blocks]) if blocks else []
        finally:
            for block, filled in zip(blocks, whole, strict=True):
                if not filled:
                    block.release()
        kept = [
            (offer.shards[index], block) for index, block, filled in zip(chosen, blocks, whole, strict=True) if filled
        ]
        sizes = [block.nbytes for _, block in kept]
        started = time.monotonic()
        results = self._store.put_blocks([shard for shard, _ in kept], [block for _, block in kept])
        stored = sum(nbytes for nbytes, put in zip(sizes, results, strict=True) if put is Put.STORED)
        if stored:
            self._written(stored, time.monotonic() - started)
        outcome["store_written"] += results.count(Put.STORED)
        outcome["store_present"] += results.count(Put.EXISTS)
        outcome["store_dropped_lost"] += len(blocks) - len(kept)
        outcome["store_dropped_failed"] += results.count(Put.FULL) + results.count(Put.FAILED)
        return len(blocks)

    def _settle(self, offer: _Offer, **amounts: int) -> None:
        with self._changed:
            for name, amount in amounts.items():
                self._counts[name] += amount
            self._counts["store_queue_items"] -= len(offer.shards)
            self._counts["store_queue_bytes"] -= offer.nbytes
            self._settled += 1
            self._changed.notify_all()
