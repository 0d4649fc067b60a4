"""Calls that can be given up on: worker threads that may hang, and the deadline of whoever waits for them.

A thread cannot be taken back from a call that hangs in a system call or a library. So a call is abandoned, never cancelled
once begun: its waiter goes on, its thread is not used for anything else until it returns, and what it was given (buffers,
above all) stays its own until then. The number of threads is bounded, so hung ones do not pile up; when all hang, further
calls end unbegun at their deadline. Threads are daemons: a hung one does not keep the process from exiting.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from enum import Enum, auto
from typing import Generic, TypeVar

Result = TypeVar("Result")
#: On its way from a call's work to its waiter; ``None`` is the end.
News = queue.SimpleQueue[Callable[[], None] | None]


class Ended(Enum):
    """How a call ended for its waiter."""

    DONE = auto()  # it returned or raised
    OVERDUE = auto()  # it was begun and runs on; what it was given is still its own
    UNBEGUN = auto()  # no thread was free; it will never run


class Call(Generic[Result]):
    """One piece of work, from being queued to being settled exactly once.

    ``abandoned`` runs when nobody waits any more *and* the work is not running (any more): it gives back what the work
    was given. It does not run when the waiter sees ``DONE``.
    """

    def __init__(self, work: Callable[[], Result], abandoned: Callable[[], None], news: News | None = None) -> None:
        """``news``: what the work puts there is called by the waiter, if it still waits then. It must not raise."""
        self._work = work
        self._abandoned = abandoned
        self._lock = threading.Lock()
        self._news: News = queue.SimpleQueue() if news is None else news
        self._begun = False
        self._finished = False
        self._given_up = False
        self.error: BaseException | None = None
        self._results: list[Result] = []

    @property
    def result(self) -> Result:
        """What the work returned; raises what it raised. Only after ``DONE``."""
        if self.error is not None:
            raise self.error
        return self._results[0]

    def run(self) -> None:
        """The worker's side. Raises nothing."""
        with self._lock:
            if self._given_up:
                return
            self._begun = True
        try:
            self._results.append(self._work())
        except BaseException as error:
            self.error = error
        with self._lock:
            self._finished = True
            given_up = self._given_up
        self._news.put(None)
        if given_up:
            self._abandoned()

    def wait(self, timeout_s: float) -> Ended:
        """The waiter's side, once. What the work has it call takes of its time."""
        deadline = time.monotonic() + timeout_s
        try:
            while (reaction := self._news.get(timeout=max(0.0, deadline - time.monotonic()))) is not None:
                reaction()
            return Ended.DONE
        except queue.Empty:
            pass
        with self._lock:
            if self._finished:
                return Ended.DONE
            self._given_up = True
            begun = self._begun
        if begun:
            return Ended.OVERDUE
        self._abandoned()
        return Ended.UNBEGUN


class Workers:
    """A bounded number of daemon threads, started as they are needed."""

    def __init__(self, name: str, threads: int) -> None:
        self._name = name
        self._limit = threads
        self._queue: queue.SimpleQueue[Call[object] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._threads = 0
        self._waiting = 0  # calls queued or running

    @property
    def busy(self) -> int:
        """Calls queued or running, abandoned ones that still run included."""
        return self._waiting

    def submit(self, call: Call[Result]) -> Call[Result]:
        with self._lock:
            self._waiting += 1
            start = self._threads < min(self._waiting, self._limit)
            self._threads += start
        self._queue.put(call)  # type: ignore[arg-type]  # its result is not looked at here
        if start:
            threading.Thread(target=self._work, name=self._name, daemon=True).start()
        return call

    def close(self) -> None:
        """Lets the threads end after the calls queued before this."""
        with self._lock:
            threads, self._limit = self._threads, 0
        for _ in range(threads):
            self._queue.put(None)

    def _work(self) -> None:
        while (call := self._queue.get()) is not None:
            call.run()
            with self._lock:
                self._waiting -= 1
