"""A reading process's side: the companion that reads, and the staging memory that it reads into.

Evidence, as everywhere: a block that a read may still write into stays held until the companion has said that the read is
over; one whose read *failed*, until the companion has ended (112 MB were seen to arrive after a read of 128 MB had failed).
When such blocks add up, the companion is replaced.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Sequence
from enum import Enum
from typing import TYPE_CHECKING, Final, NamedTuple

from vcache.companion.companion import Call, Companion
from vcache.companion.link import LinkClosedError
from vcache.errors import VCacheError
from vcache.failures import FailureLog
from vcache.remote.engine_choice import engine_environment, engine_setup, require_engine
from vcache.remote.wire import DECODER, READ, STRANGER, Fetch, ReadFor

if TYPE_CHECKING:
    from vcache.config import VCacheConfig
    from vcache.store.staging import Block, Staging

logger = logging.getLogger(__name__)

#: Of staging memory: what failed and late reads may keep before the companion is replaced.
WITHHELD_SHARE: Final = 4
READING_MODULE = "vcache.remote.reading_process"
#: Between the end of a companion and the start of the next.
RESTART_S: Final = 1.0


#: A companion that does not even answer an empty ask for so long hangs as a whole, and is replaced.
ECHO_S: Final = 2.0
_NOTHING: Final = Fetch("", 0, [], [], blocks=0)


class Outcome(Enum):
    """What became of a read."""

    READ = "read"
    FAILED = "failed"  # the peer did not deliver, or not in time
    LOST = "lost"  # nobody asked the peer, or nobody heard the answer: this says nothing about it


class Reading:
    """A read under way. Its blocks are the caller's once ``outcome`` is ``READ``; else they hold nothing one may use."""

    def __init__(self, reader: RemoteReader, companion: Companion, call: Call) -> None:
        self._reader = reader
        self._companion = companion
        self._call = call

    def is_over(self, wait_s: float = 0.0) -> bool:
        """Whether ``outcome`` would not wait, waiting so long for that. For any number of threads."""
        return self._call.is_answered(wait_s)

    def outcome(self, timeout_s: float) -> Outcome:
        """To be asked once. Waits at most so long."""
        answer = self._call.answer(timeout_s)
        if self._call.is_lost:  # that was not the peer's doing
            self._reader.replace(self._companion)
            return Outcome.LOST
        if answer is None:
            self._reader.suspect(self._companion)
            return Outcome.FAILED
        code = answer.codes[0] if answer.codes else STRANGER
        if code == STRANGER:  # a new companion will know better
            self._reader.replace(self._companion)
            return Outcome.LOST
        return Outcome.READ if code == READ else Outcome.FAILED


class _Echo(NamedTuple):
    """An empty ask under way, to see whether the companion goes on."""

    call: Call
    due: float


class RemoteReader:
    """Starts a companion when first asked, and a new one where that ended. Thread-safe; never waits but where it says so."""

    def __init__(self, config: VCacheConfig) -> None:
        """Raises ``ConfigError`` when the engine is not installed."""
        require_engine()
        self._config = config
        self._lock = threading.Lock()
        self._failures = FailureLog(logger)
        self._companion: Companion | None = None
        self._staging: Staging | None = None
        self._start_at = 0.0
        self._echo: _Echo | None = None
        self._closed = False

    @property
    def staging(self) -> Staging:
        """Where reads go. Valid once ``is_ready`` or ``wait_ready`` was true."""
        assert self._staging is not None, "asked for before it was ready"
        return self._staging

    def is_ready(self, wait_s: float = 0.0) -> bool:
        """Whether reads can begin, waiting so long for it; starts what is missing."""
        deadline = time.monotonic() + wait_s
        while (companion := self._current()) is not None:
            left_s = deadline - time.monotonic()
            try:
                # In short turns: whoever else asks holds no lock meanwhile, and a companion that ends is noticed.
                if companion.ready(min(max(0.0, left_s), 0.05)) is not None:
                    return True
            except LinkClosedError as error:
                self._failures.record("read from other hosts", error)
                self.replace(companion)
                return False
            if left_s <= 0:
                return False
        return False

    def begin(self, ask: Fetch, blocks: Sequence[Block]) -> Reading | None:
        """Begins a read into ``blocks`` of ``staging``; ``None`` when it cannot."""
        with self._lock:
            companion = self._companion
            if self._echo is not None and self._echo.call.is_answered():
                self._echo.call.answer(0.0)
                self._echo = None
            hangs = self._echo is not None and time.monotonic() > self._echo.due
        if companion is None:
            return None
        if hangs:
            logger.warning("replacing the process that reads from other hosts: it hangs")
            self.replace(companion)
            return None
        if companion.withheld_bytes > self.staging.nbytes // WITHHELD_SHARE:
            logger.warning("replacing the process that reads from other hosts, to take back the memory of failed reads")
            self.replace(companion)
            return None
        try:
            return Reading(self, companion, companion.begin(ask, blocks))
        except LinkClosedError as error:  # all lanes are late
            self._failures.record("read from other hosts", error)
            self.replace(companion)
            return None

    def suspect(self, companion: Companion) -> None:
        """For readings: an answer is late. Whether that is a peer's doing, or the companion's, an echo will tell."""
        with self._lock:
            if self._companion is companion and self._echo is None:
                with contextlib.suppress(LinkClosedError):  # it ended, or has no lane left: the next read finds out
                    self._echo = _Echo(companion.begin(_NOTHING, []), time.monotonic() + ECHO_S)

    def replace(self, companion: Companion) -> None:
        """Ends ``companion``, so that another one is started."""
        with self._lock:
            if self._companion is companion:
                self._companion, self._start_at = None, time.monotonic() + RESTART_S
                self._echo = None
        companion.kill()

    def close(self) -> None:
        """Ends the companion, and with it every read. Harmless when called twice."""
        with self._lock:
            self._closed = True
            companion, self._companion = self._companion, None
            staging = self._staging
        if companion is not None:
            companion.kill()
        if staging is not None:
            staging.close()

    def _current(self) -> Companion | None:
        with self._lock:
            if self._closed:
                return None
            if self._companion is None and time.monotonic() >= self._start_at:
                try:
                    self._companion = self._started()
                except (OSError, VCacheError) as error:
                    self._failures.record("read from other hosts", error)
                    self._start_at = time.monotonic() + RESTART_S
            return self._companion

    def _started(self) -> Companion:
        if self._staging is None:
            from vcache.store.staging import Staging  # loads torch

            self._staging = Staging(self._config.transfer.staging_size, setting="transfer.staging_size")
        setup = engine_setup(self._config)
        return Companion(
            READING_MODULE,
            ReadFor(setup, self._staging.nbytes),
            DECODER,
            fds=(self._staging.fd,),
            environment=engine_environment(self._config, setup),
        )
