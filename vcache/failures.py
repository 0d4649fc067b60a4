"""What happens to errors on a serving path: counted, logged once per cause per interval, and turned into a miss.

The cache may fail, serving may not: whatever the pool, the server, a donor or the store raises ends here.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Final

LOG_INTERVAL_S: Final = 30.0


class FailureLog:
    """Counts failures and says each cause at most once per interval, with how many went unsaid. Thread-safe."""

    def __init__(
        self,
        logger: logging.Logger,
        *,
        interval_s: float = LOG_INTERVAL_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._logger = logger
        self._interval_s = interval_s
        self._clock = clock
        self._lock = threading.Lock()
        self._said: dict[str, tuple[float, int]] = {}  # cause -> when it was last said, how often it came since
        self._total = 0

    @property
    def total(self) -> int:
        return self._total

    def record(self, operation: str, error: BaseException) -> None:
        """One failure of ``operation``. The traceback goes to the log at DEBUG."""
        cause = f"{operation}: {type(error).__name__}"
        now = self._clock()
        with self._lock:
            self._total += 1
            said_at, unsaid = self._said.get(cause, (-self._interval_s, 0))
            silent = now - said_at < self._interval_s
            self._said[cause] = (said_at, unsaid + 1) if silent else (now, 0)
        if silent:
            self._logger.debug("%s again: %s", cause, error, exc_info=error)
            return
        more = f" ({unsaid} more since the last such line)" if unsaid else ""
        self._logger.warning("%s: %s; serving goes on without the cache%s", cause, error, more)
        self._logger.debug("where %s came from", cause, exc_info=error)
