"""The messages between clients, donors and the metadata server (msgspec, msgpack arrays, tagged).

A client's request carries its session and the server's term (one life of the server); a reply repeats the request's ``id``.
Every call is batched over keys. Keys travel as one blob of 16-byte keys, placements as one blob of packed records, so that
the work per key on either side is a slice and a dictionary access.

What is *not* here: sockets, retries, what a message does to the state (``vram_metadata_server/service.py``).
"""

from __future__ import annotations

from enum import IntEnum
from struct import Struct as Packer
from typing import Annotated, Final

import msgspec

PROTOCOL_VERSION: Final = 1
KEY_BYTES: Final = 16
MAX_KEYS_PER_CALL: Final = 16_384
MAX_ITEMS_PER_PAGE: Final = 4_096
MAX_MESSAGE_BYTES: Final = 4 << 20

KeyBlob = Annotated[bytes, msgspec.Meta(max_length=KEY_BYTES * MAX_KEYS_PER_CALL)]
Key = Annotated[bytes, msgspec.Meta(min_length=KEY_BYTES, max_length=KEY_BYTES)]
ParentKey = Annotated[bytes, msgspec.Meta(max_length=KEY_BYTES)]
SessionId = Annotated[bytes, msgspec.Meta(min_length=16, max_length=16)]
HostId = Annotated[bytes, msgspec.Meta(min_length=16, max_length=16)]
SegmentId = Annotated[bytes, msgspec.Meta(min_length=16, max_length=16)]
Label = Annotated[str, msgspec.Meta(max_length=256)]
#: How processes of other hosts read a segment (``vcache/remote/announcement.py``), opaque to the server; empty: they cannot.
Announced = Annotated[bytes, msgspec.Meta(max_length=1024)]
U32 = Annotated[int, msgspec.Meta(ge=0, lt=1 << 32)]
U63 = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]
Rank = Annotated[int, msgspec.Meta(ge=0, lt=4096)]
Ranks = Annotated[int, msgspec.Meta(ge=1, le=4096)]
Seconds = Annotated[float, msgspec.Meta(ge=0, le=86_400)]
Generations = Annotated[list[U63], msgspec.Meta(max_length=MAX_KEYS_PER_CALL)]
Sessions = Annotated[list[SessionId], msgspec.Meta(max_length=MAX_ITEMS_PER_PAGE)]
Numbers = Annotated[list[U32], msgspec.Meta(max_length=MAX_ITEMS_PER_PAGE)]

#: One placement on the wire: segment number, record index, generation (even), offset and nbytes within the segment.
PLACEMENT: Final = Packer("<IIQQQ")


class Tier(IntEnum):
    """Where a segment's bytes live."""

    VRAM = 0
    DRAM = 1


class Outcome(IntEnum):
    """What became of one key of a ``Reserve``; one byte each in ``Grants.outcomes``."""

    GRANTED = 0
    EXISTS = 1  # present, or another writer holds a live reservation for this shard
    NO_SPACE = 2  # nothing free now; the write is skipped, eviction was asked to run ahead
    DECLINED = 3  # no segment can take it (too large, none on this host, gate closed), or the session holds too many


class ErrorCode(IntEnum):
    """Why a request was refused."""

    BAD_REQUEST = 0  # malformed, oversized or unknown
    BAD_VERSION = 1  # the hello speaks another protocol version
    STALE_TERM = 2  # the server restarted: say hello again
    UNKNOWN_SESSION = 3  # never said hello, or was silent past the liveness deadline: say hello again
    UNKNOWN_SEGMENT = 4  # the segment was dropped: register it again under a new incarnation
    REFUSED = 5  # understood, but not allowed (a reader reserving, a stranger draining)
    FAILED = 6  # the server failed on this request (its log says how) and goes on


class Message(msgspec.Struct, array_like=True, frozen=True, gc=False, forbid_unknown_fields=True):
    """Base of everything on the wire."""

    id: U63


class Request(Message):
    """A client's message. ``term`` is the one of the last ``Welcome`` (0 in a hello)."""

    session: SessionId
    term: U63


# --- small structs inside messages -------------------------------------------------------------------------------------


