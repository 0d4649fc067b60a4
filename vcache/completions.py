"""Ends stores in the background, where the copies are a GPU's: whoever stores does not wait for what the device still has to do."""

from __future__ import annotations

import threading
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING

from vcache.memory.copying import aside_on
from vcache.transfer.threads import run_anywhere

if TYPE_CHECKING:
    import torch

    from vcache.pending import PendingStore


class Completions:
    """Completes stores one after the other, in a thread of its own. Thread-safe."""

    def __init__(self, device: torch.device) -> None:
        """``device``: of the planes. On a GPU, commits go by a stream of their own, behind the copies."""
        self._device = device
        self._threads = ThreadPoolExecutor(1, "vcache-stores", run_anywhere)
        self._lock = threading.Lock()
        self._last: Future[None] | None = None

    def add(self, pending: PendingStore) -> None:
        """Completes it behind those that were added before."""
        with self._lock:
            try:
                self._last = self._threads.submit(self._complete, pending)
                return
            except RuntimeError:  # closed, or the interpreter is shutting down
                pass
        pending.complete()

    def wait(self, timeout_s: float) -> bool:
        """Until all that was added before has been completed: whether that came in time."""
        with self._lock:
            last = self._last
        if last is None:
            return True
        is_done = bool(wait([last], timeout_s).done)
        with self._lock:
            if is_done and self._last is last:
                self._last = None  # and with it the planes that it names
        return is_done

    def close(self) -> None:
        """What was added is completed still."""
        self._threads.shutdown(wait=False)

    def _complete(self, pending: PendingStore) -> None:
        try:
            with aside_on(self._device):
                pending.complete()
        finally:
            pending.complete()  # where the device has no stream to give any more; else it is harmless
