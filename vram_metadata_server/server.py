"""The ZeroMQ shell around the state machine: one ROUTER socket, one thread, messages in batches, then a tick.

It keeps serving whatever comes: what cannot be read is answered with an error, a recipient that does not read loses its
messages, a request that raises is logged and answered. Nobody starves: ROUTER takes from its peers in turn, and a tick comes
after every batch. Not here: what a message means (``service.py``).
"""

from __future__ import annotations

import gc
import logging
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Final

import zmq
import zmq.auth.thread

from vcache import protocol
from vcache.config import VCacheConfig
from vcache.curve import authorized_clients, secure_server
from vcache.ending import ending_signals
from vcache.errors import ConfigError, UnavailableError
from vcache.log import log_once_per
from vcache.pool.runtime_dir import RuntimeDir
from vram_metadata_server.endpoint import EndpointLock
from vram_metadata_server.intake import answer_id
from vram_metadata_server.published import PublishedIndex
from vram_metadata_server.service import Outgoing, Service
from vram_metadata_server.settings import ServiceSettings

log = logging.getLogger(__name__)

# Plain ints: pyzmq's flags are enums, and an ``|`` of two of them costs 3 us.
_DONTWAIT: Final = int(zmq.DONTWAIT)
_SNDMORE: Final = int(zmq.SNDMORE | zmq.DONTWAIT)
_RCVMORE: Final = int(zmq.RCVMORE)

_BATCH: Final = 256  # messages between two ticks, while a tick has something to do
_TICK_S: Final = 0.02  # between ticks that only look at deadlines
_IDLE_MS: Final = 50
_SAY_AGAIN_S: Final = 10.0
_SUSPENDED_S: Final = 0.5  # between two rounds of the loop; a batch and a tick take a few hundredths of that
#: Per peer, in messages. A peer that floods or does not read costs at most this many of the largest ones.
_RECEIVE_HWM: Final = 256
_SEND_HWM: Final = 512


class _Fairness:
    """Knows when every peer has had its turn, although the queue never ran empty.

    ROUTER takes from the peers that have something in turn, and notices within 100 messages that one has. So after so many
    messages and twice the senders seen meanwhile, whatever had come when the count began has been handled.
    """

    _NOTICED_WITHIN: Final = 100

    def __init__(self) -> None:
        self._handled = 0
        self._senders: set[bytes] = set()

    def took(self, sender: bytes) -> None:
        self._handled += 1
        self._senders.add(sender)

    def all_had_a_turn(self, *, is_empty: bool) -> bool:
        """Whether what had come at the last true answer (or the start) has been handled by now."""
        if is_empty or self._handled > self._NOTICED_WITHIN + 2 * len(self._senders):
            self._handled = 0
            self._senders.clear()
            return True
        return False


class _AuthorizedClients:
    """Lets in the clients whose public keys lie in the configured directory at that moment."""

    def __init__(self, config: VCacheConfig) -> None:
        self._config = config

    def callback(self, domain: str, key: bytes) -> bool:
        try:
            return key in authorized_clients(self._config)
        except ConfigError as error:
            log.error("nobody can be let in: %s", error)
            return False


