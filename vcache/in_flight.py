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

    @property
    def closed(self) -> bool:
        return self._closed

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

    def close(self, timeout_s: float) -> tuple[bool, int]:
        """Closes, and waits at most ``timeout_s``: whether this call was the first to close, and how many stayed inside."""
        deadline = time.monotonic() + timeout_s
        with self._changed:
            first, self._closed = not self._closed, True
            self._changed.wait_for(lambda: self._inside == 0, timeout=max(0.0, deadline - time.monotonic()))
            return first, self._inside
