"""What a process and its companion say to each other, over socket pairs nobody else can reach.

    life     never written to: when either end goes, the kernel tells (or ends) the other
    control  what to be, then Ready back; later Close
    lane     an ask, then any Parts and its Answers, one ask at a time; there are several lanes

Each kind of companion adds messages of its own. Payloads never travel here: they lie in staging memory, which both have
mapped. Torch-free.
"""

from __future__ import annotations

import select
import socket
import struct
from typing import Any, Final

import msgspec

from vcache.errors import UnavailableError

_LENGTH: Final = struct.Struct("<I")
MAX_BYTES: Final = 64 << 20


class Ready(msgspec.Struct, array_like=True, tag=True):
    """The companion is what it was told to be; lanes may be used. ``said``: what others need to know of it."""

    said: bytes = b""


class Failed(msgspec.Struct, array_like=True, tag=True):
    """The companion cannot go on, and ends: why."""

    reason: str


class Close(msgspec.Struct, array_like=True, tag=True):
    """End in good order."""


#: A code in an answer: this is still being worked on, its memory is in use; another ``Answer`` will follow.
PENDING: Final = -1
#: A code in an answer: the transfer failed, and nobody can say that it will not write into its memory one day.
TAINTED: Final = -2


class Answer(msgspec.Struct, array_like=True, tag=True):
    """One code for each thing asked for; or ``error``: it could not even be asked."""

    codes: list[int]
    error: str = ""
    last: bool = True


class Part(msgspec.Struct, array_like=True, tag=True):
    """Before an answer: these, of the things asked for, are done, and their memory is touched no more."""

    indices: list[int]


Common = Ready | Failed | Close | Answer | Part
_encoder = msgspec.msgpack.Encoder()


class LinkClosedError(UnavailableError):
    """The other end is gone."""


class Link:
    """One end of a socket pair, carrying messages. Not thread-safe: whoever uses it holds it alone."""

    def __init__(self, end: socket.socket, decoder: msgspec.msgpack.Decoder[Any]) -> None:
        self._socket = end
        self._decoder = decoder
        end.setblocking(True)

    def fileno(self) -> int:
        return self._socket.fileno()

    def send(self, message: msgspec.Struct) -> None:
        """Raises ``LinkClosedError`` when nobody is there to read it."""
        data = _encoder.encode(message)
        try:
            self._socket.sendall(_LENGTH.pack(len(data)) + data)
        except OSError as error:
            raise LinkClosedError("the other process is gone") from error

    def receive(self, timeout_s: float | None = None) -> object:
        """The next message; ``None`` when none begins within ``timeout_s``. Raises ``LinkClosedError`` when none can come."""
        if timeout_s is not None and not self.readable(timeout_s):
            return None
        (length,) = _LENGTH.unpack(self._exactly(_LENGTH.size))
        if length > MAX_BYTES:
            raise LinkClosedError(f"the other process sent a message of {length} bytes")
        message: object = self._decoder.decode(self._exactly(length))
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
                raise LinkClosedError("the other process is gone") from error
            if not got:
                raise LinkClosedError("the other process is gone")
            view = view[got:]
        return data
