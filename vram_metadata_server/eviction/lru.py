"""Least recently used first, leaves only.

A touch is one attribute store per entry. Each segment has a heap of leaves by the time they were offered; what was touched
since is found out when it comes to the top, and goes back with its present time. An item is one int, the time above the
record, so a million leaves take 40 MB and compare fast. A record is in the heap at most once, whoever holds it.
"""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heappop, heappush
from typing import Final

from vram_metadata_server.index import Entry, Placement
from vram_metadata_server.segments import MAX_RECORDS, Segment

_RECORD_BITS: Final = MAX_RECORDS.bit_length()
_RECORD_MASK: Final = (1 << _RECORD_BITS) - 1
#: Items looked at in one ``choose``: with more held leaves than that at the top, finding a victim takes several calls.
_LOOKED_AT: Final = 512


class _Leaves:
    """One segment's leaves."""

    __slots__ = ("heap", "queued")

    def __init__(self) -> None:
        self.heap: list[int] = []
        self.queued = bytearray()

    def push(self, record: int, time: int) -> None:
        queued = self.queued
        if record >= len(queued):
            queued.extend(bytes(record + 1 - len(queued)))
        if not queued[record]:
            queued[record] = 1
            heappush(self.heap, time << _RECORD_BITS | record)


class LeafLRU:
    """The ``EvictionPolicy`` of the configuration's ``lru``."""

    def __init__(self) -> None:
        self._time = 0
        self._leaves: dict[int, _Leaves] = {}

    def touch(self, run: Sequence[Entry]) -> None:
        self._time = time = self._time + 1
        for entry in run:
            entry.touched = time

    def offer(self, placement: Placement) -> None:
        leaves = self._leaves.get(placement.segment.number)
        if leaves is None:
            leaves = self._leaves[placement.segment.number] = _Leaves()
        leaves.push(placement.record, placement.entry.touched)

    def choose(self, segment: Segment) -> Placement | None:
        leaves = self._leaves.get(segment.number)
        if leaves is None:
            return None
        self._time = begin = self._time + 1
        for _ in range(_LOOKED_AT):
            if not leaves.heap or leaves.heap[0] >> _RECORD_BITS >= begin:
                return None  # none, or only those left that are in use
            item = heappop(leaves.heap)
            record = item & _RECORD_MASK
            leaves.queued[record] = 0
            holder = segment.holder(record)
            if not isinstance(holder, Placement) or holder.entry.missing or not holder.may_go:
                continue  # offered again when it may
            entry = holder.entry
            if entry.holds:
                leaves.push(record, begin)  # in use now; comes up again after all that are not
            elif entry.touched > item >> _RECORD_BITS:
                leaves.push(record, entry.touched)
            else:
                return holder
        return None

    def forget(self, segment: Segment) -> None:
        self._leaves.pop(segment.number, None)
