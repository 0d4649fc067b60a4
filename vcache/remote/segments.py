"""The segments of other hosts that this process can read, by (segment id, incarnation), as ``pool/mappings.py`` has this host's.

*Opening* one means to read its header through the engine, which is all that a mapping is here. A segment whose donor did not
deliver in time is dropped, and opened again in the background after a delay that doubles: a dead donor costs its readers
one deadline, and then only hits.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from vcache.errors import CorruptionError, UnavailableError
from vcache.failures import FailureLog
from vcache.pool.segment import DIRECTORY_OFFSET, HEADER_WORDS, PAGE_BYTES, checked_header
from vcache.remote.announcement import Announcement, announcement_of
from vcache.remote.reader import Outcome, Reading, RemoteReader
from vcache.remote.wire import Fetch, Stretch

if TYPE_CHECKING:
    from vcache.config import VCacheConfig
    from vcache.protocol import SegmentInfo
    from vcache.store.staging import Block

logger = logging.getLogger(__name__)

Identity = tuple[bytes, int]
#: How long a donor that failed is left alone: at first, and at most.
FIRST_DELAY_S: Final = 1.0
LONGEST_DELAY_S: Final = 30.0
#: Another thread may take the answer that one waits for: each looks again after this.
_TURN_S: Final = 0.05


@dataclass(frozen=True, slots=True)
class RemoteSegment:
    """A segment of another host whose header was read."""

    info: SegmentInfo
    where: Announcement
    data_offset: int
    records: int

    def contains(self, offset: int, nbytes: int) -> bool:
        """Whether an extent lies within the segment's data."""
        return self.data_offset <= offset and nbytes > 0 and offset + nbytes <= self.info.nbytes

    def record_offset(self, record: int, record_bytes: int) -> int:
        """Where a record lies. Raises ``IndexError`` for one that the directory does not have."""
        if not 0 <= record < self.records:
            raise IndexError(f"record {record}: the directory has {self.records}")
        return DIRECTORY_OFFSET + record * record_bytes


class _Opening:
    """A header on its way."""

    def __init__(self, reading: Reading, block: Block, deadline: float) -> None:
        self.reading = reading
        self.block = block
        self.deadline = deadline


class _Entry:
    def __init__(self, info: SegmentInfo, where: Announcement | None) -> None:
        self.info = info
        self.where = where
        self.segment: RemoteSegment | None = None
        self.opening: _Opening | None = None
        self.failures = 0  # in a row, since bytes last came
        self.retry_at = 0.0
        self.await_until: float | None = None  # set at its first use: nobody waits for a donor that did not come

    def is_awaited(self, now: float) -> bool:
        may_come = self.segment is None and not self.failures
        return may_come and self.await_until is not None and now < self.await_until


