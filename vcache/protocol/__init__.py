"""The messages between clients, donors and the metadata server (msgspec, msgpack arrays, tagged).

A client's request carries its session and the server's term (one life of the server); a reply repeats the request's ``id``.
Every call is batched over keys. Keys travel as one blob of 16-byte keys, placements as one blob of packed records, so that
the work per key on either side is a slice and a dictionary access.

``fields.py`` has what messages are made of, ``requests.py`` and ``replies.py`` the messages. Not here: sockets, retries, what a
message does to the state (``vram_metadata_server/service.py``).
"""

from __future__ import annotations

import msgspec

from vcache.protocol.fields import (
    KEY_BYTES,
    MAX_ITEMS_PER_PAGE,
    MAX_KEYS_PER_CALL,
    MAX_MESSAGE_BYTES,
    PLACEMENT,
    PROTOCOL_VERSION,
    DemoteItem,
    Destination,
    ErrorCode,
    Outcome,
    PullItem,
    RecordInfo,
    Reservation,
    RetireItem,
    Seconds,
    SegmentInfo,
    Tier,
)
from vcache.protocol.replies import (
    AnyReply,
    Done,
    Error,
    Grants,
    Hits,
    Located,
    Orders,
    Placements,
    Registered,
    SegmentStats,
    ServerStats,
    Welcome,
)
from vcache.protocol.requests import (
    ONE_WAY,
    Abort,
    Acquire,
    Allocate,
    AnyRequest,
    Assign,
    Clear,
    Commit,
    Demoted,
    DrainSegment,
    Goodbye,
    Handover,
    Heartbeat,
    Hello,
    LeaseRun,
    Locate,
    Lookup,
    Pin,
    Pulled,
    RegisterSegment,
    Release,
    Remove,
    Reserve,
    Retired,
    Stats,
    Touch,
    Unpin,
)

__all__ = [
    "KEY_BYTES",
    "MAX_ITEMS_PER_PAGE",
    "MAX_KEYS_PER_CALL",
    "MAX_MESSAGE_BYTES",
    "ONE_WAY",
    "PLACEMENT",
    "PROTOCOL_VERSION",
    "Abort",
    "Acquire",
    "Allocate",
    "AnyReply",
    "AnyRequest",
    "Assign",
    "Clear",
    "Commit",
    "DemoteItem",
    "Demoted",
    "Destination",
    "Done",
    "DrainSegment",
    "Error",
    "ErrorCode",
    "Goodbye",
    "Grants",
    "Handover",
    "Heartbeat",
    "Hello",
    "Hits",
    "LeaseRun",
    "Locate",
    "Located",
    "Lookup",
    "Orders",
    "Outcome",
    "Pin",
    "Placements",
    "PullItem",
    "Pulled",
    "RecordInfo",
    "RegisterSegment",
    "Registered",
    "Release",
    "Remove",
    "Reservation",
    "Reserve",
    "RetireItem",
    "Retired",
    "Seconds",
    "SegmentInfo",
    "SegmentStats",
    "ServerStats",
    "Stats",
    "Tier",
    "Touch",
    "Unpin",
    "Welcome",
    "decode_reply",
    "decode_request",
    "encode",
]

_encoder = msgspec.msgpack.Encoder()
_requests: msgspec.msgpack.Decoder[AnyRequest] = msgspec.msgpack.Decoder(AnyRequest)
_replies: msgspec.msgpack.Decoder[AnyReply] = msgspec.msgpack.Decoder(AnyReply)

encode = _encoder.encode
#: Raises ``msgspec.DecodeError`` (``ValidationError`` is one) on anything that is not a well-formed request or reply.
decode_request = _requests.decode
decode_reply = _replies.decode
