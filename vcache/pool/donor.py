"""A donor: gives a segment to the pool, hands its records over to each new server, and carries out the server's orders.

Everything happens in the client's background thread, as answers come in; a donor never waits there. What a donor does when
its segment meets a server again depends on what may have happened meanwhile:

* a new term: the same incarnation, all records handed over; the server was away, nobody removed anything;
* the same term, or a silence of this process that a server may have taken for its death: entries may have been removed since.
  Every committed record is retired and the segment begins a new incarnation.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from enum import Enum
from itertools import islice
from typing import Final

from vcache import protocol
from vcache.config import VCacheConfig
from vcache.errors import UnavailableError
from vcache.failures import FailureLog
from vcache.memory.base import Memory, is_host
from vcache.memory.copying import aside
from vcache.pool.client import MAX_LABEL_CHARS, PoolClient
from vcache.pool.demotion import Demoter
from vcache.pool.holds import Holds
from vcache.pool.pulling import open_puller
from vcache.pool.segment import Segment
from vcache.pool.spilling import open_spiller
from vcache.protocol import (
    MAX_ITEMS_PER_PAGE,
    AnyReply,
    Done,
    Error,
    ErrorCode,
    Orders,
    RecordInfo,
    Registered,
    RetireItem,
    Tier,
)
from vcache.remote.offer import open_offer

logger = logging.getLogger(__name__)

#: A record in a handover takes less than this on the wire.
_RECORD_WIRE_BYTES: Final = 160
#: Before a registration that the server refused is tried again: it says why in the log, and will hardly change its mind soon.
REFUSED_WAIT_S: Final = 1.0
#: While the server is waited for to drain, whether it is still there is looked at so often.
_LOOK_INTERVAL_S: Final = 0.2


class State(Enum):
    """Where a donor stands with the server of the present term."""

    WAITING = "waiting"  # for a session, or to try again
    REGISTERING = "registering"
    HANDING_OVER = "handing over"
    SERVING = "serving"
    DRAINING = "draining"
    CLOSED = "closed"


class Donor:
    """Gives ``memory`` (zeroed, of this process) to the pool and owns it from then on.

    Returns at once; ``wait_registered`` waits for the server. ``close`` takes the segment back. Raises ``CapacityError`` when
    the memory has no room for data. Thread-safe.
    """

    def __init__(
        self, config: VCacheConfig, client: PoolClient, memory: Memory, segment_id: bytes, *, label: str = ""
    ) -> None:
        self.segment = Segment.create(memory, segment_id, records=config.segment.records)
        #: What this process reads in place; see there.
        self.holds = Holds(self.segment)
        self.tier = tier_of(config.segment.tier, memory.device)
        self.label = label[:MAX_LABEL_CHARS]
        self._client = client
        self._background = client.background
        self._demoter = Demoter(client, self.segment, spiller=open_spiller(config))
        self._puller = open_puller(client, self.segment)
        self._failures = FailureLog(logger)
        self._page = min(MAX_ITEMS_PER_PAGE, config.server.max_message_bytes // _RECORD_WIRE_BYTES)
        self._state = State.WAITING
        self._number = 0
        self._term = 0  # of the last registration
        self._is_ahead = False  # the segment began a new incarnation in the present session
        self._is_stale = False  # it has to begin one before it registers
        self._pages: Iterator[RecordInfo] = iter(())
        self._sent: tuple[list[RecordInfo], bool] = ([], False)
        self._page_is_lost = False
        self._not_before = 0.0
        self._registered = threading.Event()
        self._drained = threading.Event()
        self._drain_asked = False
        self._close_lock = threading.Lock()
        self._offer = open_offer(config, memory)
        self._announced = b""  # of it, to this server
        client.mappings.adopt(self.segment)
        client.background.add_duty(self)
        if client.available:
            client.background.wake()

    @property
    def registered(self) -> bool:
        """Whether the server of the present term knows the segment and all its records."""
        return self._registered.is_set()

    def wait_registered(self, timeout_s: float) -> bool:
        """Waits for it, at most this long."""
        return self._registered.wait(timeout_s)

    @property
    def term(self) -> int:
        """Of the server that last gave the segment a number."""
        return self._term

    @property
    def number(self) -> int:
        """The segment's, in the present term; 0 while the server has given it none."""
        return self._number

    @property
    def state(self) -> State:
        return self._state

    def close(self, timeout_s: float = 10.0) -> bool:
        """Takes the segment back: no new grants or leases, wait for those there are, unlink. Harmless when called twice.

        Whether all users were done in ``timeout_s``. What readers of other processes have mapped stays readable to them (host
        memory); they find out by validation. Close it before its client.
        """
        with self._close_lock:
            if self._state is State.CLOSED:
                return True
            self._drain_asked = True
            self._background.wake()
            deadline = time.monotonic() + timeout_s
            is_idle = self._demoter.close(timeout_s)
            if self._puller is not None:
                is_idle &= self._puller.close(max(0.0, deadline - time.monotonic()))
            is_drained = self._await_drained(deadline)
            self._state = State.CLOSED
            self._registered.clear()
            self._background.remove_duty(self)
            if self._offer is not None:
                self._offer.close()
            is_unused = is_idle and self._client.mappings.give_up(self.segment, max(0.0, deadline - time.monotonic()))
            if is_unused:
                self.segment.close()
                logger.info("segment %s is taken back", self.segment.segment_id.hex())
            else:  # freeing memory under a copy crashes the process; its end frees it, too
                logger.warning("segment %s is still in use: it goes with this process", self.segment.segment_id.hex())
            return is_drained and is_unused

    def _await_drained(self, deadline: float) -> bool:
        """Whether the server has said that nobody uses it, or there is no server to grant anything."""
        while self._client.available:
            left_s = deadline - time.monotonic()
            if self._drained.wait(max(0.0, min(left_s, _LOOK_INTERVAL_S))):
                return True
            if left_s <= 0:
                return False
        return True

    # --- duties, in the background thread -------------------------------------------------------------------------

    def on_session(self, *, was_suspended: bool) -> None:
        self._registered.clear()
        self._forget_orders()
        self._number = 0
        self._is_ahead = False
        if self._term == self._background.term or (self._term and was_suspended):
            self._begin_incarnation()
        if self._state is not State.CLOSED:
            self._state = State.WAITING

    def on_gone(self, number: int) -> None:
        if number == self._number and self._state in (State.HANDING_OVER, State.SERVING):
            self._dropped("the server dropped it")

    def on_tick(self) -> None:
        if self._drain_asked and not self._drained.is_set():
            self._drain()
        elif self._state is State.WAITING and self._background.term and time.monotonic() >= self._not_before:
            if not self._is_stale or self._begin_incarnation():
                self._register()
        elif self._state is State.HANDING_OVER and self._page_is_lost and time.monotonic() >= self._not_before:
            self._send_page()  # or it was only late: a page sent twice is harmless
        elif self._state is State.SERVING and self._announcement() != self._announced:
            self._state = State.WAITING  # and registers again, to say how other hosts read it now

    def on_orders(self, orders: Orders) -> None:
        if self._number in orders.register_again and self._state is State.SERVING:
            self._state = State.WAITING  # writers have been heard of that were at work when the last scan began
        for number, items in orders.retire:
            if number == self._number and self._state is not State.CLOSED:
                self._retire(number, items)
        for number, victims in orders.demote:
            if number == self._number and self._state is State.SERVING:
                self._demoter.ordered(number, victims)
        for number, source, pulls in orders.pull:
            if number == self._number and self._state is State.SERVING and self._puller is not None:
                self._puller.ordered(number, source, pulls)

    def _forget_orders(self) -> None:
        self._demoter.forget()
        if self._puller is not None:
            self._puller.forget()

    def _retire(self, number: int, items: list[RetireItem]) -> None:
        with self._aside():
            done = self.holds.retire(items)
        if done:
            self._background.request(
                lambda id_, session, term: protocol.Retired(id_, session, term, number, done), self._on_retired
            )

    def _on_retired(self, reply: AnyReply | None) -> None:
        if isinstance(reply, Error):
            self._refused("retire", reply)

    # --- registration and handover --------------------------------------------------------------------------------

    def _register(self) -> None:
        segment = self.segment
        # Memory that never was in a pool has no writers from before.
        attached = self._client.runtime.live_writers() if self._term else []
        announced = self._announced = self._announcement()
        self._state = State.REGISTERING
        self._background.request(
            lambda id_, session, term: protocol.RegisterSegment(
                id=id_,
                session=session,
                term=term,
                segment_id=segment.segment_id,
                incarnation=segment.incarnation,
                tier=self.tier,
                device=segment.memory.device,
                nbytes=segment.nbytes,
                data_offset=segment.data_offset,
                records=segment.records,
                handle=segment.memory.handle,
                label=self.label,
                attached=attached,
                remote=announced,
                spills=self._demoter.spills,
                pulls=self._puller is not None,
            ),
            self._on_registered,
        )

    def _announcement(self) -> bytes:
        return self._offer.announcement() if self._offer is not None else b""

    def _on_registered(self, reply: AnyReply | None) -> None:
        if self._state is not State.REGISTERING:
            return
        if isinstance(reply, Registered):
            self._number, self._term = reply.number, reply.term
            self._state = State.HANDING_OVER
            if self._is_ahead:  # nothing is granted yet: what is committed was granted in the incarnation before
                with self._aside():
                    self.segment.retire_committed()
            self._pages = self._records()  # only now: what commits from here on is told to this server
            self._next_page()
        elif isinstance(reply, Error) and reply.code is ErrorCode.UNKNOWN_SEGMENT:
            self._dropped(reply.text)
        else:
            self._state = State.WAITING  # and the next tick tries again
            if isinstance(reply, Error):
                self._not_before = time.monotonic() + REFUSED_WAIT_S
                self._refused("register", reply)

    def _records(self) -> Iterator[RecordInfo]:
        """All records; one that does not agree with its checksum is retired instead of handed over.

        Should a living writer be at it, that one's commit fails, and until then its hello holds the extent.
        """
        for item in self.segment.scan():
            if item.nbytes:
                yield item
            else:
                logger.error("record %d of segment %s is corrupt", item.record, self.segment.segment_id.hex())
                self.segment.retire(item.record, item.generation)

    def _next_page(self) -> None:
        with self._aside():
            items = list(islice(self._pages, self._page))
        self._sent = (items, len(items) < self._page)
        self._send_page()

    def _send_page(self) -> None:
        self._page_is_lost = False
        number, (items, last) = self._number, self._sent
        self._background.request(
            lambda id_, session, term: protocol.Handover(id_, session, term, number, items, last), self._on_page
        )

    def _on_page(self, reply: AnyReply | None) -> None:
        if self._state is not State.HANDING_OVER:
            return
        if isinstance(reply, Error) and reply.code is ErrorCode.UNKNOWN_SEGMENT:
            self._dropped(reply.text)
        elif not isinstance(reply, Done):
            self._page_is_lost = True  # a later tick sends it again; now, it might not be sendable either
            if isinstance(reply, Error):
                self._not_before = time.monotonic() + REFUSED_WAIT_S
                self._refused("hand over", reply)
        elif self._sent[1]:
            self._state = State.SERVING
            self.holds.open()
            self._registered.set()
            logger.info(
                "segment %s incarnation %d (%s, %d bytes) is number %d in term %d",
                self.segment.segment_id.hex(),
                self.segment.incarnation,
                self.segment.memory.device,
                self.segment.nbytes,
                self._number,
                self._term,
            )
        else:
            self._next_page()

    def _refused(self, what: str, error: Error) -> None:
        if error.code is ErrorCode.UNKNOWN_SEGMENT:
            if self._state in (State.HANDING_OVER, State.SERVING):
                self._dropped(error.text)
        else:
            self._failures.record(f"{what} ({error.code.name})", UnavailableError(error.text))

    def _dropped(self, why: str) -> None:
        logger.warning("segment %s is registered anew: %s", self.segment.segment_id.hex(), why)
        self._registered.clear()
        self._number = 0
        self._begin_incarnation()
        self._state = State.WAITING

    def _begin_incarnation(self) -> bool:
        """Retires what is committed. False, and to be tried again, while this process reads some of it in place."""
        self._forget_orders()
        self._is_stale = not self.holds.close()
        if not self._is_stale:
            with self._aside():
                self.segment.begin_incarnation()
            self._is_ahead = True
            self._client.mappings.adopt(self.segment)
        return not self._is_stale

    def _aside(self) -> AbstractContextManager[object]:
        """Where the directory is read and written: heartbeats must not wait for what an engine in this process has its GPU compute."""
        return aside(self.segment.memory)

    # --- the end --------------------------------------------------------------------------------------------------

    def _drain(self) -> None:
        if not self._number or not self._background.term:
            self._drained.set()  # no server knows it: nothing to wait for
        elif self._state is not State.DRAINING:
            self._state = State.DRAINING
            number = self._number
            self._background.request(
                lambda id_, session, term: protocol.DrainSegment(id_, session, term, number), self._on_drained
            )

    def _on_drained(self, reply: AnyReply | None) -> None:
        if reply is None:  # the last lease may take its time: ask again, which is harmless
            self._state = State.SERVING
        else:
            self._drained.set()


def tier_of(setting: str, device: str) -> Tier:
    """The tier of a segment by its ``segment.tier``: "auto" goes by the device, any other may be said of any memory."""
    if setting == "auto":
        return Tier.DRAM if is_host(device) else Tier.VRAM
    return Tier[setting.upper()]
