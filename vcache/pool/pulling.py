"""A donor's pulls: what another host is about to evict, copied into this one's segment, on the server's orders.

Nobody writes into another host's segment, since a late one-sided write could not be called back. So the donor that has room reads:
the payload and then its record, as any reader on another host does, and only what that record proves is written into its own
segment as any write is, reserved, marked, copied from staging memory, committed. Then the server is told. Whoever dies between
any two steps, what was committed is valid and the rest is nobody's.

What another host does not deliver is left: the server orders it again with each heartbeat, until it gives it up.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np

from vcache.failures import FailureLog
from vcache.memory.copying import aside
from vcache.pool.records import hold, key_words
from vcache.pool.session import PLACEMENT_DTYPE, PlacementArray
from vcache.pool.victims import Victim, begin_copies, is_plain, runs_of, victim_of
from vcache.protocol import DemoteItem, Destination, Outcome, PullItem, SegmentInfo
from vcache.remote.fetch import fetched

if TYPE_CHECKING:
    from vcache.memory.base import IndexArray
    from vcache.pool.client import PoolClient
    from vcache.pool.segment import Segment
    from vcache.remote.fetch import Batch
    from vcache.remote.segments import RemoteSegment, RemoteSegments

logger = logging.getLogger(__name__)

#: Records pulled before the server is told of them.
_BATCH: Final = 32


def open_puller(client: PoolClient, segment: Segment) -> Puller | None:
    """For a donor that can read from other hosts, and write; ``None`` for others."""
    remote = client.mappings.remote
    return Puller(client, segment, remote) if remote is not None and client.writes else None


class _Order(NamedTuple):
    source: SegmentInfo
    item: PullItem


class _Told:
    """What became of orders, by generation. One in neither is tried again when it is ordered again."""

    def __init__(self) -> None:
        self.done: set[int] = set()
        self.failed: set[int] = set()


class Puller:
    """Owns one daemon thread, started by the first order. Thread-safe; never raises on the caller's side."""

    def __init__(self, client: PoolClient, segment: Segment, remote: RemoteSegments) -> None:
        self._client = client
        self._segment = segment
        self._remote = remote
        self._failures = FailureLog(logger)
        self._changed = threading.Condition()
        self._number = 0
        self._waiting: dict[int, _Order] = {}  # by generation
        self._busy: frozenset[int] = frozenset()
        self._closed = False
        self._thread: threading.Thread | None = None

    def ordered(self, number: int, source: SegmentInfo, items: Iterable[PullItem]) -> None:
        """Takes orders for the segment, which has this number now; those known already are no others."""
        with self._changed:
            if self._closed:
                return
            self._number = number
            self._waiting |= {
                item.generation: _Order(source, item) for item in items if item.generation not in self._busy
            }
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="vcache-pull", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def forget(self) -> None:
        """The segment begins another life, or another server's: what was ordered is ordered no more."""
        with self._changed:
            self._waiting.clear()

    def close(self, timeout_s: float) -> bool:
        """Ends after what is being copied now; whether that came in time. Harmless when repeated."""
        with self._changed:
            self._closed = True
            self._waiting.clear()
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(timeout_s)
        return self._thread is None or not self._thread.is_alive()

    # --- the thread -----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        with aside(self._segment.memory):
            while (batch := self._next()) is not None:
                number, source, items = batch
                try:
                    self._pull(number, source, items)
                except Exception as error:  # the server orders them again, or gives them up
                    self._failures.record("pull", error)

    def _next(self) -> tuple[int, SegmentInfo, list[PullItem]] | None:
        """A few orders that have their source in common."""
        with self._changed:
            self._busy = frozenset()
            self._changed.wait_for(lambda: self._waiting or self._closed)
            if self._closed:
                return None
            source = next(iter(self._waiting.values())).source
            items = [order.item for order in self._waiting.values() if order.source.number == source.number][:_BATCH]
            self._busy = frozenset(item.generation for item in items)
            for generation in self._busy:
                del self._waiting[generation]
            return self._number, source, items

    def _pull(self, number: int, source: SegmentInfo, items: Sequence[PullItem]) -> None:
        """Copies what the source delivers, and tells the server."""
        opened = self._client.mappings.use_remote([source])
        if source.number not in opened:
            return
        told = _Told()
        told.failed = {item.generation for item in items if not _lies_in(opened[source.number], item)}
        items = [item for item in items if item.generation not in told.failed]
        if items:
            placements = _placements(source, items)
            with closing(fetched(self._remote, placements, opened)) as batches:
                for batch in batches:
                    self._write(number, [items[chunk] for chunk in batch.chunks.tolist()], batch, told)
        if told.done or told.failed:
            self._client.pulled(number, sorted(told.done), sorted(told.failed))

    def _write(self, number: int, items: Sequence[PullItem], batch: Batch, told: _Told) -> None:
        """Writes what lies in staging memory, as far as the records that were read after it prove it."""
        generations = np.array([item.generation for item in items], dtype=np.uint64)
        held = hold(batch.rows, generations, key_words(b"".join(item.key for item in items)))
        victims: list[Victim] = []
        offsets: dict[int, int] = {}
        for item, row, offset, is_held in zip(items, batch.rows, batch.offsets.tolist(), held.tolist(), strict=True):
            if is_held and is_plain(row):
                victims.append(victim_of(DemoteItem(item.record, item.generation, Destination.PEER), row))
                offsets[item.generation] = offset
            else:
                told.failed.add(item.generation)
        for run in runs_of(victims):
            self._write_run(number, run, offsets, told)

    def _write_run(self, number: int, run: Sequence[Victim], offsets: dict[int, int], told: _Told) -> None:
        from vcache.pool.read_back import copy_payload  # loads torch, as staging memory has done

        staging = self._remote.reader.staging.tensor
        write = begin_copies(self._client, run, into=number)
        for victim, outcome in zip(run, write.outcomes, strict=False):  # none at all: the server is away
            if outcome is Outcome.EXISTS:
                told.done.add(victim.generation)  # if it is not committed yet, the server will see to that
            elif outcome is not Outcome.GRANTED:
                told.failed.add(victim.generation)

        def copy_in(segment: Segment, chunks: IndexArray, starts: IndexArray) -> None:
            for chunk, start in zip(chunks.tolist(), starts.tolist(), strict=True):
                victim = granted[chunk]
                begin = offsets[victim.generation]
                copy_payload(staging[begin : begin + victim.nbytes], segment.tensor[start : start + victim.nbytes])

        try:
            granted = [run[index] for index in write.granted.tolist()]
            write.copy_with(copy_in)
        except BaseException:
            write.abort()
            raise
        write.complete()
        told.done |= {run[index].generation for index in write.granted.tolist()}


def _lies_in(segment: RemoteSegment, item: PullItem) -> bool:
    return item.record < segment.records and segment.contains(item.offset, item.nbytes)


def _placements(source: SegmentInfo, items: Sequence[PullItem]) -> PlacementArray:
    return np.array(
        [(source.number, item.record, item.generation, item.offset, item.nbytes) for item in items],
        dtype=PLACEMENT_DTYPE,
    )
