"""Promotion and prefetch: chunks moved up in the background, one part at a time, through one bounded queue.

Promotion moves what was read from afar closer to the next reader, by ``promotion.policy``; prefetch moves what somebody
expects to read, and goes first. What the queue has no room for is dropped and counted: nobody waits for it, and nothing that
fails here is more than a chunk left where it was. Not here: how a part is moved (``moving_up.py``).

Chunks are read from the store a second time instead of being kept from the load that was served: a queue of keys holds no
staging memory that the next load needs, and no load waits for room in the pool.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from vcache.failures import FailureLog
from vcache.heat import Heat
from vcache.memory.copying import aside_on
from vcache.moving_up import Moved, MovesUp, Run
from vcache.prefetch import PrefetchHandle

if TYPE_CHECKING:
    import torch

    from vcache.config import PromotionConfig
    from vcache.keys import ChunkKey
    from vcache.pool.client import PlacementArray

logger = logging.getLogger("vcache.engine")

#: ``docs/python-api.md`` documents every name; a test keeps the two equal.
PROMOTION_VALUES: Final = {
    "promotion_waiting": "chunks now waiting to be moved up, by promotion or prefetch",
    "promotion_offered": "chunks that were to be moved up; the following say what became of them",
    "promoted_from_store": "moved from the store into the pool",
    "promoted_to_vram": "copied within the pool into VRAM of this engine's device",
    "promotion_present": "found there already, or on their way there",
    "promotion_no_space": "not moved: there was no free space, or nobody to give it",
    "promotion_lost": "not moved: gone, or not delivered, when their turn came",
    "promotion_dropped": "not tried: the queue was full, a chunk before them was not moved, or they were cancelled",
}


@dataclass
class _Errand:
    """A run that waits to be moved, part by part."""

    run: Run
    chunks_per_part: int
    move: Callable[[Run], Moved]
    counter: str
    handle: PrefetchHandle | None = None

    @property
    def is_cancelled(self) -> bool:
        return self.handle is not None and self.handle.cancelled


class Promotion:
    """Owns one daemon thread, started by the first errand. Thread-safe; nothing here raises on the caller's side."""

    def __init__(self, moves: MovesUp, config: PromotionConfig, *, device: torch.device | None) -> None:
        """``device``: where the engine's KV is; on a GPU, moves have a stream of their own."""
        self._moves = moves
        self._hits_needed = {"never": 0, "first_hit": 1, "nth_hit": config.hits}[config.policy]
        self._max_items = config.queue_items
        self._device = device
        self._heat = Heat() if self._hits_needed > 1 else None
        self._changed = threading.Condition()
        self._prefetches: deque[_Errand] = deque()
        self._promotions: deque[_Errand] = deque()
        self._waiting_keys: set[ChunkKey] = set()  # of promotions
        self._counts = dict.fromkeys(PROMOTION_VALUES, 0)
        self._thread: threading.Thread | None = None
        self._closed = False
        self._parts_begun = self._parts_ended = 0
        self._failures = FailureLog(logger)

    # --- what is to be moved ------------------------------------------------------------------------------------------

    def loaded_from_store(self, run: Run) -> None:
        """The store delivered ``run``: it may enter the pool."""
        run = self._worth_it(run)
        if run.keys:
            moves = self._moves
            self._offer(_Errand(run, moves.chunks_from_store(run), moves.from_store, "promoted_from_store"))

    def loaded_from_pool(self, run: Run, placements: PlacementArray) -> None:
        """``run`` was read at ``placements``: what was not in VRAM of this host may be copied to this device."""
        moves = self._moves
        if not self._hits_needed or moves.are_near(placements) or not moves.own_vram():
            return
        for start, end in moves.stretches_from_afar(placements):
            worth_it = self._worth_it(run.first(end).beyond(start))
            if worth_it.keys:
                self._offer(_Errand(worth_it, moves.chunks_to_vram(run), moves.to_vram, "promoted_to_vram"))

    def prefetch(self, run: Run, handle: PrefetchHandle) -> None:
        """Brings ``run`` into the pool from the store, before any promotion; ``handle`` learns of its end."""
        moves = self._moves
        errand = _Errand(run, moves.chunks_from_store(run), moves.from_store, "promoted_from_store", handle)
        if not run.keys or not self._offer(errand):
            handle.end()

    def stats(self) -> dict[str, int]:
        """``PROMOTION_VALUES``."""
        with self._changed:
            return dict(self._counts)

    def pause(self, timeout_s: float) -> bool:
        """Waits for the end of the part that is being moved now, if there is one; whether that came in time."""
        with self._changed:
            moved = self._parts_begun
            return self._changed.wait_for(lambda: self._parts_ended >= moved, timeout_s)

    def close(self, timeout_s: float) -> bool:
        """Drops what waits, and waits for the part that is being moved; whether that ended. Harmless when repeated."""
        with self._changed:
            self._closed = True
            left = [*self._prefetches, *self._promotions]
            self._prefetches.clear()
            self._promotions.clear()
            thread = self._thread
            self._changed.notify_all()
        for errand in left:
            self._end(errand)
        if thread is not None:
            thread.join(timeout_s)
        return thread is None or not thread.is_alive()

    # --- the queue ----------------------------------------------------------------------------------------------------

    def _worth_it(self, run: Run) -> Run:
        """The leading chunks of ``run`` that were hit often enough by now."""
        if not self._hits_needed:
            return run.first(0)
        if self._heat is None:
            return run
        warm = [count >= self._hits_needed for count in self._heat.hit(run.keys)]
        return run.first(warm.index(False) if False in warm else len(warm))

    def _offer(self, errand: _Errand) -> bool:
        """Queues as much of it as there is room for; whether that is anything."""
        with self._changed:
            if errand.handle is None:
                errand.run = self._not_waiting(errand.run)
            asked = len(errand.run.keys)
            room = 0 if self._closed else max(0, self._max_items - self._counts["promotion_waiting"])
            errand.run = errand.run.first(room)
            taken = len(errand.run.keys)
            self._counts["promotion_offered"] += asked
            self._counts["promotion_dropped"] += asked - taken
            if taken:
                self._counts["promotion_waiting"] += taken
                (self._promotions if errand.handle is None else self._prefetches).append(errand)
                self._waiting_keys.update(errand.run.keys if errand.handle is None else ())
                if self._thread is None:
                    self._thread = threading.Thread(target=self._work, name="vcache-promotion", daemon=True)
                    self._thread.start()
                self._changed.notify_all()
        return taken > 0

    def _not_waiting(self, run: Run) -> Run:
        """Without the leading chunks that wait to be promoted already: the same prompt, read again meanwhile."""
        waiting = [key in self._waiting_keys for key in run.keys]
        return run.beyond(waiting.index(False) if False in waiting else len(waiting))

    def _next(self) -> _Errand | None:
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._prefetches or self._promotions)
            if self._closed:
                return None
            self._parts_begun += 1
            return (self._prefetches or self._promotions).popleft()

    def _go_on(self, errand: _Errand) -> bool:
        """Puts what is left of an errand back to where it was; whether it will be gone on with."""
        with self._changed:
            if self._closed:
                return False
            (self._promotions if errand.handle is None else self._prefetches).appendleft(errand)
            return True

    def _end(self, errand: _Errand) -> None:
        """What is left of an errand will not be tried."""
        self._settle(errand.run.keys, promotion_dropped=len(errand.run.keys))
        if errand.handle is not None:
            errand.handle.end()

    def _settle(self, keys: Sequence[ChunkKey], **amounts: int) -> None:
        with self._changed:
            self._counts["promotion_waiting"] -= len(keys)
            self._waiting_keys.difference_update(keys)
            for name, amount in amounts.items():
                self._counts[name] += amount

    # --- the thread ---------------------------------------------------------------------------------------------------

    def _work(self) -> None:
        while (errand := self._next()) is not None:
            is_over = errand.is_cancelled or self._is_over(errand)
            with self._changed:
                self._parts_ended += 1
                self._changed.notify_all()
            if is_over or not self._go_on(errand):
                self._end(errand)

    def _is_over(self, errand: _Errand) -> bool:
        """Moves one part of an errand: whether nothing is left of it that could be moved."""
        part, errand.run = errand.run.first(errand.chunks_per_part), errand.run.beyond(errand.chunks_per_part)
        try:
            # Here, not around the thread's loop: of a GPU that is broken this fails, too, and a prefetch is awaited.
            with aside_on(self._device):
                moved = errand.move(part)
        except Exception as error:
            self._failures.record("promotion", error)
            moved = Moved(lost=len(part.keys))
        self._settle(
            part.keys,
            promotion_present=moved.present,
            promotion_no_space=moved.no_space,
            promotion_lost=moved.lost,
            **{errand.counter: moved.moved},
        )
        return moved.stuck or not errand.run.keys
