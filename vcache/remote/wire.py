"""What a process tells its companions for other hosts; how is said in ``companion/link.py``. Torch-free."""

from __future__ import annotations

from typing import Final

import msgspec

from vcache.companion.link import Common
from vcache.remote.base import EngineSetup


class Serve(msgspec.Struct, array_like=True, tag=True):
    """Be the one that offers this segment. Its ``Ready`` says an ``Announcement``."""

    engine: EngineSetup
    runtime_dir: str
    device: str
    handle: bytes
    nbytes: int


class ReadFor(msgspec.Struct, array_like=True, tag=True):
    """Be the one that reads, into staging memory of so many bytes."""

    engine: EngineSetup
    staging_bytes: int


class Stretch(msgspec.Struct, array_like=True):
    """``nbytes`` at ``remote`` of a segment, to be copied to ``staging`` of staging memory."""

    remote: int
    staging: int
    nbytes: int


class Fetch(msgspec.Struct, array_like=True, tag=True):
    """Reads ``first`` and, once all of that is there, ``then``, from the segment that ``peer`` has at ``address``.

    Answered by one of the codes below, once for each of ``blocks`` blocks of staging memory. Without ``first``, at once.
    """

    peer: str
    address: int
    first: list[Stretch]
    then: list[Stretch]
    blocks: int


#: Codes of an answer, beside ``TAINTED``.
READ: Final = 0
UNREACHED: Final = 1  # the peer was not there: nothing was begun
STRANGER: Final = 2  # somebody else is known by the peer's name: nothing was begun, and only a new companion can forget

DECODER: Final[msgspec.msgpack.Decoder[Common | Serve | ReadFor | Fetch]] = msgspec.msgpack.Decoder(
    Common | Serve | ReadFor | Fetch
)
