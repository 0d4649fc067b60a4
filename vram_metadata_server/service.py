"""The metadata server's state machine: requests in, replies and orders out. No sockets, clock, threads or randomness.

``handle`` takes one request, ``tick`` does what time brings: both answer the messages to send, as (recipient, message). A
recipient is the opaque name of a socket; who asks is in the request (session and term). The parts:

    reads.py      lookups, acquires, leases, what readers report      writes.py    reserve, commit, abort, evidence
    removes.py    removals, answered when gone from memory            handover.py  registration, rebuild, the grant gate
    orders.py     what donors are to do                               members.py   sessions and liveness
    catalog.py    entries and segments, retiring                      tombstones.py  drop and clear at once, sweep later
    demotions.py  what becomes of victims                             allocations.py  space first, keys later

Each part names the steps of the protocol's model (``tests/model``) that it takes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Final

import msgspec

from vcache import protocol
from vcache.protocol import Done, Error, ErrorCode, Hits, Located, Orders, Placements, Registered, SegmentInfo, Welcome
from vram_metadata_server.allocations import Allocations
from vram_metadata_server.catalog import Catalog
from vram_metadata_server.counters import Counters
from vram_metadata_server.demotions import Demotions
from vram_metadata_server.eviction.policies import POLICIES
from vram_metadata_server.handover import Registrar
from vram_metadata_server.intake import answer_id
from vram_metadata_server.leases import LeaseTable
from vram_metadata_server.members import Members, Session
from vram_metadata_server.orders import OrderDesk
from vram_metadata_server.pins import PinTable
from vram_metadata_server.reads import Reads
from vram_metadata_server.refusal import RefusalError
from vram_metadata_server.removes import Removes
from vram_metadata_server.report import segment_stats
from vram_metadata_server.segments import Segment
from vram_metadata_server.settings import ServiceSettings
from vram_metadata_server.tombstones import Tombstones
from vram_metadata_server.writes import Writes

log = logging.getLogger(__name__)

Outgoing = list[tuple[bytes, protocol.AnyReply]]
_EVIDENCE: Final = (protocol.Commit, protocol.Abort)  # counts whatever has become of the session
_REPAIR_S: Final = 1.0  # how long an incomplete chunk with a writer at work is left alone before the next look


class Service:
    """One term of the metadata server.

    ``term`` is greater than every earlier one. ``now`` of ``handle`` and ``tick`` never goes back; ``wall_s`` added to it is
    unix time. Single-threaded: the caller makes one call at a time.
    """

    def __init__(self, settings: ServiceSettings, *, term: int, wall_s: float = 0.0) -> None:
        self.term = term
        self.settings = settings
        #: Told in welcomes: the file in which the shell publishes which keys are whole, if it does.
        self.published_as = ""
        self.counters = Counters()
        self.members = Members(settings.liveness_s)
        self.leases = LeaseTable(first_id=(term << 20) + 1)  # never an id of an earlier term
        self.pins = PinTable()
        self.catalog = Catalog(settings, POLICIES[settings.eviction_policy](), self.counters)
        self.tombstones = Tombstones(self.catalog)
        self.writes = Writes(self.catalog, self.tombstones, self.pins, term)
        self.registrar = Registrar(self.catalog, self.tombstones, self.writes, self.members, wall_s)
        self.allocations = Allocations(self.catalog, self.writes, self.registrar.removed)
        self.removes = Removes(self.catalog, self.tombstones, self.writes, self.registrar)
        self.reads = Reads(self.catalog, self.tombstones, self.leases, self.pins)
        self.demotions = Demotions(self.catalog)
        self.desk = OrderDesk(self.catalog, self.members, term)
        self._started: float | None = None
        self._draining: list[tuple[Segment, bytes, int, int]] = []  # and who is to be told, once leases before it ended
        self._handlers: dict[type, Callable[[Session, bytes, Any], protocol.AnyReply | None]] = {
            protocol.Heartbeat: self._heartbeat,
            protocol.Goodbye: self._goodbye,
            protocol.RegisterSegment: self._register,
            protocol.Handover: self._handover,
            protocol.Retired: self._retired,
            protocol.Demoted: self._demoted,
            protocol.Pulled: self._pulled,
            protocol.DrainSegment: self._drain,
            protocol.Lookup: self._lookup,
            protocol.Locate: self._locate,
            protocol.LeaseRun: self._lease_run,
            protocol.Acquire: self._acquire,
            protocol.Release: self._release,
            protocol.Reserve: self._reserve,
            protocol.Allocate: self._allocate,
            protocol.Assign: self._assign,
            protocol.Touch: self._touch,
            protocol.Pin: self._pin,
            protocol.Unpin: self._unpin,
            protocol.Remove: self._remove,
            protocol.Clear: self._clear,
        }

    # --- in and out -----------------------------------------------------------------------------------------------

    def handle(self, sender: bytes, message: bytes | protocol.AnyRequest, now: float) -> Outgoing:
        """Takes one request and answers what is to be sent. Whatever the bytes are, it answers and goes on."""
        if isinstance(message, bytes):
            if len(message) > self.settings.max_message_bytes:
                return self._unreadable(sender, message, f"{len(message)} bytes are more than one message may have")
            try:
                request = protocol.decode_request(message)
            except msgspec.DecodeError as error:
                return self._unreadable(sender, message, str(error))
        else:
            request = message
        self.catalog.now = now
        self.counters["messages"] += 1
        try:
            reply = self._dispatch(sender, request, now)
        except RefusalError as refusal:
            reply = self._refuse(request, refusal.code, str(refusal))
        out: Outgoing = [] if reply is None else [(sender, reply)]
        if self.removes.answers:
            self._answer_removals(out)
        return out

    def _dispatch(self, sender: bytes, message: protocol.AnyRequest, now: float) -> protocol.AnyReply | None:
        kind = type(message)
        if kind is protocol.Hello:
            return self._hello(sender, message, now)  # type: ignore[arg-type]
        if kind is protocol.Stats:
            return self._stats(message.id, now)
        if message.term != self.term:
            raise RefusalError(ErrorCode.STALE_TERM, f"term {message.term} is not {self.term}: say hello again")
        session = self.members.get(message.session)
        if session is not None and not session.is_silent:
            session.heard = now
        elif kind not in _EVIDENCE:
            raise RefusalError(ErrorCode.UNKNOWN_SESSION, "no such session: say hello (again)")
        if kind is protocol.Commit:
            self.writes.commit(message.session, message.generations)  # type: ignore[union-attr]
            return None
        if kind is protocol.Abort:
            self.writes.abort(message.session, message.generations)  # type: ignore[union-attr]
            return None
        assert session is not None
        return self._handlers[kind](session, sender, message)

    def _unreadable(self, sender: bytes, message: bytes, why: str) -> Outgoing:
        self.counters["bad_messages"] += 1
        name = answer_id(message)
        return [] if name is None else [(sender, Error(name, ErrorCode.BAD_REQUEST, why[:1024]))]

    def _refuse(self, message: protocol.AnyRequest, code: ErrorCode, text: str) -> Error | None:
        self.counters["bad_messages" if code is ErrorCode.BAD_REQUEST else "refused_messages"] += 1
        return None if isinstance(message, protocol.ONE_WAY) else Error(message.id, code, text)

    def _answer_removals(self, out: Outgoing) -> None:
        out.extend(self.removes.answers)
        self.removes.answers.clear()

    # --- sessions -------------------------------------------------------------------------------------------------

    def _hello(self, sender: bytes, request: protocol.Hello, now: float) -> protocol.AnyReply:
        if request.version != protocol.PROTOCOL_VERSION:
            text = f"protocol version {request.version}: this server speaks {protocol.PROTOCOL_VERSION}"
            raise RefusalError(ErrorCode.BAD_VERSION, text)
        known = self.members.get(request.session)
        if known is None and self.members.is_full:
            raise RefusalError(ErrorCode.REFUSED, "too many sessions")
        session = self.members.admit(request, sender, now)
        self.registrar.hello(session, request.outstanding)
        log.info("%s said hello from %s with %d reservations", session.name, session.device, len(request.outstanding))
        settings = self.settings
        untold = self._untold(session)
        return Welcome(request.id, self.term, settings.heartbeat_s, settings.liveness_s, untold, self.published_as)

    def _heartbeat(self, session: Session, sender: bytes, request: protocol.Heartbeat) -> Orders:
        session.route = sender
        self.writes.heard_from(session.id, request.seen, request.outstanding)
        for name in request.dead:
            self._proven_dead(session, name)
        news: list[SegmentInfo] = []
        if session.news_version != self.catalog.segments_version:
            session.news_version = self.catalog.segments_version
            news = self._untold(session)
        attached = set(request.attached)
        told = session.told
        unmapped = {
            segment.number
            for segment in self.catalog.segments_of(session.host)
            if segment.number in told and segment.number not in attached
        }
        if unmapped:
            session.told -= unmapped
            session.told_version = -1
        return self.desk.reply(session, request.id, request.attached, news)

    def _goodbye(self, session: Session, sender: bytes, request: protocol.Goodbye) -> Done:
        self.writes.said_goodbye(session.id)
        self._leave(session, "its donor said goodbye")
        self.members.forget(session)
        log.info("%s said goodbye", session.name)
        return Done(request.id, 0)

    def _leave(self, session: Session, why: str) -> None:
        self.leases.release_all(session.id)
        for number in list(session.segments):
            self.registrar.drop(self.catalog.segments[number], why)

    def _proven_dead(self, donor: Session, name: bytes) -> None:
        """*writer proven dead*. A donor can tell for writers of its own host only: elsewhere there is no lock to be held."""
        if not donor.segments:
            return
        session = self.members.get(name)
        if session is not None and session.writes and session.host == donor.host and session is not donor:
            self.counters["sessions_dead"] += 1
            log.info("%s is dead", session.name)
            self.writes.proven_dead(name)
            self._leave(session, "its donor died")
            self.members.forget(session)
        self.registrar.proven_dead(donor, name)

    def _untold(self, session: Session) -> list[SegmentInfo]:
        """The segments the session was not told of yet; it is told now."""
        if session.told_version == self.catalog.segments_version:
            return []
        segments = self.catalog.segments
        session.told_version = self.catalog.segments_version
        new = [segments[number].info for number in segments if number not in session.told]
        session.told = set(segments)
        return new

    # --- donors ---------------------------------------------------------------------------------------------------

    def _register(self, session: Session, sender: bytes, request: protocol.RegisterSegment) -> Registered:
        return Registered(request.id, self.term, self.registrar.register(session, request).number)

    def _handover(self, session: Session, sender: bytes, request: protocol.Handover) -> Done:
        segment = self.registrar.segment_of(session, request.number)
        return Done(request.id, self.registrar.hand_over(segment, request))

    def _retired(self, session: Session, sender: bytes, request: protocol.Retired) -> Done:
        segment = self.registrar.segment_of(session, request.number)
        return Done(request.id, self.catalog.retired(segment, request.items))

    def _demoted(self, session: Session, sender: bytes, request: protocol.Demoted) -> None:
        self.demotions.demoted(self.registrar.segment_of(session, request.number), request)

    def _pulled(self, session: Session, sender: bytes, request: protocol.Pulled) -> None:
        self.demotions.pulled(self.registrar.segment_of(session, request.number), request)

    def _drain(self, session: Session, sender: bytes, request: protocol.DrainSegment) -> None:
        segment = self.registrar.segment_of(session, request.number)
        self.registrar.drain(segment)
        self._draining.append((segment, sender, request.id, self.leases.next_id))

    # --- readers and writers --------------------------------------------------------------------------------------

    def _lookup(self, session: Session, sender: bytes, request: protocol.Lookup) -> Hits:
        return Hits(request.id, self.term, *self.reads.lookup(session, request))

    def _locate(self, session: Session, sender: bytes, request: protocol.Locate) -> Located:
        return Located(request.id, self.term, *self.reads.locate(session, request))

    def _lease_run(self, session: Session, sender: bytes, request: protocol.LeaseRun) -> None:
        self.reads.lease_run(session, request)

    def _acquire(self, session: Session, sender: bytes, request: protocol.Acquire) -> Placements:
        return Placements(request.id, self.term, *self.reads.acquire(session, request), self._untold(session))

    def _release(self, session: Session, sender: bytes, request: protocol.Release) -> None:
        self.reads.release(session, request)

    def _reserve(self, session: Session, sender: bytes, request: protocol.Reserve) -> protocol.Grants:
        if not session.writes:
            raise RefusalError(ErrorCode.REFUSED, "this session said in its hello that it does not write")
        return protocol.Grants(request.id, self.term, *self.writes.reserve(session, request), self._untold(session))

    def _allocate(self, session: Session, sender: bytes, request: protocol.Allocate) -> protocol.Grants:
        granted = self.allocations.allocate(session, self.registrar.segment_of(session, request.number), request)
        return protocol.Grants(request.id, self.term, *granted, self._untold(session))

    def _assign(self, session: Session, sender: bytes, request: protocol.Assign) -> protocol.Grants:
        return protocol.Grants(request.id, self.term, self.allocations.assign(session, request), b"", [])

    def _touch(self, session: Session, sender: bytes, request: protocol.Touch) -> None:
        self.reads.touch(request)

    def _pin(self, session: Session, sender: bytes, request: protocol.Pin) -> Done:
        return Done(request.id, self.reads.pin(request))

    def _unpin(self, session: Session, sender: bytes, request: protocol.Unpin) -> Done:
        return Done(request.id, self.reads.unpin(request))

    def _remove(self, session: Session, sender: bytes, request: protocol.Remove) -> None:
        self.removes.remove(sender, request.id, request.keys)

    def _clear(self, session: Session, sender: bytes, request: protocol.Clear) -> None:
        self.removes.clear(sender, request.id, None if request.everything else request.tenant)

    def _stats(self, request: int, now: float) -> protocol.ServerStats:
        if self._started is None:
            self._started = now
        return protocol.ServerStats(
            id=request,
            term=self.term,
            uptime_s=now - self._started,
            entries=len(self.catalog.index),
            leases=len(self.leases),
            reservations=len(self.catalog.reservations),
            pins=len(self.pins),
            sessions=len(self.members),
            segments=[segment_stats(segment) for segment in self.catalog.segments.values()],
            counters=dict(self.counters),
        )

    # --- time -----------------------------------------------------------------------------------------------------

    @property
    def index_is_exact(self) -> bool:
        """Whether every key that is whole in the index is a hit; not while tombstones hide some of them."""
        return not self.tombstones.sweeps

    @property
    def has_work(self) -> bool:
        """Whether a tick has something to do that does not wait for a deadline."""
        return bool(
            self.catalog.to_order or self.tombstones.sweeps or self.catalog.pressure.targets or self.removes.answers
        )

    def tick(self, now: float, drained: bool) -> Outgoing:
        """Does what time brings, a bounded amount of it.

        ``drained``: everything that had come when ``now`` was taken has been handled. Only then is anybody judged silent, so
        that a busy server never takes its own delay for a donor's silence.
        """
        if self._started is None:
            self._started = now
        catalog = self.catalog
        catalog.now = now
        counters = self.counters
        out: Outgoing = []
        self.writes.expire(now)
        counters["leases_expired"] += self.leases.expire(now)
        self.pins.expire(now)
        self._expire_entries(now)
        if drained:
            for session in self.members.silent(now):
                out.extend(self._went_silent(session))
        self.tombstones.sweep(self.settings.sweep_batch)
        self.demotions.tick(now)
        for victim in catalog.pressure.victims(self.settings.eviction_batch, self.demotions.waits):
            self.demotions.evict(victim)
        self._finish_drains(out)
        for session in self.members.suspected():
            if not self._is_needed(session):
                self._forget(session)
        out.extend(self.desk.pushes())
        self._answer_removals(out)
        return out

    def _expire_entries(self, now: float) -> None:
        catalog = self.catalog
        for key in catalog.lifetimes.due(now):
            entry = catalog.index.get(key)
            if entry is not None:
                self.counters["expired"] += 1
                catalog.retire_entry(entry)
        for key in catalog.incomplete.due(now):
            entry = catalog.index.partial.get(key)
            if entry is None:
                continue
            ranks = range(len(entry.shards))
            if any(entry.shards[rank] is None and catalog.reservations.live(key, rank) for rank in ranks):
                catalog.incomplete.set(key, now + _REPAIR_S)  # its last shards are being written
                continue
            self.counters["incomplete_expired"] += 1
            catalog.retire_entry(entry)

    def _went_silent(self, session: Session) -> Outgoing:
        """Its leases and segments end; what it has reserved waits for evidence, which donors of its host are asked for."""
        self.counters["sessions_silent"] += 1
        log.warning("%s is silent", session.name)
        self._leave(session, "its donor is silent")
        if self._is_needed(session):
            self.members.suspect(session)
            return list(self.desk.probes(session.host))
        self._forget(session)
        return []

    def _is_needed(self, session: Session) -> bool:
        """Whether it holds something in a registered segment, which only evidence can free."""
        mine = self.catalog.reservations.of_session(session.id)
        return any(reservation.segment is not None for reservation in mine.values())

    def _forget(self, session: Session) -> None:
        """Forgets a silent session and its claims on segments that are gone.

        Nobody could prove it dead, and nothing is lost: a forgotten session has to say hello again before the gate of any
        segment opens that registers with it attached.
        """
        self.writes.forget_claims(session.id)
        self.members.forget(session)

    def _finish_drains(self, out: Outgoing) -> None:
        for drain in list(self._draining):
            segment, route, request, lease_mark = drain
            if segment.number in self.catalog.segments:
                reserved = self.catalog.reservations.of_segment(segment.info.segment_id)
                if self.leases.oldest_id < lease_mark or any(r.segment is segment for r in reserved.values()):
                    continue
                self.registrar.drop(segment, "drained")
            self._draining.remove(drain)
            out.append((route, Done(request, 0)))
