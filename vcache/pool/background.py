"""The thread that keeps a client's session: hello, heartbeats with evidence, the server's orders, the donors' traffic.

Nothing a caller waits for goes through here (a hop through a thread costs 66 us, and 15 ms while another one holds the GIL).
Only this thread opens a session; that one has ended is also noticed by calls (``client.py``), which then wake it.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

import zmq

from vcache import protocol
from vcache.config import VCacheConfig
from vcache.errors import UnavailableError
from vcache.failures import FailureLog
from vcache.pool.duty import Duty
from vcache.pool.mappings import Mappings
from vcache.pool.runtime_dir import RuntimeDir
from vcache.pool.session import Session
from vcache.pool.wire import Socket, dealer, decoded
from vcache.protocol import AnyReply, AnyRequest, Error, ErrorCode, Orders, Welcome

logger = logging.getLogger(__name__)

#: (id, session, term) -> the request.
MakeRequest = Callable[[int, bytes, int], AnyRequest]
#: Called with the reply, or ``None`` when there was none in time.
OnReply = Callable[[AnyReply | None], None]

_GOODBYE_LINGER_MS: Final = 500
#: Between two sweeps of the runtime directory that are not caused by an event.
_SWEEP_INTERVAL_S: Final = 60.0
_MIN_HELLO_INTERVAL_S: Final = 0.2
#: A server is given up to so many call timeouts to answer a hello.
_PATIENT_HELLO: Final = 4


@dataclass(frozen=True, slots=True)
class Member:
    """What a hello says of this process."""

    host: bytes
    name: str
    device: str
    writes: bool


@dataclass(slots=True)
class _Waiting:
    on_reply: OnReply
    deadline: float


class Background:
    """Starts its thread when made; ``stop`` ends it. Thread-safe where it says so."""

    def __init__(
        self,
        context: zmq.Context[Socket],
        config: VCacheConfig,
        session: Session,
        member: Member,
        *,
        mappings: Mappings,
        runtime: RuntimeDir,
        maps_ahead: bool,
        count: Callable[[str], None],
    ) -> None:
        self._session = session
        self._member = member
        self._mappings = mappings
        self._runtime = runtime
        self._maps_ahead = maps_ahead
        self._count = count
        self._failures = FailureLog(logger)
        self._timeout_s = config.client.call_timeout
        self._heartbeat_s = config.server.heartbeat_interval
        self._liveness_s = config.server.liveness_timeout
        self._socket = dealer(context, config)
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._ids = itertools.count(1)
        self._waiting: dict[int, _Waiting] = {}
        self._duties: list[Duty] = []
        self._dead: set[bytes] = set()
        self._told_dead: set[bytes] = set()
        self._hello_id = 0
        self._hello_wait_s = self._first_hello_wait_s = max(self._timeout_s, _MIN_HELLO_INTERVAL_S)
        self._next_hello = self._next_heartbeat = self._next_sweep = 0.0
        self._heartbeat_ids: dict[int, float] = {}  # unanswered: id -> when sent
        self._last_loop = _boot_time()
        self._suspended_at: float | None = None
        self._lock = threading.Lock()
        self._stopping = False
        self._closed = False
        #: For what need not be sent at once; runs in this thread.
        self.before_heartbeats: Callable[[], None] = lambda: None
        #: Set while a session is open and the server answers.
        self.available = threading.Event()
        self._thread = threading.Thread(target=self._run, name="vcache-pool", daemon=True)
        self._thread.start()

    # --- for any thread -------------------------------------------------------------------------------------------

    def wake(self) -> None:
        """Makes the thread look at what has changed."""
        with self._lock:
            if not self._closed:
                with contextlib.suppress(BlockingIOError):
                    os.eventfd_write(self._wake_fd, 1)

    def suspect(self) -> None:
        """A call was not answered in time: nobody else shall wait for the server until a heartbeat is."""
        if self.available.is_set():
            self.available.clear()
            self._next_heartbeat = 0.0
            self.wake()

    def end_session(self, epoch: int) -> None:
        """The server does not know the session of this epoch (any more): a hello is due."""
        if self._session.end(epoch):
            self.available.clear()
            self._count("sessions_lost")
            self.wake()

    def add_duty(self, duty: Duty) -> None:
        with self._lock:
            self._duties = [*self._duties, duty]
        self.wake()

    def remove_duty(self, duty: Duty) -> None:
        with self._lock:
            self._duties = [other for other in self._duties if other is not duty]

    def stop(self, timeout_s: float) -> bool:
        """Says goodbye if nothing is outstanding, and ends the thread; whether it ended in time."""
        self._stopping = True
        self.wake()
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    # --- for duties, in the thread --------------------------------------------------------------------------------

    @property
    def term(self) -> int:
        return self._session.term

    @property
    def liveness_s(self) -> float:
        """How long the server waits before it takes a silent session for gone."""
        return self._liveness_s

    def request(self, make: MakeRequest, on_reply: OnReply) -> None:
        """Sends a request and calls back with its reply; with ``None`` after the call timeout. Callbacks of a session that
        ends are dropped: duties begin anew with the next one."""
        request_id = self._send(make)
        if request_id:
            self._waiting[request_id] = _Waiting(on_reply, time.monotonic() + self._timeout_s)
        else:
            on_reply(None)

    # --- the thread -----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        self._sweep()
        poller = zmq.Poller()
        poller.register(self._wake_fd, zmq.POLLIN)
        try:
            while not self._stopping:
                hello_due = not self._session.term and time.monotonic() >= self._next_hello
                poller.register(self._socket, zmq.POLLIN | (zmq.POLLOUT if hello_due else 0))
                poller.poll(self._pause_ms())
                with contextlib.suppress(BlockingIOError):
                    os.eventfd_read(self._wake_fd)
                self._notice_suspension()
                self._receive()
                with self._surviving("the session"):
                    self._keep_session()
                self._tick()
            self._goodbye()
        finally:
            self.available.clear()
            with self._lock:
                self._closed = True
                os.close(self._wake_fd)
            self._socket.close()

    def _pause_ms(self) -> int:
        now = time.monotonic()
        due = self._next_heartbeat if self._session.term else max(self._next_hello, now)
        if not self._session.term and now >= self._next_hello:
            due = now + _MIN_HELLO_INTERVAL_S  # POLLOUT ends the pause
        # Well within what ``_notice_suspension`` takes for standing still, however few heartbeats make up the deadline.
        longest_s = min(1.0, (self._liveness_s - 2 * self._heartbeat_s) / 2)
        return max(0, min(int((due - now) * 1000) + 1, int(longest_s * 1000)))

    def _notice_suspension(self) -> None:
        now = _boot_time()
        gap, self._last_loop = now - self._last_loop, now
        # Less than the whole deadline: the last heartbeat may have been sent a heartbeat before the gap began.
        if self._session.term and gap > self._liveness_s - 2 * self._heartbeat_s:
            logger.warning("this process stood still for %.1f s", gap)
            self._suspended_at = time.monotonic()

    def _receive(self) -> None:
        while True:
            try:
                data = self._socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                return
            reply = decoded(data)
            if reply is None:
                self._count("bad_replies")
                continue
            with self._surviving("a reply of the server"):
                self._take(reply)

    def _take(self, reply: AnyReply) -> None:
        if isinstance(reply, Welcome):
            if reply.id == self._hello_id and not self._session.term:
                self._welcomed(reply)
            return
        if isinstance(reply, Orders):
            if reply.term == self._session.term:
                self._ordered(reply)
            return
        if isinstance(reply, Error):
            self._refused(reply)
        waiting = self._waiting.pop(reply.id, None)
        if waiting is not None:
            waiting.on_reply(reply)

    # --- the session ----------------------------------------------------------------------------------------------

    def _keep_session(self) -> None:
        now = time.monotonic()
        if not self._session.term:
            self._heartbeat_ids.clear()
            self._waiting.clear()
            if now >= self._next_hello:
                self._hello(now)
            return
        if self._heartbeat_ids and now - next(iter(self._heartbeat_ids.values())) > self._timeout_s:
            self.available.clear()
        if now >= self._next_heartbeat:
            self._heartbeat(now)

    def _hello(self, now: float) -> None:
        member = self._member
        outstanding = self._session.outstanding()
        hello_id = self._send(
            lambda id_, session, _: protocol.Hello(
                id=id_,
                session=session,
                term=0,
                version=protocol.PROTOCOL_VERSION,
                host=member.host,
                name=member.name,
                device=member.device,
                writes=member.writes,
                outstanding=outstanding,
            )
        )
        if hello_id:
            self._hello_id = hello_id
            # Only the latest hello's answer counts, and a server that is slower than this is given longer to answer it.
            self._next_hello = now + self._hello_wait_s
            self._hello_wait_s = min(2 * self._hello_wait_s, _PATIENT_HELLO * self._first_hello_wait_s)

    def _welcomed(self, welcome: Welcome) -> None:
        self._heartbeat_s, self._liveness_s = welcome.heartbeat_s, welcome.liveness_s
        self._session.open(welcome)
        self._count("sessions_opened")
        logger.info("session %s is open in term %d", self._session.id.hex(), welcome.term)
        self._tell_commits()
        was_suspended, self._suspended_at = self._suspended_at is not None, None
        self._next_hello = self._next_heartbeat = 0.0
        self._hello_wait_s = self._first_hello_wait_s
        if self._maps_ahead:
            self._mappings.map_ahead(welcome.segments)
        for duty in self._duties:
            with self._surviving("a donor's registration"):
                duty.on_session(was_suspended=was_suspended)
        self.available.set()

    def _tell_commits(self) -> None:
        """Commits that the calls' socket could not send."""
        untold = self._session.untold()
        if untold and self._send(lambda id_, session, term: protocol.Commit(id_, session, term, untold)):
            self._session.settled(untold)

    def _refused(self, error: Error) -> None:
        if error.code in (ErrorCode.STALE_TERM, ErrorCode.UNKNOWN_SESSION):
            # Replies on one socket are in order: an error about an earlier session comes before the welcome.
            if error.id != self._hello_id:
                self.end_session(self._session.epoch)
        elif error.id == self._hello_id:
            self._failures.record("hello", UnavailableError(error.text))
        elif error.id in self._heartbeat_ids:
            del self._heartbeat_ids[error.id]
            self._failures.record("heartbeat", UnavailableError(error.text))

    def _heartbeat(self, now: float) -> None:
        self.before_heartbeats()
        numbers = {(info.segment_id, info.incarnation): info.number for info in self._session.infos()}
        mapped = [numbers[identity] for identity in self._mappings.mapped() if identity in numbers]
        self._tell_commits()
        seen, outstanding = self._session.evidence()
        dead, self._dead = self._dead, set()
        self._told_dead = dead
        heartbeat_id = self._send(
            lambda id_, session, term: protocol.Heartbeat(
                id=id_,
                session=session,
                term=term,
                attached=mapped[: protocol.MAX_ITEMS_PER_PAGE],
                seen=seen,
                outstanding=outstanding,
                dead=list(dead),
            )
        )
        self._next_heartbeat = now + self._heartbeat_s
        if heartbeat_id:
            self._heartbeat_ids[heartbeat_id] = now
        else:
            self.available.clear()
        self._mappings.drop_unlisted(numbers, now, grace_s=2 * self._liveness_s)

    def _ordered(self, orders: Orders) -> None:
        sent = self._heartbeat_ids.pop(orders.id, None)
        if sent is not None:
            for older in [other for other, at in self._heartbeat_ids.items() if at <= sent]:
                del self._heartbeat_ids[older]
            if self._suspended_at is not None and sent > self._suspended_at:
                self._suspended_at = None  # the server knew the session still
            self.available.set()
        for number in orders.gone:
            self._gone(number)
        if orders.segments:
            new = [info for info in orders.segments if self._session.info(info.number) is None]
            self._session.learn(orders.term, orders.segments)
            if self._maps_ahead:
                self._mappings.map_ahead(new)
        for session in orders.probe:
            if session not in self._dead and self._is_dead(session):
                logger.info("writer %s is proven dead", session.hex())
                self._dead.add(session)
        if self._dead - self._told_dead:
            self._next_heartbeat = 0.0
        for duty in self._duties:
            with self._surviving("an order"):
                duty.on_orders(orders)

    def _gone(self, number: int) -> None:
        info = self._session.forget(number)
        if info is not None:
            self._mappings.drop((info.segment_id, info.incarnation))
            self._next_sweep = 0.0  # its donor may have died without unlinking it
        for duty in self._duties:
            with self._surviving("the loss of a segment"):
                duty.on_gone(number)

    def _is_dead(self, session: bytes) -> bool:
        try:
            return session != self._session.id and self._runtime.is_dead(session)
        except (OSError, UnavailableError) as error:
            self._failures.record("probe a writer", error)
            return False  # nothing is proven; the server asks again

    def _tick(self) -> None:
        now = time.monotonic()
        for request_id in [key for key, waiting in self._waiting.items() if waiting.deadline < now]:
            with self._surviving("a late reply"):
                self._waiting.pop(request_id).on_reply(None)
        for duty in self._duties:
            with self._surviving("a donor's duty"):
                duty.on_tick()
        self._mappings.unmap_idle(now)
        if now >= self._next_sweep:
            self._sweep()

    def _sweep(self) -> None:
        self._next_sweep = time.monotonic() + _SWEEP_INTERVAL_S
        try:
            for name in self._runtime.sweep():
                logger.info("removed %s, whose owner is dead", name)
        except (OSError, UnavailableError) as error:
            self._failures.record("sweep", error)

    def _goodbye(self) -> None:
        if not self._session.term or self._session.is_writing:
            return  # a writer may still be at work: only its death, or a later hello, would prove otherwise
        self._tell_commits()
        self._send(protocol.Goodbye)
        self._socket.linger = _GOODBYE_LINGER_MS

    def _send(self, make: MakeRequest) -> int:
        """The id of what was sent; 0 when the server cannot be reached."""
        request_id = next(self._ids)
        request = make(request_id, self._session.id, self._session.term)
        try:
            self._socket.send(protocol.encode(request), zmq.NOBLOCK)
        except zmq.Again:
            self._count("unsent_messages")
            return 0
        return request_id

    @contextlib.contextmanager
    def _surviving(self, what: str) -> Iterator[None]:
        """The thread outlives whatever a single message or donor does to it."""
        try:
            yield
        except Exception as error:  # counted and said by FailureLog
            self._count("failures")
            self._failures.record(what, error)


def _boot_time() -> float:
    """Seconds that go on while the machine itself is suspended, unlike the monotonic clock's."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)
