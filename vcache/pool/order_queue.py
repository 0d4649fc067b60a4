"""A donor's orders to copy, carried out a few at a time by a thread of its own: never by the one that sends heartbeats."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING, Final, Generic, Protocol, TypeVar

from vcache.failures import FailureLog
from vcache.memory.copying import aside

if TYPE_CHECKING:
    from vcache.memory.base import Memory

logger = logging.getLogger(__name__)

#: Orders carried out before the server is told of them.
_BATCH: Final = 32
#: Before what could not be carried out is tried again: the server makes room meanwhile.
_RETRY_S: Final = 0.05


class HasGeneration(Protocol):
    """What tells one order from another."""

    @property
    def generation(self) -> int: ...


Order = TypeVar("Order", bound=HasGeneration)


class OrderQueue(Generic[Order]):
    """Owns one daemon thread, started by the first order. Thread-safe; never raises on the caller's side.

    ``work`` gets the segment's number and orders that have ``kind_of`` in common, and answers those to be tried again. What it
    fails on is dropped: the server orders it again, or gives it up.
    """

    def __init__(
        self,
        name: str,
        memory: Memory,
        work: Callable[[int, list[Order]], Sequence[Order]],
        kind_of: Callable[[Order], Hashable] = lambda order: None,
    ) -> None:
        """``memory``: what is copied from or to."""
        self._name = name
        self._memory = memory
        self._work = work
        self._kind_of = kind_of
        self._failures = FailureLog(logger)
        self._changed = threading.Condition()
        self._number = 0
        self._waiting: dict[int, Order] = {}  # by generation
        self._busy: frozenset[int] = frozenset()
        self._closed = False
        self._thread: threading.Thread | None = None

    def put(self, number: int, orders: Sequence[Order]) -> None:
        """Takes orders for the segment, which has this number now; those known already are no others."""
        with self._changed:
            if self._closed:
                return
            self._number = number
            self._waiting |= {order.generation: order for order in orders if order.generation not in self._busy}
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name=f"vcache-{self._name}", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def forget(self) -> None:
        """The segment begins another life, or another server's: what was ordered is ordered no more."""
        with self._changed:
            self._waiting.clear()

    def close(self, timeout_s: float) -> bool:
        """Ends after what is being copied now; whether that came in time. Harmless when repeated."""
        with self._changed:
            self._closed = True
            self._waiting.clear()
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(timeout_s)
        return self._thread is None or not self._thread.is_alive()

    # --- the thread -----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while (batch := self._next()) is not None:
            number, orders = batch
            again: Sequence[Order] = ()
            try:
                with aside(self._memory):  # of a GPU that is broken this fails, too, and must not end the thread
                    again = self._work(number, orders)
            except Exception as error:  # the server orders them again, or gives them up
                self._failures.record(self._name, error)
            if again:
                self._wait_for_room(again)

    def _next(self) -> tuple[int, list[Order]] | None:
        with self._changed:
            self._busy = frozenset()
            self._changed.wait_for(lambda: self._waiting or self._closed)
            if self._closed:
                return None
            kind = self._kind_of(next(iter(self._waiting.values())))
            orders = [order for order in self._waiting.values() if self._kind_of(order) == kind][:_BATCH]
            self._busy = frozenset(order.generation for order in orders)
            for generation in self._busy:
                del self._waiting[generation]
            return self._number, orders

    def _wait_for_room(self, orders: Sequence[Order]) -> None:
        with self._changed:
            self._waiting |= {order.generation: order for order in orders}
            self._changed.wait_for(lambda: self._closed, _RETRY_S)
