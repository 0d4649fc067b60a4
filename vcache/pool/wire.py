"""A client's sockets: how they are set up, and what comes in on them as messages.

Every default that would wait for ever, grow without bound, or replay old messages to a new server is replaced.
"""

from __future__ import annotations

import secrets
from typing import Final

import msgspec
import zmq

from vcache.config import VCacheConfig
from vcache.curve import secure_client
from vcache.protocol import MAX_MESSAGE_BYTES, AnyReply, decode_reply

_HIGH_WATER_MARK: Final = 1000
_RECONNECT_MS: Final = 50
_RECONNECT_MAX_MS: Final = 1000
_PROBE_MS: Final = 2000
_PROBE_TIMEOUT_MS: Final = 10_000
_HANDSHAKE_MS: Final = 3000

Socket = zmq.Socket[bytes]


def dealer(context: zmq.Context[Socket], config: VCacheConfig) -> Socket:
    """A DEALER connecting to the metadata server, whether or not that is there. Raises ``ConfigError`` for bad keys."""
    socket = context.socket(zmq.DEALER)
    # A name of its own, kept over reconnects: else the server would answer a connection that is gone.
    socket.routing_id = b"c" + secrets.token_bytes(15)
    socket.immediate = True  # queue nothing for a server that is not there
    socket.linger = 0
    socket.sndhwm = socket.rcvhwm = _HIGH_WATER_MARK
    socket.maxmsgsize = MAX_MESSAGE_BYTES
    socket.reconnect_ivl = _RECONNECT_MS
    socket.reconnect_ivl_max = _RECONNECT_MAX_MS
    socket.handshake_ivl = _HANDSHAKE_MS
    if config.endpoint.startswith("tcp://"):  # where a peer can vanish without a word
        socket.heartbeat_ivl = _PROBE_MS
        socket.heartbeat_timeout = _PROBE_TIMEOUT_MS
    try:
        secure_client(socket, config)
        socket.connect(config.endpoint)
    except BaseException:
        socket.close()
        raise
    return socket


def decoded(data: bytes) -> AnyReply | None:
    """The reply, or ``None`` when it is not one of this protocol."""
    try:
        return decode_reply(data)
    except msgspec.DecodeError:
        return None
