"""Logging: levels and format for VCache's processes, one line per cause per interval, keys in the text form.

Loggers are the standard library's, one per module. A process of ours (server, donor, demo) gets a handler on stderr; an
application that has handlers keeps them and only the level is set.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable, Hashable, Iterable
from typing import Final

#: The packages whose loggers are ours.
PACKAGES: Final = ("vcache", "vram_metadata_server", "vcache_vllm", "vcache_lmcache")
_FORMAT: Final = "%(asctime)s.%(msecs)03d %(levelname)-7s %(role)s[%(process)d] %(name)s: %(message)s"
_MAX_CAUSES: Final = 1024


def configure(level: str, role: str) -> None:
    """Sets the level of all our loggers and gives them a handler on stderr where the application has none.

    ``role`` names this process in each line ("server", "donor cpu:0", "engine rank 0"). May be called again.
    """
    formatter = logging.Formatter(_FORMAT, datefmt="%H:%M:%S", defaults={"role": role})
    for package in PACKAGES:
        logger = logging.getLogger(package)
        logger.setLevel(level)
        ours = [handler for handler in logger.handlers if isinstance(handler, _StderrHandler)]
        if not ours and not logger.hasHandlers():
            ours = [_StderrHandler()]
            logger.addHandler(ours[0])
        for handler in ours:
            handler.setFormatter(formatter)


class _StderrHandler(logging.StreamHandler):  # type: ignore[type-arg] # generic in the stubs only
    """Writes to what ``sys.stderr`` is at that moment, and can be told from an application's own handlers."""

    def __init__(self) -> None:
        super().__init__(sys.stderr)

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


class Interval:
    """Tells when a cause was last spoken of, and counts how often it was held back since. Thread-safe, bounded."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._last: dict[Hashable, tuple[float, int]] = {}

    def held_back(self, interval_s: float, cause: Hashable) -> int | None:
        """``None`` when ``cause`` came up within the last ``interval_s`` already; else how many were held back since."""
        now = self._clock()
        with self._lock:
            said, count = self._last.get(cause, (now - interval_s, 0))
            if now - said < interval_s:
                self._last[cause] = (said, count + 1)
                return None
            self._last.pop(cause, None)  # to the end: the oldest goes first when there are too many
            self._last[cause] = (now, 0)
            if len(self._last) > _MAX_CAUSES:
                del self._last[next(iter(self._last))]
            return count


_process_wide: Final = Interval()


def log_once_per(
    interval_s: float,
    cause: Hashable,
    logger: logging.Logger,
    level: int,
    message: str,
    *arguments: object,
    memory: Interval = _process_wide,
) -> bool:
    """Logs a message unless ``cause`` was logged by this logger within ``interval_s``; says how many were held back.

    ``cause`` is one of few fixed values ("server unavailable"), never something a peer or a prompt chooses. Returns
    whether it was logged.
    """
    if not logger.isEnabledFor(level):
        return False
    held_back = memory.held_back(interval_s, (logger.name, cause))
    if held_back is None:
        return False
    if held_back:
        message += " (%d more since the last such line)"
        arguments += (held_back,)
    logger.log(level, message, *arguments, stacklevel=2)
    return True


class KeyText:
    """Chunk keys as text, made only when the line is written: ``logger.debug("stored %s", KeyText(keys))``."""

    __slots__ = ("_keys",)

    def __init__(self, keys: bytes | Iterable[bytes]) -> None:
        self._keys = keys

    def __str__(self) -> str:
        from vcache.keys import ChunkKey, format_key
        from vcache.protocol import KEY_BYTES

        blob = self._keys
        if isinstance(blob, bytes):
            keys: Iterable[bytes] = (blob[start : start + KEY_BYTES] for start in range(0, len(blob), KEY_BYTES))
        else:
            keys = blob
        return " ".join(format_key(ChunkKey(key)) for key in keys)
