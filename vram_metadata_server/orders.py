"""What donors are told to do: level-triggered, pushed when it comes up and repeated with each heartbeat until it is done."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice

from vcache.protocol import MAX_ITEMS_PER_PAGE, DemoteItem, Destination, Orders, PullItem, RetireItem, SegmentInfo
from vram_metadata_server.catalog import Catalog
from vram_metadata_server.members import Members, Session
from vram_metadata_server.segments import Pull

PullOrder = tuple[int, SegmentInfo, list[PullItem]]


class OrderDesk:
    """Makes the ``Orders`` of each donor."""

    def __init__(self, catalog: Catalog, members: Members, term: int) -> None:
        self._catalog = catalog
        self._members = members
        self._term = term

    def reply(self, session: Session, request: int, attached: list[int], news: list[SegmentInfo]) -> Orders:
        """All that the session has to do, as the answer to its heartbeat; and ``news``, segments that it is told of."""
        segments = self._catalog.segments
        room = MAX_ITEMS_PER_PAGE
        retire: list[tuple[int, list[RetireItem]]] = []
        demote: list[tuple[int, list[DemoteItem]]] = []
        pull: list[PullOrder] = []
        probe: set[bytes] = set()
        again: list[int] = []
        for number in session.segments:
            segment = segments[number]
            if segment.gate is not None:
                probe |= segment.gate.waiting
                if segment.gate.wants_new_scan:
                    again.append(number)
            pending = [RetireItem(item.record, item.generation) for item in islice(segment.retiring.values(), room)]
            if pending:
                retire.append((number, pending))
                room -= len(pending)
            own = (item for item in segment.demoting.values() if item.destination is not Destination.PEER)
            sinking = list(islice(own, room))
            if sinking:
                demote.append((number, sinking))
                room -= len(sinking)
            pulling = list(islice(segment.pulling.values(), room))
            pull.extend(_by_source(number, pulling))
            room -= len(pulling)
            if room:
                segment.unsent.clear()
                segment.undemoted.clear()
                segment.unpulled.clear()
                self._catalog.to_order.pop(segment, None)
        if session.segments:
            probe |= self._members.suspects(session.host)
        gone = [number for number in attached if number not in segments]
        probes = sorted(probe)[:MAX_ITEMS_PER_PAGE]
        return Orders(request, self._term, gone, retire, probes, again, demote, pull, news)

    def pushes(self) -> Iterator[tuple[bytes, Orders]]:
        """Orders that came up since they were last asked for."""
        for segment in list(self._catalog.to_order):
            page = segment.unsent[:MAX_ITEMS_PER_PAGE]
            del segment.unsent[: len(page)]
            sinking = segment.undemoted[:MAX_ITEMS_PER_PAGE]
            del segment.undemoted[: len(sinking)]
            pulling = segment.unpulled[:MAX_ITEMS_PER_PAGE]
            del segment.unpulled[: len(pulling)]
            if not (segment.unsent or segment.undemoted or segment.unpulled):
                del self._catalog.to_order[segment]
            donor = self._members.get(segment.donor)
            again = [segment.number] if segment.gate is not None and segment.gate.wants_new_scan else []
            if donor is not None and (page or again or sinking or pulling):
                retire = [(segment.number, page)] if page else []
                demote = [(segment.number, sinking)] if sinking else []
                pull = list(_by_source(segment.number, pulling))
                yield donor.route, Orders(0, self._term, [], retire, [], again, demote, pull, [])

    def probes(self, host: bytes) -> Iterator[tuple[bytes, Orders]]:
        """Asks the donors of a host to prove its suspects dead, without waiting for their heartbeats."""
        suspects = sorted(self._members.suspects(host))[:MAX_ITEMS_PER_PAGE]
        if suspects:
            for session in self._members:
                if session.host == host and session.segments and not session.is_silent:
                    yield session.route, Orders(0, self._term, [], [], suspects, [], [], [], [])


def _by_source(number: int, pulls: Iterable[Pull]) -> Iterator[PullOrder]:
    """Orders to pull into segment ``number``, one for each segment that they pull from."""
    items: dict[int, PullOrder] = {}
    for pull in pulls:
        info = pull.source.info  # as it is read now
        items.setdefault(info.number, (number, info, []))[2].append(pull.item)
    yield from items.values()
