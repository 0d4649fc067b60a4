"""The calls' socket: one request and its reply on the caller's own thread, under a lock; one-way messages in between.

What comes back late is not lost: grants that nobody waits for any more are given back, leases released. Grants are taken into
the session under the same lock, so that no later grant can be seen, and told by a heartbeat, before an earlier one is taken.
"""

from __future__ import annotations

import collections
import itertools
import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, TypeVar

import zmq

from vcache import protocol
from vcache.errors import ProtocolError, UnavailableError
from vcache.failures import FailureLog
from vcache.pool.background import Background, MakeRequest
from vcache.pool.session import Session
from vcache.pool.wire import Socket, decoded
from vcache.protocol import AnyReply, Error, ErrorCode, Grants, Hits, Located, Placements

logger = logging.getLogger(__name__)

Reply = TypeVar("Reply", bound=AnyReply)
Taken = TypeVar("Taken")

#: Deferred replies are looked for in turns this long, so that other calls get theirs.
_TURN_MS: Final = 5
#: Between turns: a lock given up and taken again at once would never go to whoever waits for it.
_BREATH_S: Final = 0.0005
#: Messages that can wait: more of them are sent although nothing else is.
_MOST_WAITING: Final = 64
#: A plain int: pyzmq's flags are enums, which take longer.
_DONTWAIT: Final = int(zmq.DONTWAIT)
_CLOSE_LINGER_MS: Final = 500


@dataclass(frozen=True, slots=True)
class OneWay:
    """A message without a reply. ``settles``: grants it tells of. ``is_commit``: to be told later if it cannot be now.

    ``is_seen``: what this client looks up afterwards shows it (commits do). ``can_wait``: for whatever is sent next, or the next
    heartbeat. ``id``: the name that it gives to something, or 0.
    """

    make: MakeRequest
    settles: Sequence[int] = ()
    is_commit: bool = False
    is_seen: bool = False
    can_wait: bool = False
    id: int = 0


