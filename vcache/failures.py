"""What happens to errors on a serving path: counted, logged once per cause per interval, and turned into a miss.

The cache may fail, serving may not: whatever the pool, the server, a donor or the store raises ends here.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from vcache.log import Interval, log_once_per

LOG_INTERVAL_S: Final = 30.0


class FailureLog:
    """Counts failures and says each cause (an operation and a kind of error) once per interval. Thread-safe."""

    def __init__(self, logger: logging.Logger, *, interval_s: float = LOG_INTERVAL_S) -> None:
        self._logger = logger
        self._interval_s = interval_s
        self._memory = Interval()
        self._lock = threading.Lock()
        self._total = 0

    @property
    def total(self) -> int:
        return self._total

    def record(self, operation: str, error: BaseException) -> None:
        """One failure of ``operation``. The traceback goes to the log at DEBUG."""
        with self._lock:
            self._total += 1
        kind = type(error).__name__
        log_once_per(
            self._interval_s,
            (operation, kind),
            self._logger,
            logging.WARNING,
            "%s failed (%s: %s); serving goes on without the cache",
            operation,
            kind,
            error,
            memory=self._memory,
        )
        self._logger.debug("%s failed", operation, exc_info=error)

    @contextmanager
    def contained(self, operation: str) -> Iterator[None]:
        """Runs a block; an exception in it is recorded and goes no further."""
        try:
            yield
        except Exception as error:
            self.record(operation, error)