class RemoteSegments:
    """Thread-safe. ``close`` ends all reads. What it does on the way to an answer is said by its counters."""

    def __init__(self, config: VCacheConfig, count: Callable[[str, int], None]) -> None:
        """Raises ``ConfigError`` when the engine is not installed. ``count`` adds to a counter."""
        self.reader = RemoteReader(config)
        self.timeout_s: Final = config.transfer.remote_timeout
        self.count = count
        self._engine = config.transfer.remote
        self._lock = threading.Lock()
        self._entries: dict[Identity, _Entry] = {}
        self._failures = FailureLog(logger)

    def use(self, infos: Iterable[SegmentInfo]) -> Mapping[int, RemoteSegment]:
        """Those of these segments that can be read now, by number.

        Those never asked for before are waited for, together, at most ``transfer.remote_timeout``.
        """
        now = time.monotonic()
        with self._lock:
            found = {info.number: self._entry(info) for info in infos}
            entries = {number: entry for number, entry in found.items() if entry.where is not None}
            for entry in entries.values():
                if entry.await_until is None:
                    entry.await_until = now + self.timeout_s
            awaited = [entry for entry in entries.values() if entry.is_awaited(now)]
        deadline = max((entry.await_until or now for entry in awaited), default=now)
        if not entries or not self.reader.is_ready(deadline - now):
            return {}
        while True:
            with self._lock:
                for entry in entries.values():
                    self._advance(entry)
                opening = next((entry.opening for entry in awaited if entry.opening is not None), None)
                if opening is None or time.monotonic() >= deadline:
                    return {number: entry.segment for number, entry in entries.items() if entry.segment is not None}
            opening.reading.is_over(wait_s=min(_TURN_S, max(0.0, deadline - time.monotonic())))

    def open_ahead(self, info: SegmentInfo) -> None:
        """Begins to open a segment before its first use, in a thread that may wait."""
        if info.remote and self.reader.is_ready(self.timeout_s):
            with self._lock:
                self._advance(self._entry(info))

    def delivered(self, segment: RemoteSegment) -> None:
        """Its donor is well."""
        with self._lock:
            entry = self._entries.get(_identity(segment.info))
            if entry is not None and entry.segment is segment:
                entry.failures = 0

    def failed(self, segment: RemoteSegment) -> None:
        """Its donor did not deliver in time: dropped, to be opened again later."""
        with self._lock:
            entry = self._entries.get(_identity(segment.info))
            if entry is not None and entry.segment is segment:
                self._fail(entry, UnavailableError(f"{segment.where.peer} did not deliver"))

    def drop(self, identity: Identity) -> None:
        """The segment is gone."""
        with self._lock:
            self._drop(identity)

    def drop_all_but(self, listed: Iterable[Identity]) -> None:
        """Keeps those that the server lists."""
        with self._lock:
            for identity in self._entries.keys() - set(listed):
                self._drop(identity)

    def identities(self) -> list[Identity]:
        """What is open or was."""
        with self._lock:
            return list(self._entries)

    def close(self) -> None:
        """Harmless when called twice. Nothing can be read afterwards."""
        self.reader.close()
        with self._lock:
            for identity in list(self._entries):
                self._drop(identity)

    # --- with the lock held ---------------------------------------------------------------------------------------

    def _entry(self, info: SegmentInfo) -> _Entry:
        entry = self._entries.get(_identity(info))
        if entry is not None and entry.info.remote == info.remote:
            return entry
        if entry is not None:  # it is read in another way now
            self._drop(_identity(info))
        where = announcement_of(info.remote) if info.remote else None
        if where is not None and where.engine != self._engine:
            self._failures.record(
                f"read segment {info.segment_id.hex()} of another host",
                UnavailableError(f"it is offered by {where.engine!r}, transfer.remote is {self._engine!r}"),
            )
            where = None
        entry = self._entries[_identity(info)] = _Entry(info, where)
        return entry

    def _advance(self, entry: _Entry) -> None:
        """Begins to open what is due, and ends what has come or is late."""
        now = time.monotonic()
        if entry.opening is not None:
            if entry.opening.reading.is_over() or now >= entry.opening.deadline:
                self._opened(entry, entry.opening)
        elif entry.segment is None and entry.where is not None and now >= entry.retry_at:
            self._open(entry, entry.where, now)

    def _open(self, entry: _Entry, where: Announcement, now: float) -> None:
        blocks = self.reader.staging.take([PAGE_BYTES])
        if not blocks:
            self.count("remote_no_staging", 1)
            return
        first = [Stretch(0, blocks[0].payload_offset, PAGE_BYTES)]
        reading = self.reader.begin(Fetch(where.peer, where.address, first, [], blocks=1), blocks)
        if reading is None:
            blocks[0].release()
        else:
            entry.opening = _Opening(reading, blocks[0], now + self.timeout_s)

    def _opened(self, entry: _Entry, opening: _Opening) -> None:
        entry.opening = None
        outcome = opening.reading.outcome(0.0)
        try:
            if outcome is Outcome.READ:
                words = opening.block.tensor.numpy().view(np.uint64)[:HEADER_WORDS].tolist()
                info = entry.info
                assert entry.where is not None
                header = checked_header(words, info.segment_id, info.incarnation, info.nbytes)
                entry.segment = RemoteSegment(info, entry.where, header.data_offset, header.records)
                logger.info("opened segment %s of another host at %s", info.segment_id.hex(), entry.where.peer)
            elif outcome is Outcome.FAILED:
                self._fail(entry, UnavailableError("the donor did not answer"))
        except CorruptionError as error:
            self._fail(entry, error)
        finally:
            opening.block.release()

    def _fail(self, entry: _Entry, error: Exception) -> None:
        delay_s = min(LONGEST_DELAY_S, FIRST_DELAY_S * 2 ** min(entry.failures, 10))
        entry.segment = None
        entry.failures += 1
        entry.retry_at = time.monotonic() + random.uniform(delay_s / 2, delay_s)
        self.count("remote_failures", 1)
        self._failures.record(f"read segment {entry.info.segment_id.hex()} of another host", error)

    def _drop(self, identity: Identity) -> None:
        entry = self._entries.pop(identity, None)
        if entry is not None and entry.opening is not None:
            entry.opening.reading.outcome(0.0)
            entry.opening.block.release()


def _identity(info: SegmentInfo) -> Identity:
    return info.segment_id, info.incarnation