class SegmentInfo(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """What a client needs to map a segment. ``number`` names it in placements for the rest of the term."""

    number: U32
    segment_id: SegmentId
    incarnation: U63
    tier: Tier
    host: HostId
    device: Label  # "cpu:0", or a GPU's UUID
    nbytes: U63
    handle: Annotated[
        bytes, msgspec.Meta(max_length=1024)
    ]  # opaque to the server: what the memory module needs to open it
    label: Label
    remote: Announced = b""


class Reservation(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """A grant as its writer still holds it; said in a hello so that a restarted server gives its space to nobody else."""

    segment_id: SegmentId
    incarnation: U63
    record: U32
    generation: U63  # even: the value of the committed record
    key: Key
    parent: ParentKey
    rank: Rank
    ranks: Ranks
    tenant: U63
    offset: U63
    nbytes: U63
    tokens: U32
    ttl_s: U32
    is_copy: bool = False  # reserved with ``Reserve.into`` or ``into_tier``


class RecordInfo(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """One non-free directory record as a donor hands it over. An odd generation: a writer was at work."""

    record: U32
    generation: U63
    key: Key
    parent: ParentKey
    rank: Rank
    ranks: Ranks
    tenant: U63
    offset: U63
    nbytes: U63
    tokens: U32
    expires_s: U63  # unix seconds, 0 = never


class RetireItem(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """A record to be (or that was) retired in memory, if it still holds this generation (odd or even form)."""

    record: U32
    generation: U63


# --- requests ----------------------------------------------------------------------------------------------------------


class Hello(Request, tag=1):
    """Opens or renews a session. ``outstanding``: every reservation whose record is not committed in memory yet, of any term.

    What is committed but was not told (or told to a server that is gone) is left out: the donor's scan finds it. Were it
    claimed, and had it been found, evicted and retired under an earlier term, its commit would bring back what is not there.

    Under an unchanged term the server knows them already, and absence from the list settles nothing (a grant may be on its
    way); only a heartbeat's ``seen`` does.
    """

    version: U32
    host: HostId
    name: Label
    device: Label
    writes: bool
    outstanding: Annotated[list[Reservation], msgspec.Meta(max_length=MAX_ITEMS_PER_PAGE)]


class Heartbeat(Request, tag=2):
    """Keeps the session alive and carries evidence, level-triggered.

    ``seen`` is the highest generation the client was ever granted in this term, used or not; every reservation of this
    session up to it, and every one it said in its hello, that is not in ``outstanding`` is settled: its writer has stopped
    touching the extent. A commit may still be on its way by the other socket, so a live one is kept until its deadline.
    """

    attached: Numbers  # segments this client has mapped (told again of all others as they come up)
    seen: U63
    outstanding: Generations
    dead: Sessions  # sessions this donor has proven dead (it could take their flock)


class Goodbye(Request, tag=3):
    """Ends a session cleanly: nothing of it is outstanding any more."""


class RegisterSegment(Request, tag=4):
    """Gives a segment to the pool. ``attached``: live writers of this host that may hold grants in this memory.

    Answered with the same number when sent again with the same incarnation. Each time, the donor scans its directory only
    after the answer, and hands over what it finds: what a writer did before it said hello under this term, unknown to the
    server, is seen by a scan that begins after that hello. A donor that was dropped while it lived (it is told
    ``UNKNOWN_SESSION``, or finds that it went without a heartbeat for ``liveness_s``) first retires all committed records and
    takes the next incarnation: some of them may have been removed.
    """

    segment_id: SegmentId
    incarnation: U63
    tier: Tier
    device: Label
    nbytes: U63
    data_offset: U63
    records: U32
    handle: Annotated[bytes, msgspec.Meta(max_length=1024)]
    label: Label
    attached: Sessions
    remote: Announced = b""  # said again with another value, readers are told of the new one


class Handover(Request, tag=5):
    """A page of a registered segment's records; ``last`` ends it. A fresh segment sends one empty last page.

    Answered with ``Done`` (records taken); a page sent twice is harmless.
    """

    number: U32
    items: Annotated[list[RecordInfo], msgspec.Meta(max_length=MAX_ITEMS_PER_PAGE)]
    last: bool


class Retired(Request, tag=6):
    """A donor retired these records in memory: records and extents are free."""

    number: U32
    items: Annotated[list[RetireItem], msgspec.Meta(max_length=MAX_ITEMS_PER_PAGE)]


class DrainSegment(Request, tag=7):
    """The donor wants its segment back: no new grants or leases in it; answered when its last lease ended."""

    number: U32


class Lookup(Request, tag=8):
    """Length of the leading run of chunks present with all ranks' shards; with ``lease_s`` > 0 that run is leased."""

    keys: KeyBlob
    lease_s: Seconds


class Acquire(Request, tag=9):
    """The leading run as in ``Lookup``, leased, with one placement of ``rank``'s shard for each chunk of it."""

    keys: KeyBlob
    rank: Rank
    lease_s: Seconds


class Release(Request, tag=10):
    """Ends a lease (one-way). ``invalid``: indices in the run whose record did not validate: the placements are dropped."""

    lease: U63
    invalid: Annotated[list[U32], msgspec.Meta(max_length=MAX_KEYS_PER_CALL)]


class Reserve(Request, tag=11):
    """Space for one rank's shards of a run of chunks; ``parent`` is the key before the first (empty at a prompt's start).

    With neither ``into`` nor ``into_tier`` a shard that the pool has anywhere ``EXISTS``, and the server chooses a segment of
    the writer's host. With one of them (or both: both hold) the space is for a **copy**: it is in the segment of number
    ``into``, or in a segment of the writer's host whose tier is ``into_tier``. A shard that is there already, or being written
    there, ``EXISTS``; one that the pool has elsewhere is ``GRANTED`` or has ``NO_SPACE``; one that the pool has nowhere is
    ``DECLINED``, as is a segment that is not the writer's host's, not serving, or too small.

    The commit adds a placement to the shard. Whoever copies commits only what the source's record still proves *after* the
    copy. Removing the chunk meanwhile ends the reservation, and is answered only when the copy, too, is gone from memory.
    """

    keys: KeyBlob
    parent: ParentKey
    rank: Rank
    ranks: Ranks
    nbytes: U63  # of each payload
    tokens: U32  # of each chunk
    tenant: U63
    ttl_s: U32  # 0 = until evicted
    pin_s: Seconds
    into: U32 = 0  # a segment's number; 0 = not said
    into_tier: Tier | None = None


class Commit(Request, tag=12):
    """These records are committed in memory (one-way). Also the evidence that their writer has stopped."""

    generations: Generations


class Abort(Request, tag=13):
    """These reservations are given up, their writer has stopped touching them (one-way)."""

    generations: Generations


class Touch(Request, tag=14):
    """Counts as a use for eviction (one-way)."""

    keys: KeyBlob


class Pin(Request, tag=15):
    """Keeps present chunks from eviction for ``pin_s`` seconds; answers how many."""

    keys: KeyBlob
    pin_s: Seconds


class Unpin(Request, tag=16):
    """Ends pins before their time; answers how many."""

    keys: KeyBlob


class Remove(Request, tag=17):
    """Removes chunks; answered once every record is retired in memory (or its donor is dead): removed means gone."""

    keys: KeyBlob


class Clear(Request, tag=18):
    """Removes every chunk of ``tenant`` (all chunks when ``everything``); answered as ``Remove`` is."""

    tenant: U63
    everything: bool


class Stats(Request, tag=19):
    """Asks for the server's state. Needs no session: ``session`` and ``term`` may be zeros."""


AnyRequest = (
    Hello
    | Heartbeat
    | Goodbye
    | RegisterSegment
    | Handover
    | Retired
    | DrainSegment
    | Lookup
    | Acquire
    | Release
    | Reserve
    | Commit
    | Abort
    | Touch
    | Pin
    | Unpin
    | Remove
    | Clear
    | Stats
)


# --- replies -----------------------------------------------------------------------------------------------------------


class Welcome(Message, tag=64):
    """Answers a hello."""

    term: U63
    heartbeat_s: float
    liveness_s: float
    segments: list[SegmentInfo]


class Orders(Message, tag=65):
    """Answers a heartbeat, and is pushed unasked (``id`` 0) to the socket that last sent one. Repeated until done."""

    term: U63
    gone: list[int]  # of the heartbeat's ``attached``: segments that are no more; unmap them
    retire: list[tuple[int, list[RetireItem]]]  # (segment number, records) for this donor to retire in memory
    probe: list[bytes]  # sessions of this host for this donor to prove dead
    register_again: list[
        int
    ]  # segments to register (same incarnation), scan and hand over once more: see RegisterSegment


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


class Placements(Message, tag=69):
    """Answers ``Acquire``: ``len(placements) // PLACEMENT.size`` chunks; ``segments`` the session was not told of yet.

    ``lease`` 0: nothing was leased (no hit, or the session holds too many leases) and ``placements`` is empty.
    """

    term: U63
    lease: int
    placements: bytes
    segments: list[SegmentInfo]


class Grants(Message, tag=70):
    """Answers ``Reserve``: an ``Outcome`` byte per key, and a placement for each granted one, in order."""

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


AnyReply = Welcome | Orders | Registered | Done | Hits | Placements | Grants | ServerStats | Error

#: Requests that never get a reply, not even an error.
ONE_WAY: Final = (Release, Commit, Abort, Touch)

_encoder = msgspec.msgpack.Encoder()
_requests: msgspec.msgpack.Decoder[AnyRequest] = msgspec.msgpack.Decoder(AnyRequest)
_replies: msgspec.msgpack.Decoder[AnyReply] = msgspec.msgpack.Decoder(AnyReply)

encode = _encoder.encode
#: Raises ``msgspec.DecodeError`` (``ValidationError`` is one) on anything that is not a well-formed request or reply.
decode_request = _requests.decode
decode_reply = _replies.decode
