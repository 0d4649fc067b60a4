"""A donor's demotions: victims copied to the tier below, on the server's orders, by a thread of the donor's own.

For each record: read its payload where it is, copy it into a segment of tier DRAM on this host (as any writer does) or to the
store, and only if the record still says *after* the copy what it said before, commit. Then the server is told; it has the
victim's record retired in its own time. Whoever dies between any two steps, what was committed is valid and the rest is nobody's.

What finds no room below is tried again for as long as it is there: the server gives it up at a deadline of its own. Host
memory is copied without torch, which a stand-alone donor otherwise never loads.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from vcache.failures import FailureLog
from vcache.memory.copying import aside, copy_between
from vcache.pool.spilling import Spiller
from vcache.pool.victims import Victim, begin_copies, runs_of, still_valid, victims_of
from vcache.pool.writing import PendingWrite
from vcache.protocol import DemoteItem, Destination, Outcome, Tier

if TYPE_CHECKING:
    from vcache.memory.base import IndexArray
    from vcache.pool.client import PoolClient
    from vcache.pool.segment import Segment

logger = logging.getLogger(__name__)

#: Victims dealt with before the server is told of them.
_BATCH: Final = 32
#: Before what found no room below is tried again: the server makes some meanwhile.
_RETRY_S: Final = 0.05


@dataclass
class _Told:
    """What became of a batch, by generation."""

    done: set[int] = field(default_factory=set)
    failed: set[int] = field(default_factory=set)
    no_room: set[int] = field(default_factory=set)


class Demoter:
    """Owns one daemon thread, started by the first order. Thread-safe; never raises on the caller's side."""

    def __init__(self, client: PoolClient, segment: Segment, *, spiller: Spiller | None) -> None:
        """``spiller``: its way to the store, if it writes there; closed with this."""
        self._client = client
        self._segment = segment
        self._spiller = spiller
        self._failures = FailureLog(logger)
        self._changed = threading.Condition()
        self._number = 0
        self._waiting: dict[int, DemoteItem] = {}  # by generation
        self._busy: frozenset[int] = frozenset()
        self._closed = False
        self._thread: threading.Thread | None = None

    @property
    def spills(self) -> bool:
        """Whether orders may name the store."""
        return self._spiller is not None

    def ordered(self, number: int, items: Sequence[DemoteItem]) -> None:
        """Takes orders for the segment, which has this number now; those known already are no others."""
        with self._changed:
            if self._closed:
                return
            self._number = number
            self._waiting |= {item.generation: item for item in items if item.generation not in self._busy}
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="vcache-demotion", daemon=True)
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
            if self._thread.is_alive():
                return False
        if self._spiller is not None:
            self._spiller.close(timeout_s)
        return True

    # --- the thread -----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        with aside(self._segment.memory):
            self._work()

    def _work(self) -> None:
        while (batch := self._next()) is not None:
            number, items = batch
            again: Sequence[DemoteItem] = ()
            try:
                again = self._demote(number, items)
            except Exception as error:  # the server orders them again, or gives them up
                self._failures.record("demote", error)
            if again:
                self._wait_for_room(again)

    def _next(self) -> tuple[int, list[DemoteItem]] | None:
        with self._changed:
            self._busy = frozenset()
            self._changed.wait_for(lambda: self._waiting or self._closed)
            if self._closed:
                return None
            items = list(self._waiting.values())[:_BATCH]
            self._busy = frozenset(item.generation for item in items)
            for generation in self._busy:
                del self._waiting[generation]
            return self._number, items

    def _wait_for_room(self, items: Sequence[DemoteItem]) -> None:
        with self._changed:
            self._waiting |= {item.generation: item for item in items}
            self._changed.wait_for(lambda: self._closed, _RETRY_S)

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
