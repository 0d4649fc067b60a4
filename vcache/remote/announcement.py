"""How a donor tells other hosts where its segment can be read. The server passes it on unread."""

from __future__ import annotations

from typing import Annotated

import msgspec


class Announcement(msgspec.Struct, array_like=True, frozen=True):
    """A segment that ``engine`` reaches: its peer's name, and the address at which the peer has registered it."""

    engine: Annotated[str, msgspec.Meta(max_length=32)]
    peer: Annotated[str, msgspec.Meta(max_length=256)]
    address: Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]


_decoder = msgspec.msgpack.Decoder(Announcement)
announced = msgspec.msgpack.Encoder().encode


def announcement_of(data: bytes) -> Announcement | None:
    """What another host's donor said, or ``None`` if that is nothing we understand."""
    try:
        return _decoder.decode(data)
    except msgspec.DecodeError:
        return None
