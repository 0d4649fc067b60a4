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
    U32,
    U63,
    Announced,
    ErrorCode,
    Generations,
    HostId,
    Key,
    KeyBlob,
    Label,
    Message,
    Numbers,
    Outcome,
    ParentKey,
    Rank,
    Ranks,
    RecordInfo,
    Request,
    Reservation,
    RetireItem,
    Seconds,
    SegmentId,
    SegmentInfo,
    SessionId,
    Sessions,
    Tier,
)
from vcache.protocol.replies import (
    AnyReply,
    Done,
    Error,
    Grants,
    Hits,
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
    AnyRequest,
    Clear,
    Commit,
    DrainSegment,
    Goodbye,
    Handover,
    Heartbeat,
    Hello,
    Lookup,
    Pin,
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
    "U32",
    "U63",
    "Abort",
    "Acquire",
    "Announced",
    "AnyReply",
    "AnyRequest",
    "Clear",
    "Commit",
    "Done",
    "DrainSegment",
    "Error",
    "ErrorCode",
    "Generations",
    "Goodbye",
    "Grants",
    "Handover",
    "Heartbeat",
    "Hello",
    "Hits",
    "HostId",
    "Key",
    "KeyBlob",
    "Label",
    "Lookup",
    "Message",
    "Numbers",
    "Orders",
    "Outcome",
    "ParentKey",
    "Pin",
    "Placements",
    "Rank",
    "Ranks",
    "RecordInfo",
    "RegisterSegment",
    "Registered",
    "Release",
    "Remove",
    "Request",
    "Reservation",
    "Reserve",
    "RetireItem",
    "Retired",
    "Seconds",
    "SegmentId",
    "SegmentInfo",
    "SegmentStats",
    "ServerStats",
    "SessionId",
    "Sessions",
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
