"""A prefix on its way from the store into the pool, as whoever asked for it sees it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import Final

#: How long ``wait`` waits unless told.
WAIT_TIMEOUT_S: Final = 60.0


class PrefetchHandle:
    """``wait`` for it, ``await`` it, or ``cancel`` it; or forget it, it goes on in the background. Thread-safe.

    Its answer is how many leading chunks of the prompt the pool now has with all ranks' shards, so that any client finds
    them: fewer than asked for where the store had no more, the pool had no room, or it was cancelled.
    """

    def __init__(self, in_pool: Callable[[], int]) -> None:
        """``in_pool``: asks the server how many leading chunks there are. Raises nothing."""
        self._in_pool = in_pool
        self._cancelled = threading.Event()
        self._ended: Future[int] = Future()
        self._ended.set_running_or_notify_cancel()  # whoever stops awaiting it does not stop it

    @property
    def done(self) -> bool:
        """Whether it has ended, one way or the other."""
        return self._ended.done()

    @property
    def cancelled(self) -> bool:
        """Whether ``cancel`` was called before it ended."""
        return self._cancelled.is_set()

    def wait(self, timeout_s: float = WAIT_TIMEOUT_S) -> int:
        """Waits for its end; how many leading chunks are in the pool. After the time-out: how many there are by then."""
        try:
            return self._ended.result(timeout_s)
        except FutureTimeoutError:
            return self._in_pool()

    def cancel(self) -> None:
        """Begins nothing more of it. The few chunks that are being moved stay in the pool. Harmless at any time."""
        if not self.done:
            self._cancelled.set()

    def __await__(self) -> Generator[object, None, int]:
        import asyncio

        return asyncio.wrap_future(self._ended).__await__()

    def end(self) -> None:
        """For whoever carries it out: nothing more will come."""
        if not self._ended.done():
            self._ended.set_result(self._in_pool())
