"""A donor's side: the companion that offers its segment to other hosts, and what the donor is to announce of it.

The segment is in memory that both map, so a read by another host costs the donor nothing, and a donor that is busy or
stopped is no hindrance. Torch-free: a stand-alone donor of host memory never loads it.

A segment on a GPU is mapped as any other process would, and offered only if the engine takes it: that depends on its build and, over RDMA, on
driver and network card. **This has not yet run on a GPU.**
"""

from __future__ import annotations

import logging
import math
import threading
import time
from typing import TYPE_CHECKING, Final

from vcache.companion.companion import Companion
from vcache.companion.link import LinkClosedError
from vcache.failures import FailureLog
from vcache.memory.base import is_host
from vcache.remote.engine_choice import engine_environment, engine_setup, reads_gpu_memory, require_engine
from vcache.remote.wire import DECODER, Serve

if TYPE_CHECKING:
    from vcache.config import VCacheConfig
    from vcache.memory.base import Memory

logger = logging.getLogger(__name__)

#: Between the end of a companion and the start of the next.
RESTART_S: Final = 5.0


class Offer:
    """Starts its companion at once and waits for nothing: a thread of its own does, which ends then. Thread-safe."""

    def __init__(self, config: VCacheConfig, memory: Memory) -> None:
        """Raises ``ConfigError`` when the engine is not installed."""
        require_engine()
        self._config = config
        self._memory = memory
        self._failures = FailureLog(logger)
        self._companion: Companion | None = None
        self._was_ready = False
        self._start_at = 0.0
        self._is_starting = False
        self._lock = threading.Lock()
        self._closed = False
        self.announcement()

    def announcement(self) -> bytes:
        """What to tell other hosts now: nothing, while there is no companion or it is not ready. Never waits."""
        with self._lock:
            is_due = not self._is_starting and not self._closed and time.monotonic() >= self._start_at
            if self._companion is None and is_due:
                self._is_starting = True
                threading.Thread(target=self._start, name="vcache-offer", daemon=True).start()
            if self._companion is None:
                return b""
            try:
                ready = self._companion.ready()
            except LinkClosedError as error:
                self._companion.kill()
                self._companion, self._start_at = None, time.monotonic() + RESTART_S
                if self._was_ready or is_host(self._memory.device):
                    self._failures.record("offer a segment to other hosts", error)
                else:  # another attempt would not end otherwise
                    self._start_at = math.inf
                    _not_offered(self._memory, str(error))
                return b""
            self._was_ready |= ready is not None
            return ready.said if ready is not None else b""

    def close(self) -> None:
        """Other hosts cannot read the segment any more. Harmless when called twice."""
        with self._lock:
            self._closed = True
            if self._companion is not None:
                self._companion.kill()
                self._companion = None

    def _start(self) -> None:
        """Finds this host's address, which may take as long as names take to resolve, and starts a companion."""
        companion = None
        try:
            companion = self._started()
        except Exception as error:  # said by FailureLog; a later attempt may do better
            self._failures.record("offer a segment to other hosts", error)
        with self._lock:
            self._is_starting = False
            if self._closed and companion is not None:
                companion.kill()
            elif companion is not None:
                self._companion = companion
            else:
                self._start_at = time.monotonic() + RESTART_S

    def _started(self) -> Companion:
        setup = engine_setup(self._config)
        memory = self._memory
        return Companion(
            "vcache.remote.serving_process",
            Serve(setup, str(self._config.runtime_path), memory.device, memory.handle, memory.nbytes),
            DECODER,
            fds=(),
            environment=engine_environment(self._config, setup),
            lanes=0,
        )


def open_offer(config: VCacheConfig, memory: Memory) -> Offer | None:
    """The offer of a segment, or ``None``: ``transfer.remote`` is none, or the memory is a GPU's and the engine cannot read that."""
    if config.transfer.remote == "none":
        return None
    if not is_host(memory.device) and not reads_gpu_memory():
        _not_offered(memory, "the installed Mooncake was built without CUDA; docs/remote.md says which one is")
        return None
    return Offer(config, memory)


def _not_offered(memory: Memory, why: str) -> None:
    logger.warning("the segment on %s is not offered to other hosts (%s)", memory.device, why)
