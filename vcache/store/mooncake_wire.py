"""What a serving process and its Mooncake process say to each other, over socket pairs nobody else can reach.

    life     never written to: when either end goes, the kernel tells (or ends) the other
    control  Setup, then Ready back; later Close
    lane     Ask and its Answers, one ask at a time; there are several lanes

Payloads never travel here: they lie in staging memory, which both have mapped. Torch-free.
"""

from __future__ import annotations

import select
import socket
import struct
from typing import Final

import msgspec

from vcache.errors import UnavailableError

_LENGTH: Final = struct.Struct("<I")
MAX_BYTES: Final = 64 << 20


class Setup(msgspec.Struct, array_like=True, tag=True):
    """How to join the Mooncake store."""

    master: str
    metadata: str
    protocol: str
    devices: str
    hostname: str
    segment_bytes: int
    replicas: int
    soft_pin_s: float
    key_prefix: str
    staging_bytes: int


class Ready(msgspec.Struct, array_like=True, tag=True):
    """The Mooncake process has joined the store; lanes may be used."""


class Close(msgspec.Struct, array_like=True, tag=True):
    """Leave the store and end."""


class Exist(msgspec.Struct, array_like=True, tag=True):
    """Asks which objects there are: 1 or 0 for each."""

    names: list[str]


class Remove(msgspec.Struct, array_like=True, tag=True):
    """Removes objects: 1 or 0 for each."""

    names: list[str]


class Object(msgspec.Struct, array_like=True):
    """A shard, and where in staging memory its page begins."""

    key: bytes
    rank: int
    ranks: int
    layout: int
    offset: int
    nbytes: int  # of the payload


class Get(msgspec.Struct, array_like=True, tag=True):
    """Reads objects: a ``Got`` for each, within ``timeout_s``. What is not done by then is ``PENDING``."""

    objects: list[Object]
    timeout_s: float


class PutAll(msgspec.Struct, array_like=True, tag=True):
    """Writes objects: a ``Put`` for each, within ``timeout_s``. What is not done by then is ``PENDING``."""

    objects: list[Object]
    timeout_s: float


Ask = Exist | Remove | Get | PutAll

#: In place of a ``Got`` or ``Put``: Mooncake still works on it, its memory is in use; another ``Answer`` will follow.
PENDING: Final = -1
#: In place of a ``Got``: the transfer failed, and nobody can say that it will not write into its memory one day.
TAINTED: Final = -2


class Answer(msgspec.Struct, array_like=True, tag=True):
    """One code for each thing asked for; or ``error``: the store as a whole could not be asked."""

    codes: list[int]
    error: str = ""
    last: bool = True


class Failed(msgspec.Struct, array_like=True, tag=True):
    """The Mooncake process cannot go on, and ends: why."""

    reason: str


Message = Setup | Ready | Close | Exist | Remove | Get | PutAll | Answer | Failed
_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Message)


class LinkClosedError(UnavailableError):
    """The other end is gone."""


class Link:
    """One end of a socket pair, carrying messages. Not thread-safe: whoever uses it holds it alone."""

    def __init__(self, end: socket.socket) -> None:
        self._socket = end
        end.setblocking(True)

    def fileno(self) -> int:
        return self._socket.fileno()

    def send(self, message: Message) -> None:
        """Raises ``LinkClosedError`` when nobody is there to read it."""
        data = _encoder.encode(message)
        try:
            self._socket.sendall(_LENGTH.pack(len(data)) + data)
        except OSError as error:
            raise LinkClosedError("the Mooncake process is gone") from error

    def receive(self, timeout_s: float | None = None) -> Message | None:
        """The next message; ``None`` when none begins within ``timeout_s``. Raises ``LinkClosedError`` when none can come."""
        if timeout_s is not None and not self.readable(timeout_s):
            return None
        (length,) = _LENGTH.unpack(self._exactly(_LENGTH.size))
        if length > MAX_BYTES:
            raise LinkClosedError(f"the Mooncake process sent a message of {length} bytes")
        message: Message = _decoder.decode(self._exactly(length))
        return message

    def readable(self, timeout_s: float) -> bool:
        poll = select.poll()  # select() cannot watch descriptors above 1023, which serving processes have
        poll.register(self._socket, select.POLLIN)
        return bool(poll.poll(max(0.0, timeout_s) * 1000))

    def close(self) -> None:
        self._socket.close()

    def _exactly(self, count: int) -> bytearray:
        data = bytearray(count)
        view = memoryview(data)
        while view:
            try:
                got = self._socket.recv_into(view)
            except OSError as error:
                raise LinkClosedError("the Mooncake process is gone") from error
            if not got:
                raise LinkClosedError("the Mooncake process is gone")
            view = view[got:]
        return data
