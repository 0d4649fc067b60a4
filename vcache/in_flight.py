"""Counts the calls under way, so that closing waits for them instead of unmapping memory beneath a copy."""

from __future__ import annotations

import threading
import time


class InFlight:
    """Calls enter and leave; ``close`` lets no more in and waits for those inside. Thread-safe."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._inside = 0
        self._closed = False

    def enter(self) -> bool:
        """Whether the call may go on; it must then ``leave`` exactly once."""
        with self._changed:
            if self._closed:
                return False
            self._inside += 1
            return True

    def leave(self) -> None:
        with self._changed:
            self._inside -= 1
            self._changed.notify_all()

    def close(self, timeout_s: float) -> int:
        """Lets no more calls in, and waits at most ``timeout_s`` for those inside; how many stayed."""
        deadline = time.monotonic() + timeout_s
        with self._changed:
            self._closed = True
            self._changed.wait_for(lambda: self._inside == 0, timeout=max(0.0, deadline - time.monotonic()))
            return self._inside
