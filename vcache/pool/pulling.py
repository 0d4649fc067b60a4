"""A donor's pulls: what another host is about to evict, copied into this one's segment, on the server's orders.

Nobody writes into another host's segment, since a late one-sided write could not be called back. So the donor that has room reads:
the payload and then its record, as any reader on another host does, and only what that record proves is written into its own
segment as any write is, reserved, marked, copied from staging memory, committed. Then the server is told. Whoever dies between
any two steps, what was committed is valid and the rest is nobody's.

What another host does not deliver is left: the server orders it again with each heartbeat, until it gives it up.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import closing
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from vcache.pool.order_queue import OrderQueue
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


def open_puller(client: PoolClient, segment: Segment) -> Puller | None:
    """For a donor that can read from other hosts, and write; ``None`` for others."""
    remote = client.mappings.remote
    return Puller(client, segment, remote) if remote is not None and client.writes else None


class _Order(NamedTuple):
    source: SegmentInfo  # as the order said that it is read
    item: PullItem

    @property
    def generation(self) -> int:
        return self.item.generation


class _Told:
    """What became of orders, by generation. One in neither is tried again when it is ordered again."""

    def __init__(self) -> None:
        self.done: set[int] = set()
        self.failed: set[int] = set()


class Puller:
    """Thread-safe; never raises on the caller's side."""

    def __init__(self, client: PoolClient, segment: Segment, remote: RemoteSegments) -> None:
        self._client = client
        self._remote = remote
        self._queue = OrderQueue[_Order]("pull", segment.memory, self._pull, lambda order: order.source.number)

    def ordered(self, number: int, source: SegmentInfo, items: Iterable[PullItem]) -> None:
        """Takes orders for the segment, which has this number now; those known already are no others."""
        self._queue.put(number, [_Order(source, item) for item in items])

    def forget(self) -> None:
        """The segment begins another life, or another server's: what was ordered is ordered no more."""
        self._queue.forget()

    def close(self, timeout_s: float) -> bool:
        """Ends after what is being copied now; whether that came in time. Harmless when repeated."""
        return self._queue.close(timeout_s)

    # --- in the queue's thread ------------------------------------------------------------------------------------

    def _pull(self, number: int, orders: Sequence[_Order]) -> Sequence[_Order]:
        """Copies what the source that they have in common delivers, and tells the server, which orders the rest again."""
        source, items = orders[0].source, [order.item for order in orders]
        opened = self._client.mappings.use_remote([source])
        if source.number not in opened:
            return ()
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
        return ()

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
