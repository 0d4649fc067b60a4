"""A thread beside the forward pass, and on a GPU a stream beside its stream: where the server and the copies are waited for.

Tasks run one after the other. Not here: what they are (``stores.py``, ``loads.py``).

A lane for the host (``torch.device("cpu")``) has no stream, and its tasks wait for nothing but what they ask for themselves.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Final, TypeVar

import torch

from vcache.failures import FailureLog
from vcache.memory.copying import aside_on
from vcache.transfer.threads import run_anywhere

T = TypeVar("T")
#: Long enough for any task: each waits for the server or a store with a deadline of its own.
FLUSH_TIMEOUT_S: Final = 60.0


class Lane:
    """Runs tasks in the order in which they were given. Errors of a task go to ``failures`` and become ``otherwise``."""

    def __init__(self, name: str, device: torch.device, failures: FailureLog) -> None:
        self._name = name
        self._device = device
        self._failures = failures
        # vLLM pins its own thread to one CPU, and a thread started from there would stay on it.
        self._threads = ThreadPoolExecutor(1, f"vcache-{name}", run_anywhere)

    def run(self, task: Callable[[], T], otherwise: T) -> Future[T]:
        """Runs ``task`` once what the caller's stream has now been given is done; its own copies are done when it ends."""
        happened: torch.cuda.Event | None = None
        if self._device.type == "cuda":
            happened = torch.cuda.Event()  # type: ignore[no-untyped-call]
            happened.record()
        try:
            return self._threads.submit(self._run, task, otherwise, happened)
        except RuntimeError:  # closed, or the interpreter is shutting down
            nothing: Future[T] = Future()
            nothing.set_result(otherwise)
            return nothing

    def flush(self, timeout_s: float = FLUSH_TIMEOUT_S) -> bool:
        """Waits until everything given before is done: whether that came in time."""
        done = self.run(lambda: None, None)
        with contextlib.suppress(TimeoutError):
            done.result(timeout_s)
        return done.done()

    def close(self, timeout_s: float) -> None:
        """Finishes what was begun, and drops what was not in time."""
        self.flush(timeout_s)
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _run(self, task: Callable[[], T], otherwise: T, happened: torch.cuda.Event | None) -> T:
        try:
            if happened is None:
                return task()
            with aside_on(self._device):
                stream = torch.cuda.current_stream(self._device)
                stream.wait_event(happened)
                result = task()
                stream.synchronize()
                return result
        except Exception as error:
            self._failures.record(self._name, error)
            return otherwise
