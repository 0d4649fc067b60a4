"""A donor's demotions: victims copied to the tier below, on the server's orders, by a thread of the donor's own.

For each record: read its payload where it is, copy it into a segment of tier DRAM on this host (as any writer does) or to the
store, and only if the record still says *after* the copy what it said before, commit. Then the server is told; it has the
victim's record retired in its own time. Whoever dies between any two steps, what was committed is valid and the rest is nobody's.

What finds no room below is tried again for as long as it is there: the server gives it up at a deadline of its own. Host
memory is copied without torch, which a stand-alone donor otherwise never loads.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from vcache.memory.copying import copy_between
from vcache.pool.order_queue import OrderQueue
from vcache.pool.spilling import Spiller
from vcache.pool.victims import Victim, begin_copies, runs_of, still_valid, victims_of
from vcache.pool.writing import PendingWrite
from vcache.protocol import DemoteItem, Destination, Outcome, Tier

if TYPE_CHECKING:
    from vcache.memory.base import IndexArray
    from vcache.pool.client import PoolClient
    from vcache.pool.segment import Segment


@dataclass
class _Told:
    """What became of a batch, by generation."""

    done: set[int] = field(default_factory=set)
    failed: set[int] = field(default_factory=set)
    no_room: set[int] = field(default_factory=set)


class Demoter:
    """Thread-safe; never raises on the caller's side."""

    def __init__(self, client: PoolClient, segment: Segment, *, spiller: Spiller | None) -> None:
        """``spiller``: its way to the store, if it writes there; closed with this."""
        self._client = client
        self._segment = segment
        self._spiller = spiller
        self._queue = OrderQueue[DemoteItem]("demote", segment.memory, self._demote)

    @property
    def spills(self) -> bool:
        """Whether orders may name the store."""
        return self._spiller is not None

    def ordered(self, number: int, items: Sequence[DemoteItem]) -> None:
        """Takes orders for the segment, which has this number now; those known already are no others."""
        self._queue.put(number, items)

    def forget(self) -> None:
        """The segment begins another life, or another server's: what was ordered is ordered no more."""
        self._queue.forget()

    def close(self, timeout_s: float) -> bool:
        """Ends after what is being copied now; whether that came in time. Harmless when repeated."""
        deadline = time.monotonic() + timeout_s
        if not self._queue.close(timeout_s):
            return False
        if self._spiller is not None:
            self._spiller.close(max(0.0, deadline - time.monotonic()))
        return True

    # --- in the queue's thread ------------------------------------------------------------------------------------

    def _demote(self, number: int, items: Sequence[DemoteItem]) -> list[DemoteItem]:
        """Carries out a batch, and tells the server; answers what is to be tried again."""
        victims = victims_of(self._segment, items)
        failed = {item.generation for item in items} - {victim.generation for victim in victims}
        told = _Told(failed=failed)
        to_store = [victim for victim in victims if victim.item.destination is Destination.STORE]
        if to_store:
            stored = self._spiller.spill(self._segment, to_store) if self._spiller is not None else set()
            told.done |= stored
            told.failed |= {victim.generation for victim in to_store} - stored
        for run in runs_of([victim for victim in victims if victim.item.destination is Destination.DRAM]):
            self._copy_below(run, told)
        if told.done or told.failed:
            self._client.demoted(number, sorted(told.done), sorted(told.failed))
        return [item for item in items if item.generation in told.no_room]

    def _copy_below(self, run: Sequence[Victim], told: _Told) -> None:
        write = begin_copies(self._client, run, into_tier=Tier.DRAM)
        for victim, outcome in zip(run, write.outcomes, strict=False):  # none at all: the server is away
            if outcome is Outcome.EXISTS:
                told.done.add(victim.generation)  # if it is not committed yet, the server will see to that
            elif outcome is Outcome.NO_SPACE:
                told.no_room.add(victim.generation)
            elif outcome is Outcome.DECLINED:
                told.failed.add(victim.generation)
        try:
            granted = [run[index] for index in write.granted.tolist()]
            self._copy(write, granted)
            valid = still_valid(self._segment, granted)
            told.failed |= {victim.generation for victim, whole in zip(granted, valid, strict=True) if not whole}
            write.drop(~valid)
        except BaseException:
            write.abort()
            raise
        write.complete()
        told.done |= {run[index].generation for index in write.granted.tolist()}

    def _copy(self, write: PendingWrite, granted: Sequence[Victim]) -> None:
        def copy_in(below: Segment, chunks: IndexArray, offsets: IndexArray) -> None:
            for chunk, offset in zip(chunks.tolist(), offsets.tolist(), strict=True):
                victim = granted[chunk]
                copy_between(self._segment.memory, victim.offset, below.memory, offset, victim.nbytes)

        write.copy_with(copy_in)