class Calls:
    """Thread-safe. Owns its socket. Never raises because the server is away."""

    def __init__(
        self,
        socket: Socket,
        session: Session,
        background: Background,
        *,
        timeout_s: float,
        count: Callable[[str], None],
    ) -> None:
        self._socket = socket
        # The method under pyzmq's own: what it does beyond that is for other kinds of sockets.
        self._send_frame = super(zmq.Socket, socket).send
        self._session = session
        self._background = background
        self._timeout_s = timeout_s
        self._timeout_ms = max(1, int(timeout_s * 1000))
        self._count = count
        self._failures = FailureLog(logger)
        self._ids = itertools.count(1)
        self._one_way: collections.deque[OneWay] = collections.deque()
        self._deferred: dict[int, AnyReply | None] = {}
        self._lock = threading.Lock()
        self._closed = False
        self._count_lock = threading.Lock()
        self._to_be_seen = self._seen = 0
        socket.rcvtimeo = self._timeout_ms

    @property
    def is_seen(self) -> bool:
        """Whether the server has read, by a reply that came since, every message that was to be seen."""
        return self._seen == self._to_be_seen

    def call(self, expected: type[Reply], make: MakeRequest, take: Callable[[Reply], Taken | None]) -> Taken | None:
        """What ``take`` makes of the reply, under the lock; ``None`` when there is none in time."""
        if not self._lock.acquire(timeout=self._timeout_s):
            self._count("calls_timed_out")
            return None
        try:
            if self._closed or not self._background.available.is_set():  # found out by the call that had the lock
                self._count("calls_skipped")
                return None
            epoch = self._session.epoch
            reply = self._exchange(make)
            if isinstance(reply, expected):
                return take(reply)
        finally:
            self._unlock()
        self._refused(reply, epoch)
        return None

    def call_deferred(
        self, expected: type[Reply], make: MakeRequest, take: Callable[[Reply], Taken], *, timeout_s: float
    ) -> Taken | None:
        """As ``call``, for a reply that the server may hold back for long: other calls go on meanwhile."""
        if not self._lock.acquire(timeout=self._timeout_s):
            self._count("calls_timed_out")
            return None
        try:
            epoch = self._session.epoch
            request_id = 0 if self._closed else self._send(make)
            if request_id:
                self._deferred[request_id] = None
        finally:
            self._unlock()
        deadline = time.monotonic() + timeout_s
        while request_id and time.monotonic() < deadline and epoch == self._session.epoch and self._session.term:
            with self._lock:
                if self._closed:
                    return None
                if self._deferred[request_id] is None and self._socket.poll(_TURN_MS):
                    self._strayed(decoded(self._socket.recv()))
                if self._deferred[request_id] is not None:
                    break
            self.flush()
            time.sleep(_BREATH_S)
        reply = self._deferred.pop(request_id, None)
        if isinstance(reply, expected):
            return take(reply)
        if reply is None and request_id and epoch == self._session.epoch:
            self._count("calls_timed_out")
        self._refused(reply, epoch)
        return None

    def tell(self, message: OneWay) -> None:
        """Sends a one-way message now, or when the call that has the socket is over. Never waits.

        After ``close`` nothing is sent; that a writer has stopped is still noted in the session.
        """
        self._one_way.append(message)
        if message.is_seen:  # counted once it is in the queue, which a call empties after it has looked at the count
            with self._count_lock:
                self._to_be_seen += 1
        if not message.can_wait or len(self._one_way) >= _MOST_WAITING:
            self.flush()

    def name(self) -> int:
        """An id that no other request has, for one that is to be told with it."""
        return next(self._ids)

    def flush(self) -> None:
        """Sends what is queued, unless a call has the socket: then that does. Never waits."""
        # Whoever has the lock looks again after giving it up, so no message is left behind.
        while self._one_way and self._lock.acquire(blocking=False):
            try:
                self._flush()
            finally:
                self._lock.release()

    def close(self) -> None:
        """Sends what is queued, then closes the socket. Harmless when called twice."""
        with self._lock:
            if not self._closed:
                self._flush()
                self._closed = True
                self._socket.close(linger=_CLOSE_LINGER_MS)

    # --- with the lock held ---------------------------------------------------------------------------------------

    def _exchange(self, make: MakeRequest) -> AnyReply | None:
        to_be_seen = self._to_be_seen
        request_id = self._send(make)
        if not request_id:
            self._background.suspect()
            return None
        deadline = time.monotonic() + self._timeout_s
        is_shortened = False
        try:
            while True:
                reply = decoded(self._socket.recv())
                if reply is not None and reply.id == request_id:
                    self._seen = to_be_seen
                    return reply
                self._strayed(reply)
                remaining_ms = int((deadline - time.monotonic()) * 1000)
                if remaining_ms <= 0:
                    break
                self._socket.rcvtimeo, is_shortened = remaining_ms, True
        except zmq.Again:
            pass  # its deadline: counted and said below
        finally:
            if is_shortened:
                self._socket.rcvtimeo = self._timeout_ms
        self._count("calls_timed_out")
        self._failures.record("call", UnavailableError(f"the server did not answer within {self._timeout_s:g} s"))
        self._background.suspect()
        return None

    def _strayed(self, reply: AnyReply | None) -> None:
        """A reply that the caller at hand does not wait for."""
        if reply is None:
            self._count("bad_replies")
            return
        if reply.id in self._deferred:
            self._deferred[reply.id] = reply
            return
        self._count("stale_replies")
        if isinstance(reply, Grants):
            self._session.learn(reply.term, reply.segments)
            given = self._session.unwanted(reply)
            if given:
                self._one_way.append(
                    OneWay(lambda id_, session, term: protocol.Abort(id_, session, term, given), given)
                )
        elif isinstance(reply, Placements | Hits | Located):
            if isinstance(reply, Placements):
                self._session.learn(reply.term, reply.segments)
            lease = reply.lease
            if lease and reply.term == self._session.term:
                self._one_way.append(OneWay(lambda id_, session, term: protocol.Release(id_, session, term, lease, [])))

    def _send(self, make: MakeRequest) -> int:
        """The request's id; 0 when there is no session, or the server cannot be reached."""
        if self._one_way:
            self._flush()
        term = self._session.term
        if not term:
            return 0
        request_id = next(self._ids)
        try:
            self._send_frame(protocol.encode(make(request_id, self._session.id, term)), _DONTWAIT)
        except zmq.Again:
            self._count("unsent_messages")
            return 0
        self._count("calls")
        return request_id

    def _flush(self) -> None:
        while self._one_way:
            message = self._one_way.popleft()
            term = 0 if self._closed else self._session.term
            is_sent = False
            if term:
                request = message.make(message.id or next(self._ids), self._session.id, term)
                try:
                    self._send_frame(protocol.encode(request), _DONTWAIT)
                    is_sent = True
                except zmq.Again:
                    self._count("unsent_messages")
            # An abort tells itself: no heartbeat names the grant any more.
            if message.settles and (is_sent or not message.is_commit):
                self._session.settled(message.settles)

    # --- without it -----------------------------------------------------------------------------------------------

    def _unlock(self) -> None:
        self._lock.release()
        if self._one_way:
            self.flush()

    def _refused(self, reply: AnyReply | None, epoch: int) -> None:
        if isinstance(reply, Error):
            if reply.code in (ErrorCode.STALE_TERM, ErrorCode.UNKNOWN_SESSION):
                self._background.end_session(epoch)
            else:
                self._count("calls_refused")
                self._failures.record(f"call ({reply.code.name})", ProtocolError(reply.text))
        elif reply is not None:
            self._count("bad_replies")
