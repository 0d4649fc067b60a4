"""Stores without waiting: the server is asked before the forward pass that fills the blocks, and told after it.

The life of a store, by thread:

* before the forward pass: the question goes to a thread of its own (``Lane``), which waits for the server's answer, and for no device;
* after it, on the forward thread: what was granted by then is copied out of the blocks. This is all the forward thread ever
  does: on a CPU a copy within memory, on a GPU a kernel enqueued on its stream. From then on vLLM may do with the blocks what
  it likes, so no block is ever held back from it;
* on a third: the commit, once the copy is done. It waits for the device, which must not keep the next questions waiting.

An answer that is late is used after one of the next forward passes, as long as the request still has its blocks; if it has
not come when they are given away, the chunks are not stored, and counted. Nor are they when no forward pass comes for a while: a
removal waits for whoever holds space.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Final

from vcache_vllm.lane import Lane

if TYPE_CHECKING:
    from vcache.engine import VCacheEngine
    from vcache.keys import ChunkKey
    from vcache.pending import PendingStore
    from vcache_vllm.counters import ConnectorCounters
    from vcache_vllm.metadata import StoreOrder


#: How long the space for a store that missed its forward pass is held for the next one.
HOLD_S: Final = 2.0


@dataclass(frozen=True, eq=False)
class _Store:
    order: StoreOrder
    answer: Future[PendingStore | None]
    _taken: threading.Lock = field(default_factory=threading.Lock)

    def take(self) -> bool:
        """True for the first who asks: who copies it, or gives it back."""
        return self._taken.acquire(blocking=False)


class Stores:
    """The stores of one worker. All calls but those on the lanes, and of a timer, come from the forward thread."""

    def __init__(
        self, engine: VCacheEngine, asking: Lane, committing: Lane, counters: ConnectorCounters, *, chunk_bytes: int
    ) -> None:
        """``asking``: a lane for the host; ``committing``: one for the tensors' device."""
        self._engine = engine
        self._asking = asking
        self._committing = committing
        self._counters = counters
        self._chunk_bytes = chunk_bytes
        self._open: list[_Store] = []  # asked for and not copied; the present step's come last
        self._this_step = 0  # how many of them are the present step's
        self._stored: list[ChunkKey] = []

    def before_step(self, orders: Sequence[StoreOrder], gone: frozenset[str]) -> None:
        """Before anything of the step is written: ends the stores of requests that are ``gone``, asks for the new ones."""
        if gone:
            leaving = [store for store in self._open if store.order.request_id in gone]
            self._open = [store for store in self._open if store.order.request_id not in gone]
            for store in self._copy_answered(leaving):
                self._drop_late(store)
        self._open += [_Store(order, self._asking.run(partial(self._reserve, order), None)) for order in orders]
        self._this_step = len(orders)

    def after_step(self) -> None:
        """After the forward pass: copies all that the server has answered by now."""
        before = len(self._open) - self._this_step
        earlier, missed = self._copy_answered(self._open[:before]), self._copy_answered(self._open[before:])
        self._open, self._this_step = earlier + missed, 0
        if missed:
            timer = threading.Timer(HOLD_S, self._hold_no_longer, [missed])
            timer.daemon = True
            timer.start()

    def abandon_step(self) -> None:
        """After a forward pass that computed on garbage: what it was to fill is not stored."""
        before = len(self._open) - self._this_step
        for store in self._open[before:]:
            self._drop(store)
        self._open, self._this_step = self._open[:before], 0
        self.after_step()

    def give_back(self) -> None:
        """Ends all stores that were asked for and not copied. To be called before the lanes are closed."""
        left, self._open, self._this_step = self._open, [], 0
        for store in left:
            self._drop(store)

    def take_stored(self) -> frozenset[ChunkKey]:
        """The chunks committed since the last call."""
        count = len(self._stored)  # the lane may be adding to them
        stored = frozenset(self._stored[:count])
        del self._stored[:count]
        return stored

    def _reserve(self, order: StoreOrder) -> PendingStore | None:
        return self._engine.reserve_store(order.keys, order.parent, salt=order.salt)

    def _copy_answered(self, stores: Iterable[_Store]) -> list[_Store]:
        """Copies what can be copied; what has no answer yet."""
        unanswered = []
        for store in stores:
            if not store.answer.done():
                unanswered.append(store)
            elif store.take() and (pending := store.answer.result()) is not None:
                pending.copy_from(store.order.blocks)
                self._committing.run(partial(self._commit, store.order, pending), None)
        return unanswered

    def _hold_no_longer(self, stores: Sequence[_Store]) -> None:
        for store in stores:
            self._drop_late(store)

    def _drop_late(self, store: _Store) -> None:
        if self._drop(store):
            self._counters.add(late_chunks=len(store.order.keys))

    def _drop(self, store: _Store) -> bool:
        """Gives back what it was or will be granted, on the lane that asks: there the answer has come by then. False when it was
        copied or dropped already."""

        def give_back() -> None:
            if (pending := store.answer.result()) is not None:
                pending.complete()

        is_mine = store.take()
        if is_mine:
            self._asking.run(give_back, None)
        return is_mine

    def _commit(self, order: StoreOrder, pending: PendingStore) -> None:
        granted = [order.keys[index] for write in pending.writes for index in write.granted.tolist()]
        stored = pending.complete()
        self._counters.add(stored_chunks=stored, stored_bytes=stored * self._chunk_bytes)
        if stored == len(granted):
            self._stored += granted
