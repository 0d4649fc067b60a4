"""What the metadata server sends: replies, and orders to donors."""

from __future__ import annotations

import msgspec

from vcache.protocol.fields import (
    U63,
    DemoteItem,
    ErrorCode,
    Message,
    PullItem,
    RetireItem,
    SegmentInfo,
)


class Welcome(Message, tag=64):
    """Answers a hello."""

    term: U63
    heartbeat_s: float
    liveness_s: float
    segments: list[SegmentInfo]
    index: str = ""  # the file of the server's index in its host's runtime directory, if it publishes one


class Orders(Message, tag=65):
    """Answers a heartbeat, and is pushed unasked (``id`` 0) to the socket that last sent one. Repeated until done."""

    term: U63
    gone: list[int]  # of the heartbeat's ``attached``: segments that are no more; unmap them
    retire: list[tuple[int, list[RetireItem]]]  # (segment number, records) for this donor to retire in memory
    probe: list[bytes]  # sessions of this host for this donor to prove dead
    register_again: list[
        int
    ]  # segments to register (same incarnation), scan and hand over once more: see RegisterSegment
    #: (segment number, records) for this donor to copy to the tier below, see ``Demoted``.
    demote: list[tuple[int, list[DemoteItem]]]
    #: (segment number, another host's segment, its records) for this donor to copy into the former, see ``Pulled``.
    pull: list[tuple[int, SegmentInfo, list[PullItem]]]
    #: Segments that have registered since the last heartbeat that was answered: who reads in shared memory hears of them here.
    segments: list[SegmentInfo]


class Registered(Message, tag=66):
    """Answers a registration with the segment's number in this term."""

    term: U63
    number: int


class Done(Message, tag=67):
    """Answers what has only success to tell: a count of the items concerned."""

    count: int


class Hits(Message, tag=68):
    """Answers ``Lookup``: chunks in the run, and the lease on them (0 = none)."""

    term: U63
    hits: int
    lease: int


class Located(Message, tag=73):
    """Answers ``Locate``: a byte for each key, 1 where it is present, and the lease on those (0 = none)."""

    term: U63
    present: bytes
    lease: int


class Placements(Message, tag=69):
    """Answers ``Acquire``: ``len(placements) // PLACEMENT.size`` chunks; ``segments`` the session was not told of yet.

    ``lease`` 0: nothing was leased (no hit, or the session holds too many leases) and ``placements`` is empty.
    """

    term: U63
    lease: int
    placements: bytes
    segments: list[SegmentInfo]


class Grants(Message, tag=70):
    """Answers ``Reserve``, ``Allocate``, ``Assign``: an ``Outcome`` byte each, and placements of those granted, in order."""

    term: U63
    outcomes: bytes
    placements: bytes
    segments: list[SegmentInfo]


class SegmentStats(msgspec.Struct, frozen=True):
    """One segment as ``vcache status`` shows it; sizes in bytes."""

    number: int
    segment_id: str
    label: str
    device: str
    tier: str
    state: str  # "gated", "serving", "draining"
    total_bytes: int
    used_bytes: int
    free_bytes: int
    largest_free_bytes: int
    retiring_bytes: int
    records: int
    records_used: int


class ServerStats(Message, tag=71):
    """Answers ``Stats``. ``counters`` only ever grow within a term; rates are for the reader to derive."""

    term: U63
    uptime_s: float
    entries: int
    leases: int
    reservations: int
    pins: int
    sessions: int
    segments: list[SegmentStats]
    counters: dict[str, int]


class Error(Message, tag=72):
    """The request was refused. ``id`` 0 when it could not be read at all."""

    code: ErrorCode
    text: str


AnyReply = Welcome | Orders | Registered | Done | Hits | Located | Placements | Grants | ServerStats | Error