class Server:
    """A metadata server at ``config.endpoint``.

    Raises ``UnavailableError`` when another one serves it or it cannot be bound, ``ConfigError`` when it may not be bound
    without keys.
    """

    def __init__(self, config: VCacheConfig) -> None:
        self._config = config
        self._stopping = False
        self._fairness = _Fairness()
        self._context = zmq.Context()
        self._authenticator: zmq.auth.thread.ThreadAuthenticator | None = None
        self._socket = self._make_socket()
        self._lock = EndpointLock(config)
        try:
            self._bind()
        except BaseException:
            self._lock.close()
            self._context.destroy(linger=0)
            raise
        # The method under pyzmq's own: what it does beyond that (4 us a reply of two frames) is for other kinds of sockets.
        self._send_frame = super(zmq.Socket, self._socket).send
        clock = time.monotonic()
        self.service = Service(ServiceSettings.of(config), term=self._lock.term, wall_s=time.time() - clock)
        self._published = self._publish()

    def _publish(self) -> PublishedIndex | None:
        if not self._config.server.shared_index:
            return None
        try:
            published = PublishedIndex(
                RuntimeDir(self._config.runtime_path),
                term=self.service.term,
                max_bytes=self._config.server.shared_index,
            )
        except (OSError, UnavailableError) as error:
            log.warning("no index in shared memory, lookups come by the socket: %s", error)
            return None
        self.service.catalog.index.changes = published.changes
        self.service.published_as = published.name
        return published

    def _make_socket(self) -> zmq.Socket[bytes]:
        config = self._config
        socket = self._context.socket(zmq.ROUTER)
        try:
            is_secured = secure_server(socket, config)  # refuses what may not be bound
        except ConfigError:
            self._context.destroy(linger=0)
            raise
        if is_secured:
            self._authenticator = zmq.auth.thread.ThreadAuthenticator(self._context)
            self._authenticator.start()
            self._authenticator.configure_curve_callback("*", _AuthorizedClients(config))
        socket.linger = 0
        socket.rcvhwm = _RECEIVE_HWM
        socket.sndhwm = _SEND_HWM
        # What is a little too large is answered; what is much too large is cut off by ZeroMQ, with its connection.
        socket.maxmsgsize = 2 * config.server.max_message_bytes
        socket.rcvtimeo = _IDLE_MS
        socket.router_mandatory = True  # so that what cannot be sent is counted
        socket.router_handover = True  # a peer that reconnects keeps its name
        return socket

    def _bind(self) -> None:
        endpoint = self._config.endpoint
        old = os.umask(0o177)  # the socket is 0600 from its first moment
        try:
            self._socket.bind(endpoint)
        except zmq.ZMQError as error:
            raise UnavailableError(
                f"cannot listen at {endpoint} ({error}); if another program has it, set server.endpoint to another address"
            ) from error
        finally:
            os.umask(old)

    # --- serving --------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Serves until a signal to end, or ``stop``."""
        log.info("serves %s, term %d", self._config.endpoint, self.service.term)
        service = self.service
        next_tick = judged_from = before = time.monotonic()
        handled = 0  # since the last tick
        has_work = False
        with _signals(self.stop), _no_collector():
            while not self._stopping:
                is_empty = not self._serve_one(_DONTWAIT if has_work else 0)
                has_work = service.has_work
                handled += 1
                now = time.monotonic()
                if now - before > _SUSPENDED_S:
                    # This process stood still. What came meanwhile is still on its way through the kernel and ZeroMQ's
                    # thread: nobody is judged before they have had the time to be heard again.
                    log.warning("stood still for %.1f s", now - before)
                    judged_from = now + 2 * service.settings.heartbeat_s
                before = now
                if now >= next_tick or (has_work and (is_empty or handled >= _BATCH)):
                    drained = self._fairness.all_had_a_turn(is_empty=not self._has_input())  # after ``now`` was taken
                    self._send(self._tick(now, drained and now >= judged_from))
                    has_work = service.has_work
                    next_tick = now + _TICK_S
                    handled = 0
        log.info("ends")

    def stop(self) -> None:
        """Makes ``run`` return soon."""
        self._stopping = True

    def close(self) -> None:
        """Gives up the endpoint and removes its socket."""
        if self._authenticator is not None:
            self._authenticator.stop()
        self._socket.close(linger=0)
        if self._published is not None:
            self._published.close()
        self._lock.close()
        self._context.term()

    def _serve_one(self, flags: int) -> bool:
        """Handles the next message; waits a little for it unless told not to. False: there was none."""
        receive = self._socket.recv
        try:
            sender = receive(flags)
        except zmq.Again:
            return False
        message = receive(_DONTWAIT)
        has_more = self._socket.get(_RCVMORE)
        out = self._refuse_frames(sender) if has_more else self._handle(sender, message)
        self._fairness.took(sender)
        self._send(out)
        return True

    def _has_input(self) -> bool:
        return bool(int(self._socket.get(zmq.EVENTS)) & zmq.POLLIN)

    def _refuse_frames(self, sender: bytes) -> Outgoing:
        while self._socket.get(_RCVMORE):
            self._socket.recv(_DONTWAIT)
        self.service.counters["bad_messages"] += 1
        return [(sender, protocol.Error(0, protocol.ErrorCode.BAD_REQUEST, "a request is one frame"))]

    def _handle(self, sender: bytes, message: bytes) -> Outgoing:
        try:
            return self.service.handle(sender, message, time.monotonic())
        except Exception:
            log.exception("a request failed; its first bytes: %s", message[:64].hex())
            self.service.counters["failed_messages"] += 1
            name = answer_id(message)
            text = "the server failed on this request and goes on; its log says how"
            return [] if name is None else [(sender, protocol.Error(name, protocol.ErrorCode.FAILED, text))]

    def _tick(self, now: float, drained: bool) -> Outgoing:
        try:
            return self.service.tick(now, drained)
        except Exception:
            log_once_per(_SAY_AGAIN_S, "tick", log, logging.ERROR, "a tick failed: %s", traceback.format_exc())
            self.service.counters["failed_messages"] += 1
            return []

    def _send(self, out: Outgoing) -> None:
        published = self._published
        if published is not None:  # first: who has the answer finds in shared memory what it tells of
            published.update(is_exact=self.service.index_is_exact)
            self.service.published_as = published.name
        send = self._send_frame
        for recipient, message in out:
            try:
                send(recipient, _SNDMORE)
                send(protocol.encode(message), _DONTWAIT)
            except zmq.ZMQError as error:  # gone (EHOSTUNREACH), or it does not read (EAGAIN)
                self.service.counters["dropped_replies"] += 1
                log.debug("a %s was dropped: %s", type(message).__name__, error)


@contextmanager
def _signals(stop: Callable[[], None]) -> Iterator[None]:
    """What tells this process to end calls ``stop``."""

    def handler(number: int, frame: FrameType | None) -> None:
        stop()

    before = {number: signal.signal(number, handler) for number in ending_signals()}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


@contextmanager
def _no_collector() -> Iterator[None]:
    """Without the cyclic collector: the state has no circles that are not broken by hand, and a pass over a million
    entries would stop the server for tenths of a second."""
    was_enabled = gc.isenabled()
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.unfreeze()
        if was_enabled:
            gc.enable()


def serve(config: VCacheConfig) -> None:
    """Runs a metadata server until it is told to end."""
    try:
        RuntimeDir(config.runtime_path).sweep()
    except UnavailableError as error:
        log.warning("what dead processes left is not removed: %s", error)
    server = Server(config)
    try:
        server.run()
    finally:
        server.close()
