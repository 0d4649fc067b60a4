"""What eviction does with a victim: nothing is lost that the tier below can take.

A victim whose shard lies twice on its host just goes. Another is *demoted*: its donor is ordered to copy the payload to a
segment of tier DRAM on its host, or to the store, and it is served from where it is until the copy is committed. Where there is
neither, but room in a segment of another host, that one's donor is ordered to *pull* it: nobody writes into another host's
segment. The victim goes when the donor says so, if nobody has taken a lease on it meanwhile. What cannot be demoted, or was not
by a deadline, is dropped. A chunk's ranks go together. Where the segment goes that a victim was to be pulled into, the victim's
way is chosen anew at once.

Steps of the protocol's model (``tests/model``): *demote*, *demoted*. A server that restarts in between finds two placements,
or one, in the donors' records, and begins anew.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from typing import Final

import msgspec

from vcache.protocol import Demoted, Destination, Pulled, Tier
from vram_metadata_server.catalog import Catalog, key_text
from vram_metadata_server.index import Entry, Placement, copies_of
from vram_metadata_server.segments import Segment, SegmentState

log = logging.getLogger(__name__)

_OUTCOMES: Final = {Destination.DRAM: "demoted", Destination.STORE: "spilled", Destination.PEER: "pulled"}


class Demotion(msgspec.Struct, eq=False):
    """One chunk on its way down. A placement is pending while its segment's ``demoting`` has it."""

    entry: Entry
    placements: list[Placement]
    destination: Destination
    deadline: float
    parent: Entry | None  # follows without waiting for the copy
    puller: Segment | None  # of another host, whose donor makes the copies
    failed: bool = False

    @property
    def is_pending(self) -> bool:
        return any(is_demoting(placement) for placement in self.placements)

    def stop(self, placement: Placement) -> None:
        """Nobody need copy it any more."""
        placement.segment.stop_demoting(placement)
        if self.puller is not None:
            self.puller.stop_pulling(placement.generation)


