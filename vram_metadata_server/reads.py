"""Lookups and acquires: the leading run of hits, leases on it, and what readers say afterwards.

The hottest path of the server: per key of a run one dictionary access, one touch, and for an acquire one hold and one
append. Steps of the protocol's model (``tests/model``): *acquire*, *reader reports*.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import takewhile

from vcache import protocol
from vcache.protocol import PLACEMENT
from vram_metadata_server.catalog import Catalog, key_text
from vram_metadata_server.index import Entry, Placement, split_keys
from vram_metadata_server.leases import LeaseTable
from vram_metadata_server.members import Session
from vram_metadata_server.pins import PinTable
from vram_metadata_server.placement import nearest
from vram_metadata_server.tombstones import Tombstones

log = logging.getLogger(__name__)


class Reads:
    """What readers ask for. Calls raise ``RefusalError`` on keys that are none."""

    def __init__(self, catalog: Catalog, tombstones: Tombstones, leases: LeaseTable, pins: PinTable) -> None:
        self._catalog = catalog
        self._index = catalog.index
        self._counters = catalog.counters
        self._tombstones = tombstones
        self._sweeps = tombstones.sweeps
        self._leases = leases
        self._pins = pins

    def lookup(self, session: Session, request: protocol.Lookup) -> tuple[int, int]:
        """The length of the leading run, and the lease on it (0: none was asked for or given)."""
        keys = self._keys(request.keys)
        if request.lease_s:
            run = self._index.run(keys)
            self._counters["hit_keys"] += len(run)
            self._catalog.policy.touch(run)
            return len(run), self._lease(session, run, b"", request.lease_s) if run else 0
        hits = self._index.count(keys)
        if hits:  # a run is kept as long as its last chunk is, and what is really read is acquired
            self._counters["hit_keys"] += hits
            self._catalog.policy.touch((self._index.whole[keys[hits - 1]],))
        return hits, 0

    def locate(self, session: Session, request: protocol.Locate) -> tuple[bytes, int]:
        """A byte for each key that says whether it is there, and the lease on those that are (0: none asked for or given)."""
        keys = split_keys(request.keys)
        if self._sweeps:
            for key in keys:
                self._bury((key,))
        found = list(map(self._index.whole.get, keys))
        present = [entry for entry in found if entry is not None]
        self._counters["lookups"] += 1
        self._counters["lookup_keys"] += len(keys)
        self._counters["hit_keys"] += len(present)
        # Nothing says how they belong together; of a prompt's chunks, should they be that, the last are to go first.
        self._catalog.policy.touch(present[::-1])
        lease = self._lease(session, present, b"", request.lease_s) if present and request.lease_s else 0
        return bytes(map(bool, found)), lease

    def lease_run(self, session: Session, request: protocol.LeaseRun) -> None:
        """Leases what a reader has found without asking, as far as it is there still."""
        run = self._index.run(self._keys(request.keys))
        self._counters["hit_keys"] += len(run)
        self._catalog.policy.touch(run)
        if run:
            packed = self._packed(run, session) if request.is_read else b""
            self._lease(session, run, packed, request.lease_s, name=request.id)

    def acquire(self, session: Session, request: protocol.Acquire) -> tuple[int, bytes]:
        """The lease on the leading run, and a placement of the rank's shard of each of its chunks."""
        run = self._index.run(self._keys(request.keys))
        rank = request.rank
        if rank:
            run = list(takewhile(lambda entry: rank < len(entry.shards), run))
        if rank:
            packed = b"".join([_choice(entry.shards[rank], session) for entry in run])  # type: ignore[arg-type]
        else:
            packed = self._packed(run, session)
        self._counters["hit_keys"] += len(run)
        self._catalog.policy.touch(run)
        lease = self._lease(session, run, packed, request.lease_s) if run else 0
        if not lease:
            return 0, b""
        if log.isEnabledFor(logging.DEBUG):
            log.debug("acquire %s..%s for %s", key_text(run[0].key), key_text(run[-1].key), session.name)
        return lease, packed

    def _packed(self, run: list[Entry], reader: Session) -> bytes:
        """A placement of the first rank's shard of each."""
        packed = b"".join([entry.packed for entry in run])
        if len(packed) < len(run) * PLACEMENT.size:  # some have several
            packed = b"".join([entry.packed or _choice(entry.shards[0], reader) for entry in run])  # type: ignore[arg-type]
        return packed

    def _keys(self, blob: bytes) -> Sequence[bytes]:
        keys = split_keys(blob)
        if self._sweeps:
            self._bury(keys)
        self._counters["lookups"] += 1
        self._counters["lookup_keys"] += len(keys)
        return keys

    def _bury(self, keys: Sequence[bytes]) -> None:
        for key in keys:
            entry = self._index.get(key)
            if entry is None:
                return
            self._tombstones.bury(entry)

    def _lease(self, session: Session, run: list[Entry], packed: bytes, lease_s: float, *, name: int = 0) -> int:
        longest = self._catalog.settings.max_lease_s
        deadline = self._catalog.now + (min(lease_s, longest) if lease_s else longest)
        lease = self._leases.grant(session.id, run, packed, deadline, name=name)
        self._counters["leases" if lease else "leases_refused"] += 1
        return lease

    def release(self, session: Session, request: protocol.Release) -> None:
        """Ends the lease. *reader reports*: placements whose record did not validate are dropped and retired."""
        lease_id = self._leases.named(session.id, request.lease) if request.is_named else request.lease
        lease = self._leases.release(session.id, lease_id)
        if lease is None or not request.invalid:
            return
        placed = lease.placed()
        for generation in request.invalid:
            if generation not in placed:
                continue
            number, record = placed[generation]
            segment = self._catalog.segments.get(number)
            holder = segment.holder(record) if segment is not None else None
            if isinstance(holder, Placement) and holder.generation == generation:
                log.warning("%s did not validate: dropped", key_text(holder.entry.key))
                self._counters["validation_failures"] += 1
                self._catalog.retire_placement(holder)

    def touch(self, request: protocol.Touch) -> None:
        """Counts as a use of the keys that are there."""
        found = map(self._index.get, split_keys(request.keys))
        self._catalog.policy.touch([entry for entry in found if entry is not None])

    def pin(self, request: protocol.Pin) -> int:
        """Pins the keys that are there; answers how many."""
        keys = split_keys(request.keys)
        if self._sweeps:
            for key in keys:
                self._bury((key,))
        deadline = self._catalog.now + request.pin_s
        entries = map(self._index.whole.get, keys)
        return sum(entry is not None and self._pins.pin(entry, deadline) for entry in entries)

    def unpin(self, request: protocol.Unpin) -> int:
        """Ends pins; answers how many there were."""
        return sum(map(self._pins.unpin, split_keys(request.keys)))


def _choice(first: Placement, reader: Session) -> bytes:
    return first.packed if first.next is None else nearest(first, reader).packed
