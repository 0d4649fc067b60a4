"""Stores without waiting: the server is asked before the forward pass that fills the blocks, and told after it.

The life of a store, by thread:

* before the forward pass: the question goes to a thread of its own (``Lane``), which waits for the server's answer, and for no device;
* after it, on the forward thread: what was granted by then is copied out of the blocks. This is all the forward thread ever
  does: on a CPU a copy within memory, on a GPU a kernel enqueued on its stream. From then on vLLM may do with the blocks what
  it likes, so no block is ever held back from it;
* on a third: the commit, once the copy is done. It waits for the device, which must not keep the next questions waiting.

An answer that is late is used after one of the next forward passes, as long as the request still has its blocks; if it has
not come when they are given away, the chunks are not stored, and counted.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from vcache_vllm.lane import Lane

if TYPE_CHECKING:
    from vcache.engine import VCacheEngine
    from vcache.keys import ChunkKey
    from vcache.pending import PendingStore
    from vcache_vllm.counters import ConnectorCounters
    from vcache_vllm.metadata import StoreOrder


@dataclass(frozen=True, eq=False)
class _Store:
    order: StoreOrder
    answer: Future[PendingStore | None]


class Stores:
    """The stores of one worker. All calls but those on the lanes come from the forward thread."""

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
                self._counters.add(late_chunks=len(store.order.keys))
                self._drop(store)
        self._open += [_Store(order, self._asking.run(partial(self._reserve, order), None)) for order in orders]
        self._this_step = len(orders)

    def after_step(self) -> None:
        """After the forward pass: copies all that the server has answered by now."""
        self._open = self._copy_answered(self._open)
        self._this_step = 0

    def abandon_step(self) -> None:
        """After a forward pass that computed on garbage: what it was to fill is not stored."""
        before = len(self._open) - self._this_step
        for store in self._open[before:]:
            self._drop(store)
        self._open = self._open[:before]
        self.after_step()

    def close(self) -> None:
        """Gives back what was asked for and not copied. To be called before the lanes are closed."""
        left, self._open = self._open, []
        self._this_step = 0
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
            elif (pending := store.answer.result()) is not None:
                pending.copy_from(store.order.blocks)
                self._committing.run(partial(self._commit, store.order, pending), None)
        return unanswered

    def _drop(self, store: _Store) -> None:
        """Gives back what it was or will be granted, on the lane that asks: there the answer has come by then."""

        def give_back() -> None:
            if (pending := store.answer.result()) is not None:
                pending.complete()

        self._asking.run(give_back, None)

    def _commit(self, order: StoreOrder, pending: PendingStore) -> None:
        granted = [order.keys[index] for write in pending.writes for index in write.granted.tolist()]
        stored = pending.complete()
        self._counters.add(stored_chunks=stored, stored_bytes=stored * self._chunk_bytes)
        if stored == len(granted):
            self._stored += granted
