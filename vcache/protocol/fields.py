"""What messages are made of: bounds and types of fields, enums, the small structs inside messages, the base of all messages."""

from __future__ import annotations

from enum import IntEnum
from struct import Struct as Packer
from typing import Annotated, Final

import msgspec

PROTOCOL_VERSION: Final = 2
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


class Destination(IntEnum):
    """Where a demoted payload goes."""

    DRAM = 0  # a segment of tier DRAM on the same host
    STORE = 1  # the store below the pool
    PEER = 2  # a segment of another host, whose donor is ordered to pull it; the victim's own donor is not


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


class DemoteItem(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """A committed record whose payload is to be copied to the tier below before it goes."""

    record: U32
    generation: U63
    destination: Destination


class PullItem(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """A committed record of another host's segment whose payload is to be copied into one's own before it goes."""

    record: U32
    generation: U63
    key: Key
    offset: U63
    nbytes: U63
