"""Whether the state machine contradicts itself. For tests and benchmarks: it looks at everything."""

from __future__ import annotations

from collections import Counter

from vcache.protocol import Tier
from vram_metadata_server.index import Entry, Placement, copies_of
from vram_metadata_server.segments import Segment
from vram_metadata_server.service import Service


def check_integrity(service: Service) -> None:
    """Raises ``AssertionError`` where the state contradicts itself."""
    catalog = service.catalog
    index = catalog.index
    for segment in catalog.segments.values():
        segment.check_integrity()
        _check_records(service, segment)
    catalog.reservations.check_integrity()
    service.leases.check_integrity(catalog.now)
    service.pins.check_integrity(catalog.now)
    _check_entries(service)
    _check_children(service)
    service.demotions.check_integrity()
    holds: Counter[int] = Counter()
    for lease in service.leases:
        holds.update(id(entry) for entry in lease.run)
    holds.update(id(entry) for entry in service.pins.held())
    for entry in [*index.whole.values(), *index.partial.values()]:
        assert entry.holds == holds[id(entry)], "an entry's holds are not its leases and pins"


def _check_records(service: Service, segment: Segment) -> None:
    """Every committed record is indexed or being retired."""
    catalog = service.catalog
    for record, holder in enumerate(segment.records):
        if isinstance(holder, Placement):
            assert holder.segment is segment and holder.record == record
            assert any(other is holder for other in holder.entry.placements()), "a record's placement is not indexed"
            assert catalog.index.get(holder.entry.key) is holder.entry
    for item in segment.retiring.values():
        assert any(other is item for other in catalog.retiring[item.key])
    for reservation in catalog.reservations:
        if reservation.segment is segment:
            assert segment.holder(reservation.record) is reservation


def _check_entries(service: Service) -> None:
    index = service.catalog.index
    for table, is_whole in ((index.whole, True), (index.partial, False)):
        for key, entry in table.items():
            assert entry.key == key
            missing = sum(first is None for first in entry.shards)
            assert entry.missing == missing and (missing == 0) is is_whole
            assert missing < len(entry.shards), "an entry without a placement"
            assert is_whole or key in service.catalog.incomplete, "an incomplete chunk without a deadline"
            _check_placements(entry)


def _check_placements(entry: Entry) -> None:
    for rank, first in enumerate(entry.shards):
        copies = list(copies_of(first))
        for placement in copies:
            assert placement.entry is entry and placement.rank == rank
            assert placement.segment.holder(placement.record) is placement
        if rank == 0:
            assert entry.packed == (copies[0].packed if len(copies) == 1 else b""), "not what an acquire is sent"


def _check_children(service: Service) -> None:
    index = service.catalog.index
    children: Counter[bytes] = Counter()
    vram_children: Counter[bytes] = Counter()
    for entry in [*index.whole.values(), *index.partial.values()]:
        children[entry.parent] += 1
        in_vram = sum(placement.segment.info.tier is Tier.VRAM for placement in entry.placements())
        assert entry.in_vram == in_vram, "an entry's count of placements in VRAM is wrong"
        vram_children[entry.parent] += bool(in_vram)
    for reservation in service.catalog.reservations:
        if reservation.live:
            children[reservation.parent] += 1
    del children[b""]
    del vram_children[b""]
    for entry in [*index.whole.values(), *index.partial.values()]:
        assert entry.children == children.pop(entry.key, 0), "an entry's count of children is wrong"
        assert entry.vram_children == vram_children.pop(entry.key, 0), "an entry's count of children in VRAM is wrong"
        child = entry.child
        assert child is None or (child.parent == entry.key and index.get(child.key) is child), (
            "it leads to another's child"
        )
    assert dict(children) == index.orphans
    assert +vram_children == index.vram_orphans