class Demotions:
    """All chunks that are being demoted."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog
        self._under_way: dict[int, Demotion] = {}  # by each generation ordered
        self._by_deadline: dict[int, Demotion] = {}  # by the first of its generations
        self._began: float | None = None  # when the term did
        self._waiting: dict[Segment, None] = {}  # short of space, and not evicted from for now
        self._pullers: dict[Segment, None] = {}  # with orders to pull, or that had some a moment ago

    def __len__(self) -> int:
        return len(self._by_deadline)

    def __iter__(self) -> Iterator[Demotion]:
        return iter(self._by_deadline.values())

    def waits(self, segment: Segment) -> bool:
        """Whether eviction from the segment is put off: after a restart the tier below may open, or register, a little later.

        For no longer than a silent donor is waited for.
        """
        catalog = self._catalog
        if self._began is None or segment.info.tier is not Tier.VRAM or not catalog.counters["handed_over"]:
            return False
        is_served = any(other.state is SegmentState.SERVING for other in self._dram_of(segment.info.host))
        if is_served or catalog.now >= self._began + catalog.settings.liveness_s:
            return False
        self._waiting[segment] = None
        return True

    def evict(self, victim: Placement) -> None:
        """*evict* or *demote*: the victim leaves its segment, now or once it lies below."""
        if is_demoting(victim):
            return  # offered once more meanwhile; its turn comes when the copy is done
        catalog = self._catalog
        if _has_copy(victim, on_host=True):
            catalog.counters["copies_evicted"] += 1
            catalog.retire_placement(victim)
            return
        entry = victim.entry
        if victim.segment.info.tier is Tier.VRAM:
            going = [
                each for each in entry.placements() if _is_beside(each, victim) and not _has_copy(each, on_host=True)
            ]
            if all(self._has_room_below(each) for each in going):
                self._begin(entry, going, Destination.DRAM)
                return
        last = [first for first in entry.shards if first is not None]
        if victim in last and all(first.segment.spills and first.segment.is_readable for first in last):
            self._begin(entry, last, Destination.STORE)
            return
        left = [each for each in entry.placements() if _is_beside(each, victim) and not _has_copy(each, on_host=False)]
        puller = self._puller_of(left) if victim in left else None
        if puller is not None:
            self._begin(entry, left, Destination.PEER, puller)
        else:
            self._drop(victim)

    def demoted(self, segment: Segment, request: Demoted) -> None:
        """*demoted*: what a donor says of its orders. A copy counts only once its commit has been told."""
        for generation in request.done:
            placement = self._placement(segment, generation)
            if placement is not None:
                is_stored = self._under_way[generation].destination is Destination.STORE
                if is_stored or _has_copy(placement, on_host=True):
                    self._settle(placement)
        for generation in request.failed:
            placement = self._placement(segment, generation)
            if placement is not None:
                self._under_way[generation].failed = True
                self._settle(placement)

    def pulled(self, segment: Segment, request: Pulled) -> None:
        """*demoted*, as a donor of another host says it that was to pull into ``segment``."""
        for generation in (*request.done, *request.failed):
            demotion = self._under_way.get(generation)
            if demotion is None or demotion.puller is not segment:
                continue
            placement = next(each for each in demotion.placements if each.generation == generation)
            if not is_demoting(placement):
                segment.stop_pulling(generation)  # it was removed meanwhile
                continue
            if generation in request.done and not _has_copy(placement, on_host=False):
                continue
            demotion.failed |= generation not in request.done
            self._settle(placement)

    def tick(self, now: float) -> None:
        """Ends the demotions whose deadline has passed, or that need not be told of any more; sends on those whose puller is
        gone."""
        if self._began is None:
            self._began = now
        for puller in [
            puller for puller in self._pullers if puller.state is not SegmentState.SERVING or not puller.pulling
        ]:
            del self._pullers[puller]
            self._send_on(puller)
        for segment in [segment for segment in self._waiting if not self.waits(segment)]:
            del self._waiting[segment]
            self._catalog.pressure.check(segment)
        while self._by_deadline:
            demotion = next(iter(self._by_deadline.values()))
            if demotion.is_pending and demotion.deadline > now:
                break
            self._end(demotion)

    # --- one demotion ---------------------------------------------------------------------------------------------

    def _begin(
        self, entry: Entry, placements: list[Placement], destination: Destination, puller: Segment | None = None
    ) -> None:
        catalog = self._catalog
        parent = catalog.index.get(entry.parent)
        demotion = Demotion(entry, placements, destination, catalog.now + catalog.settings.demotion_s, parent, puller)
        self._by_deadline[placements[0].generation] = demotion
        for placement in placements:
            placement.segment.demote(placement, destination)
            self._under_way[placement.generation] = demotion
            if puller is not None:
                puller.pull(placement)
                self._pullers[puller] = None
            catalog.to_order[puller or placement.segment] = None
        if parent is not None:
            parent.leaving += 1
            catalog.offer(parent)
        if log.isEnabledFor(logging.DEBUG):
            log.debug("demote %s: to %s", key_text(entry.key), destination.name)

    def _placement(self, segment: Segment, generation: int) -> Placement | None:
        """The placement that is being demoted; None when that is over."""
        item = segment.demoting.get(generation)
        holder = segment.holder(item.record) if item is not None else None
        return holder if isinstance(holder, Placement) else None

    def _settle(self, placement: Placement) -> None:
        demotion = self._under_way[placement.generation]
        demotion.stop(placement)
        if not demotion.is_pending:
            self._end(demotion)

    def _send_on(self, puller: Segment) -> None:
        """The segment is dropped, or draining: what it was to take goes another way, with a new deadline."""
        for demotion in {
            id(each): each for each in map(self._under_way.get, puller.pulling) if each is not None
        }.values():
            left = self._forget(demotion)
            if left:
                self._catalog.counters["pulls_sent_on"] += 1
            for placement in left:
                if not _is_there(placement):
                    continue  # its chunk was dropped
                if demotion.entry.holds:
                    self._catalog.policy.offer(placement)
                else:
                    self.evict(placement)
            for placement in left:
                self._catalog.pressure.check(placement.segment)

    def _forget(self, demotion: Demotion) -> list[Placement]:
        """It is under way no more; the placements that are still there."""
        del self._by_deadline[demotion.placements[0].generation]
        for placement in demotion.placements:
            demotion.stop(placement)
            del self._under_way[placement.generation]
        if demotion.parent is not None:
            demotion.parent.leaving -= 1
        return [placement for placement in demotion.placements if _is_there(placement)]

    def _end(self, demotion: Demotion) -> None:
        """The chunk leaves, unless it is in use, or gone already."""
        is_late = demotion.is_pending
        left = self._forget(demotion)
        if not left:
            return
        catalog = self._catalog
        outcome = _OUTCOMES[demotion.destination]
        if is_late or demotion.failed:
            outcome = "demotion_timed_out" if is_late else "demotion_failed"
        catalog.counters[outcome] += 1
        for placement in left:
            if not _is_there(placement):
                continue  # its chunk was dropped
            if demotion.entry.holds:
                catalog.policy.offer(placement)
            elif _has_copy(placement, on_host=outcome != "pulled"):
                catalog.retire_placement(placement)
            elif outcome in ("demoted", "pulled"):  # the copy went in the meantime
                catalog.policy.offer(placement)
            else:
                self._drop(placement)
        for placement in left:
            catalog.pressure.check(placement.segment)

    def _drop(self, victim: Placement) -> None:
        """The victim goes; without it the chunk is not whole, so everything of it goes, unless another host has a copy."""
        catalog = self._catalog
        if _has_copy(victim, on_host=False):
            catalog.counters["copies_evicted"] += 1
            catalog.retire_placement(victim)
        else:
            catalog.counters["evicted"] += 1
            catalog.retire_entry(victim.entry)

    def _has_room_below(self, placement: Placement) -> bool:
        """Whether its host has a segment that can take it, now or (it is told to make room) soon."""
        nbytes = placement.extent[1]
        below = [
            segment
            for segment in self._dram_of(placement.segment.info.host)
            if segment.state is SegmentState.SERVING and segment.data_bytes >= nbytes
        ]
        if below and not any(segment.has_room(nbytes) for segment in below):
            self._catalog.pressure.nudge(below[0], nbytes)
        return bool(below)

    def _puller_of(self, going: list[Placement]) -> Segment | None:
        """A segment of another host that has room for them; of these the emptiest, in VRAM if there is one.

        It stays below its low watermark: what is pulled never pushes anything out.
        """
        catalog = self._catalog
        host, tier = going[0].segment.info.host, going[0].segment.info.tier
        if not catalog.settings.pull or tier is not Tier.VRAM:
            return None
        if not all(each.segment.info.remote for each in going):
            return None  # nobody can read it
        sizes = [each.extent[1] for each in going]
        able = [
            segment
            for segment in catalog.segments.values()
            if segment.info.host != host and segment.may_pull(sizes, catalog.settings.low_watermark)
        ]
        return min(
            able, key=lambda segment: (segment.info.tier, segment.used_bytes + segment.pulling_bytes), default=None
        )

    def _dram_of(self, host: bytes) -> Iterator[Segment]:
        return (segment for segment in self._catalog.segments_of(host) if segment.info.tier is Tier.DRAM)

    def check_integrity(self) -> None:
        """Raises ``AssertionError`` unless what is ordered and what is under way agree."""
        leaving = Counter(id(demotion.parent) for demotion in self._by_deadline.values())
        for entry in [*self._catalog.index.whole.values(), *self._catalog.index.partial.values()]:
            assert entry.leaving == leaving[id(entry)], "an entry's count of children on their way down is wrong"
        assert {g for demotion in self._by_deadline.values() for g in _generations(demotion)} == set(self._under_way)
        pulling = {g for demotion in self._by_deadline.values() for g in _generations(demotion) if demotion.puller}
        for segment in self._catalog.segments.values():
            assert set(segment.demoting) <= set(self._under_way), "demoted on nobody's behalf"
            assert set(segment.pulling) <= pulling, "pulled on nobody's behalf"


def is_demoting(placement: Placement) -> bool:
    """Whether its payload is being copied to the tier below."""
    demoting = placement.segment.demoting
    return bool(demoting) and placement.generation in demoting


def _is_beside(other: Placement, victim: Placement) -> bool:
    """Whether both lie in the same tier of the same host."""
    one, two = other.segment.info, victim.segment.info
    return one.tier is two.tier and one.host == two.host


def _generations(demotion: Demotion) -> list[int]:
    return [placement.generation for placement in demotion.placements]


def _is_there(placement: Placement) -> bool:
    return placement.segment.is_readable and placement.segment.holder(placement.record) is placement


def _has_copy(placement: Placement, *, on_host: bool) -> bool:
    """Whether the pool has the shard elsewhere, ``on_host``: on the same host."""
    host = placement.segment.info.host
    return any(
        other is not placement and other.segment.is_readable and (not on_host or other.segment.info.host == host)
        for other in copies_of(placement.entry.shards[placement.rank])
    )
