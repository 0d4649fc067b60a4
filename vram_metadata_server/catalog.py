"""The entries and the segments they lie in, and every change that concerns both: what is taken out is retired.

The steps of the protocol's model (``tests/model``) that happen here: *evict*, *remove*, *order retire*, *retired*, *drop
segment*. Writers' steps are in ``writes.py``, a registration's in ``handover.py``, tombstones in ``tombstones.py``.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterable, Sequence

from vcache.protocol import PLACEMENT, RetireItem
from vram_metadata_server.counters import Counters
from vram_metadata_server.deadlines import Expiries
from vram_metadata_server.eviction.base import EvictionPolicy
from vram_metadata_server.eviction.pressure import Pressure
from vram_metadata_server.index import Entry, Index, Placement
from vram_metadata_server.removal import Removal
from vram_metadata_server.reservations import Reservation, ReservationTable
from vram_metadata_server.segments import Retiring, Segment, SegmentState
from vram_metadata_server.settings import ServiceSettings

log = logging.getLogger(__name__)


def key_text(key: bytes) -> str:
    """A key as people see it (``vcache.keys.format_key``, which the server does not import)."""
    return f"vc1-{key.hex()}"


class Catalog:
    """The state that the parts of the server share, and the operations that keep it whole."""

    def __init__(self, settings: ServiceSettings, policy: EvictionPolicy, counters: Counters) -> None:
        self.settings = settings
        self.policy = policy
        self.counters = counters
        self.pressure = Pressure(policy, settings.high_watermark, settings.low_watermark)
        self.index = Index()
        self.reservations = ReservationTable()
        self.segments: dict[int, Segment] = {}  # by number, none that is dropped
        self.segments_version = 0  # changes with the set of segments
        self._by_host: dict[bytes, list[Segment]] = {}
        self._by_host_version = 0
        self.retiring: dict[bytes, list[Retiring]] = {}  # pending retires by key
        self.to_order: dict[Segment, None] = {}  # segments with orders not yet sent
        self.incomplete = Expiries()
        self.lifetimes = Expiries()
        self.now = 0.0  # of the message or tick being handled

    # --- entries come ---------------------------------------------------------------------------------------------

    def segments_of(self, host: bytes) -> Sequence[Segment]:
        """The segments on a host: requests of a pool of many hosts look at no others."""
        if self._by_host_version != self.segments_version:
            by_host: defaultdict[bytes, list[Segment]] = defaultdict(list)
            for segment in self.segments.values():
                by_host[segment.info.host].append(segment)
            self._by_host, self._by_host_version = dict(by_host), self.segments_version
        return self._by_host.get(host, ())

    def admit(self, segment: Segment, info: Reservation) -> Entry:
        """Makes the committed record that ``info`` describes a placement of its key's entry."""
        index = self.index
        entry = index.get(info.key)
        if entry is None:
            entry = index.create(info.key, info.parent, info.tenant, info.ranks)
        packed = PLACEMENT.pack(segment.number, info.record, info.generation, info.offset, info.nbytes)
        segment.records[info.record] = index.add(entry, segment, info.rank, packed)
        if entry.missing:
            if entry.key not in self.incomplete:
                self.incomplete.set(entry.key, self.now + self.settings.incomplete_s)
        elif len(entry.shards) > 1:
            self.incomplete.drop(entry.key)
        if info.ttl_s:
            self.lifetimes.set(entry.key, self.now + info.ttl_s)
        return entry

    def fits(self, key: bytes, ranks: int) -> bool:
        """Whether a shard of so many ranks can join the key's entry, if it has one."""
        entry = self.index.get(key)
        return entry is None or len(entry.shards) == ranks

    def offer(self, entry: Entry | None) -> None:
        """Offers what may go of a whole entry to the eviction policy."""
        if entry is None or entry.missing:
            return
        # The only shard by itself: said of each chunk that is committed, and most have a child that keeps them.
        for placement in (entry.shards[0],) if entry.packed and len(entry.shards) == 1 else entry.placements():
            if placement is not None and placement.may_go:
                self.policy.offer(placement)

    # --- entries go -----------------------------------------------------------------------------------------------

    def retire_entry(self, entry: Entry, removal: Removal | None = None) -> None:
        """Evicts or removes an entry: gone from the index now, its records ordered to be retired."""
        for placement in entry.placements():
            self.retire_placement(placement, removal)

    def retire_placement(self, placement: Placement, removal: Removal | None = None) -> None:
        """Takes a placement out of its entry and orders its record to be retired."""
        entry, segment, record = placement.entry, placement.segment, placement.record
        offset, nbytes = placement.extent
        self.discard_placement(placement)
        self.retire_record(
            Retiring(segment, record, placement.generation, entry.key, entry.tenant, offset, nbytes, []), removal
        )

    def discard_placement(self, placement: Placement) -> None:
        """Takes a placement out of its entry; the record stays as it is."""
        entry = placement.entry
        if placement.segment.demoting:
            placement.segment.stop_demoting(placement)
        parent = self.index.discard(placement)
        if entry.missing == len(entry.shards):
            self.incomplete.drop(entry.key)
            self.lifetimes.drop(entry.key)
        elif entry.missing and entry.key not in self.incomplete:
            self.incomplete.set(entry.key, self.now + self.settings.incomplete_s)
        self.offer(parent)

    def retire_record(self, item: Retiring, removal: Removal | None = None) -> bool:
        """*order retire*: the record's holder is gone; its donor is to retire it in memory. False: there is no need to."""
        segment = item.segment
        if segment.state in (SegmentState.DROPPED, SegmentState.DRAINING):
            segment.records[item.record] = None  # nothing in it is ever granted again
            return False
        if removal is not None:
            self.await_retired(item, removal)
        segment.retire(item)
        self.retiring.setdefault(item.key, []).append(item)
        self.to_order[segment] = None
        if log.isEnabledFor(logging.DEBUG):
            log.debug("retire %s: segment %d record %d", key_text(item.key), segment.number, item.record)
        return True

    def await_retired(self, item: Retiring, removal: Removal) -> None:
        """The removal is answered no earlier than this record is retired."""
        removal.wait()
        item.waiters.append(removal)

    def retired(self, segment: Segment, items: Iterable[RetireItem]) -> int:
        """*retired*: the donor has done it; record and extent are free."""
        done = 0
        for item in items:
            pending = segment.retiring.get(item.record)
            if pending is None or pending.generation != item.generation:
                continue  # said twice
            segment.retired(pending)
            self.forget_retiring(pending)
            done += 1
        self.counters["retired"] += done
        return done

    def forget_retiring(self, item: Retiring) -> None:
        """Nothing waits for this retire any more: it is done, or its segment is no more."""
        same = self.retiring[item.key]
        same.remove(item)
        if not same:
            del self.retiring[item.key]
        for removal in item.waiters:
            removal.settle()
        item.waiters = []
