"""Dropping a segment and clearing a tenant in one step: a tombstone hides the entries now, a sweep removes them bit by bit.

While any sweep is unfinished, lookups look at each entry they meet (``is_dead``) and bury what is dead; otherwise they need not.
"""

from __future__ import annotations

from collections import deque

import msgspec

from vram_metadata_server.catalog import Catalog
from vram_metadata_server.index import Entry, Placement
from vram_metadata_server.removal import Removal
from vram_metadata_server.segments import Holder, Retiring, Segment


class Clearing(msgspec.Struct, eq=False):
    """One ``Clear`` under way: all entries of a tenant (of all, when None) whose generation is below ``below``."""

    tenant: int | None
    below: int
    removal: Removal
    sweeps: int = 0

    def covers(self, tenant: int, generation: int) -> bool:
        return (self.tenant is None or self.tenant == tenant) and generation < self.below


class Sweep(msgspec.Struct, eq=False):
    """A walk over a segment's records, for a clearing, or (None) because the segment is no more."""

    segment: Segment
    clearing: Clearing | None
    end: int
    at: int = 0


class Tombstones:
    """All tombstones whose sweep is unfinished."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog
        self._clearings: list[Clearing] = []
        #: While there are any, an entry that is found may be dead.
        self.sweeps: deque[Sweep] = deque()

    def bury_segment(self, segment: Segment) -> None:
        """The segment is readable no more: its entries end with it."""
        self.sweeps.append(Sweep(segment, None, len(segment.records)))

    def clear(self, tenant: int | None, below: int, removal: Removal) -> None:
        """Removes everything of a tenant (None: of all) with a generation below ``below``."""
        clearing = Clearing(tenant, below, removal)
        for segment in self._catalog.segments.values():
            if segment.records and segment.is_readable:
                self.sweeps.append(Sweep(segment, clearing, len(segment.records)))
                clearing.sweeps += 1
                removal.wait()
        if clearing.sweeps:
            self._clearings.append(clearing)

    def bury(self, entry: Entry) -> None:
        """Takes the dead placements out of an entry that somebody asks for."""
        for placement in entry.placements():
            if not placement.segment.is_readable:
                placement.segment.records[placement.record] = None
                self._catalog.discard_placement(placement)
                continue
            generation = placement.generation
            for clearing in self._clearings:
                if clearing.covers(entry.tenant, generation):
                    self._clear_placement(placement, clearing.removal)
                    break

    def sweep(self, records: int) -> None:
        """Goes on with the sweeps, over so many records."""
        while self.sweeps and records > 0:
            sweep = self.sweeps[0]
            stop = min(sweep.end, sweep.at + records)
            held = sweep.segment.records[sweep.at : stop]
            records -= stop - sweep.at
            sweep.at = stop
            for holder in held:
                if sweep.clearing is None:
                    self._visit_dropped(holder)
                elif sweep.segment.is_readable:
                    self._visit_cleared(holder, sweep.clearing)
            if sweep.at == sweep.end:
                self.sweeps.popleft()
                if sweep.clearing is not None:
                    self._finish(sweep.clearing)

    def _visit_cleared(self, holder: Holder | None, clearing: Clearing) -> None:
        if isinstance(holder, Placement):
            if clearing.covers(holder.entry.tenant, holder.generation):
                self._clear_placement(holder, clearing.removal)
        elif isinstance(holder, Retiring) and clearing.covers(holder.tenant, holder.generation):
            self._catalog.await_retired(holder, clearing.removal)

    def _visit_dropped(self, holder: Holder | None) -> None:
        if isinstance(holder, Placement):
            holder.segment.records[holder.record] = None
            self._catalog.discard_placement(holder)
        elif isinstance(holder, Retiring):
            holder.segment.records[holder.record] = None
            del holder.segment.retiring[holder.record]
            self._catalog.forget_retiring(holder)

    def _clear_placement(self, placement: Placement, removal: Removal) -> None:
        entry = placement.entry
        self._catalog.retire_placement(placement, removal)
        if entry.missing == len(entry.shards):
            removal.count += 1
            self._catalog.counters["removed"] += 1

    def _finish(self, clearing: Clearing) -> None:
        clearing.sweeps -= 1
        clearing.removal.settle()
        if not clearing.sweeps:
            self._clearings.remove(clearing)
