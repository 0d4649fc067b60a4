"""A client of a real server that is nothing but a socket: for what no real client would send."""

from __future__ import annotations

import secrets
from types import TracebackType
from typing import Any, Self

import zmq

from tests.support.processes import PATIENCE_S
from vcache import protocol
from vcache.config import VCacheConfig

UNIT = 4096
HOST = b"a host for tests"


class Dealer:
    """A DEALER socket connected to the server, with a session when it says hello."""

    def __init__(self, config: VCacheConfig, *, receive_hwm: int = 1000) -> None:
        self.context = zmq.Context()
        self.socket: zmq.Socket[bytes] = self.context.socket(zmq.DEALER)
        self.socket.linger = 0
        self.socket.rcvhwm = receive_hwm
        self.socket.rcvtimeo = int(PATIENCE_S * 1000)
        self.socket.connect(config.endpoint)
        self.session = secrets.token_bytes(16)
        self.term = 0
        self.next_id = 0
        self.pushed: list[protocol.AnyReply] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.context.destroy(linger=0)

    def message(self, kind: Any, *fields: Any) -> bytes:
        self.next_id += 1
        return protocol.encode(kind(self.next_id, self.session, self.term, *fields))

    def tell(self, kind: Any, *fields: Any) -> int:
        self.socket.send(self.message(kind, *fields))
        return self.next_id

    def receive(self) -> protocol.AnyReply:
        return protocol.decode_reply(self.socket.recv())

    def call(self, kind: Any, *fields: Any) -> Any:
        """The reply to a request; what is pushed meanwhile is kept."""
        request = self.tell(kind, *fields)
        while (reply := self.receive()).id != request:
            self.pushed.append(reply)
        return reply

    def raw(self, *frames: bytes) -> Any:
        """Sends these frames as they are and takes the next thing that comes."""
        self.socket.send_multipart(frames)
        return self.receive()

    def hello(self, *, writes: bool = True, version: int = protocol.PROTOCOL_VERSION) -> Any:
        self.term = 0
        welcome = self.call(protocol.Hello, version, HOST, "dealer", "cpu:0", writes, [])
        if isinstance(welcome, protocol.Welcome):
            self.term = welcome.term
        return welcome

    def donate(self, *, records: int = 64) -> int:
        """Registers a segment of memory that does not exist."""
        fields: tuple[Any, ...] = (
            secrets.token_bytes(16),
            1,
            protocol.Tier.DRAM,
            "cpu:0",
            (records + 1) * UNIT,
            UNIT,
            records,
            b"",
            "",
            [],
        )
        number: int = self.call(protocol.RegisterSegment, *fields).number
        self.call(protocol.Handover, number, [], True)
        return number

    def store(self, keys: list[bytes]) -> None:
        grants = self.call(protocol.Reserve, b"".join(keys), b"", 0, 1, UNIT, 256, 0, 0, 0.0)
        generations = [placement[2] for placement in protocol.PLACEMENT.iter_unpack(grants.placements)]
        self.tell(protocol.Commit, generations)

    def stats(self) -> protocol.ServerStats:
        stats = self.call(protocol.Stats)
        assert isinstance(stats, protocol.ServerStats)
        return stats
