"""The real state machine of the metadata server under a simulated clock, with donors that obey at once.

No sockets, memory or payloads. Messages are encoded and decoded as on the wire, and the time spent between the bytes of a
request and those of its replies is the server's own: CPU time of the calling thread, so that neighbours on the machine
count less. What a donor or client does meanwhile costs nothing here.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

from vcache import protocol
from vcache.protocol import PLACEMENT, Outcome
from vram_metadata_server.service import Service
from vram_metadata_server.settings import ServiceSettings

#: Nobody falls silent in a simulation that sends no heartbeats.
FOREVER_S: Final = 1e12
_CLOCK_SAMPLES: Final = 101
_TERM: Final = 1_795_000_000_000  # as large as real ones
_HEADER_BYTES: Final = protocol.KEY_BYTES << 8  # before a segment's data


@contextmanager
def without_garbage_collector() -> Iterator[None]:
    """As the server runs. What is made meanwhile and refers to itself stays until the process ends."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


class StateMachine:
    """A server, and the time it has spent (``busy_s``). ``now`` is the simulation's to set; it never goes back."""

    def __init__(self, settings: ServiceSettings | None = None) -> None:
        self.service = Service(settings or ServiceSettings(liveness_s=FOREVER_S), term=_TERM)
        self.now = 0.0
        self.busy_s = 0.0
        self._clock_s = _clock_s()
        self._next_id = 0
        self._donors: dict[bytes, Member] = {}

    def say(self, sender: Member, kind: Any, *fields: Any) -> Any:
        """Sends a request; the reply, decoded, or None where there is none. Raises ``RuntimeError`` when it is refused."""
        self._next_id += 1
        term = 0 if kind is protocol.Hello else _TERM
        request = protocol.encode(kind(self._next_id, sender.session, term, *fields))
        begin = time.thread_time()
        replies = [protocol.encode(reply) for _, reply in self.service.handle(sender.route, request, self.now)]
        self.busy_s += time.thread_time() - begin - self._clock_s
        if not replies:
            return None
        reply = protocol.decode_reply(replies[0])
        if isinstance(reply, protocol.Error):
            raise RuntimeError(f"the server refused {kind.__name__}: {reply.text}")
        return reply

    def tick(self) -> None:
        """What time brings, and what donors do about it, until nothing is left to do now."""
        while True:
            begin = time.thread_time()
            orders = [(to, protocol.encode(said)) for to, said in self.service.tick(self.now, False)]
            self.busy_s += time.thread_time() - begin - self._clock_s
            for to, said in orders:
                decoded = protocol.decode_reply(said)
                for number, items in decoded.retire if isinstance(decoded, protocol.Orders) else ():
                    self.say(self._donors[to], protocol.Retired, number, items)
            if not self.service.has_work:
                return

    def join(self, name: str, *, host: int = 0) -> Member:
        """A new session."""
        member = Member(self, name, host)
        self._donors[member.route] = member
        return member

    def counter(self, name: str) -> int:
        """One of ``ServerStats.counters``."""
        return self.service.counters[name]


def _clock_s() -> float:
    """What asking for the time costs: it is a system call, and a millionth of a second counts here."""
    costs = []
    for _ in range(_CLOCK_SAMPLES):
        begin = time.thread_time()
        costs.append(time.thread_time() - begin)
    return statistics.median(costs)


class Member:
    """One process of the pool: reads, writes, donates."""

    def __init__(self, machine: StateMachine, name: str, host: int) -> None:
        self._machine = machine
        self.route = name.encode()
        self.session = self.route.ljust(16, b"\0")
        self.device = f"cpu:{name}"
        host_id = host.to_bytes(16, "little")
        self.say(protocol.Hello, protocol.PROTOCOL_VERSION, host_id, name, self.device, True, [])
        self.say(protocol.Heartbeat, [], 0, [], [])  # orders are pushed to where the last heartbeat came from

    def say(self, kind: Any, *fields: Any) -> Any:
        return self._machine.say(self, kind, *fields)

    def donate(self, *, data_bytes: int, records: int) -> int:
        """A segment of memory that does not exist; its number."""
        fields = (self.session, 1, protocol.Tier.DRAM, self.device, _HEADER_BYTES + data_bytes, _HEADER_BYTES, records)
        number: int = self.say(protocol.RegisterSegment, *fields, b"", self.route.decode(), []).number
        self.say(protocol.Handover, number, [], True)
        return number

    def read(self, keys: bytes) -> int:
        """Acquires the leading run and releases it; its length."""
        found = self.say(protocol.Acquire, keys, 0, 10.0)
        if found.lease:
            self.say(protocol.Release, found.lease, [])
        return len(found.placements) // PLACEMENT.size

    def write(self, keys: bytes, *, parent: bytes = b"", nbytes: int = 4096, tokens: int = 256) -> bytes:
        """Reserves and commits; the outcome of each key (``protocol.Outcome``)."""
        grants = self.say(protocol.Reserve, keys, parent, 0, 1, nbytes, tokens, 0, 0, 0.0)
        if Outcome.GRANTED in grants.outcomes:
            self.say(protocol.Commit, [placement[2] for placement in PLACEMENT.iter_unpack(grants.placements)])
        outcomes: bytes = grants.outcomes
        return outcomes
