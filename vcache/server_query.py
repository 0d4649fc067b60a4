"""One question to a running metadata server, asked without a session: its state."""

from __future__ import annotations

import secrets
import time
from typing import Final

import msgspec
import zmq

from vcache import protocol
from vcache.config import VCacheConfig
from vcache.curve import secure_client
from vcache.errors import ProtocolError, UnavailableError

_NOBODY: Final = bytes(16)


def fetch_stats(config: VCacheConfig, *, timeout_s: float) -> protocol.ServerStats:
    """What the server at ``config.endpoint`` says of itself; it may be still starting.

    Raises ``UnavailableError`` when nothing answers in time, ``ProtocolError`` when the answer makes no sense.
    """
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.linger = 0
        socket.maxmsgsize = protocol.MAX_MESSAGE_BYTES
        is_secure = secure_client(socket, config)
        socket.connect(config.endpoint)
        question = protocol.Stats(id=1 + secrets.randbits(62), session=_NOBODY, term=0)
        socket.send(protocol.encode(question))
        deadline = time.monotonic() + timeout_s
        while socket.poll(max(0, int((deadline - time.monotonic()) * 1000))):
            reply = _decoded(socket.recv())
            if reply.id != question.id:
                continue
            if not isinstance(reply, protocol.ServerStats):
                text = reply.text if isinstance(reply, protocol.Error) else type(reply).__name__
                raise ProtocolError(f"the server at {config.endpoint} did not answer with its state: {text}")
            return reply
        keys = "; one that has not this client's key among its clients' does not answer either" if is_secure else ""
    raise UnavailableError(
        f"no metadata server answered at {config.endpoint} within {timeout_s:g} s; if none runs there, start one with "
        f"`vcache server`, or set server.endpoint to where it runs{keys}"
    )


def _decoded(data: bytes) -> protocol.AnyReply:
    try:
        return protocol.decode_reply(data)
    except msgspec.DecodeError as error:
        raise ProtocolError(
            f"the answer is not one of this protocol's (version {protocol.PROTOCOL_VERSION}): {error}"
        ) from error
