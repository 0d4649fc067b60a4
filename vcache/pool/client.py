"""A process's client of the metadata server: what the pool can be asked.

No call raises because something is unavailable: it answers as an empty cache would, counts, and leaves it to the background
thread (``background.py``) to find the server again. No call waits longer than ``client.call_timeout``, and after the first
that did, none waits at all until the server answers a heartbeat. Bad arguments are ``ValueError``.
"""

from __future__ import annotations

import os
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from typing import Final, TypeVar

import zmq

from vcache import protocol
from vcache.config import VCacheConfig
from vcache.pool.background import Background, MakeRequest, Member
from vcache.pool.calls import Calls, OneWay
from vcache.pool.counters import COUNTERS
from vcache.pool.mappings import Mappings, Use
from vcache.pool.runtime_dir import HeldFile, RuntimeDir
from vcache.pool.session import (
    MAX_OUTSTANDING,
    PLACEMENT_DTYPE,
    RESERVATION_WIRE_BYTES,
    Acquired,
    Granted,
    PlacementArray,
    Session,
)
from vcache.pool.unasked import Unasked
from vcache.pool.wire import dealer
from vcache.protocol import (
    KEY_BYTES,
    MAX_KEYS_PER_CALL,
    AnyReply,
    Done,
    Grants,
    Hits,
    Placements,
    SegmentInfo,
    ServerStats,
    Tier,
)
from vcache.remote.segments import RemoteSegments

__all__ = ["PLACEMENT_DTYPE", "Acquired", "Granted", "PlacementArray", "PoolClient"]

#: What the protocol allows a name.
MAX_LABEL_CHARS: Final = 256
#: What a removal may take beyond the liveness deadline, after which a donor that does not answer counts as dead.
_REMOVAL_EXTRA_S: Final = 5.0
_STOP_TIMEOUT_S: Final = 5.0
#: A server that answers heartbeats and no calls is not asked for ever.
_SETTLE_TRIES: Final = 5
_NO_HITS: Final = Hits(id=0, term=0, hits=0, lease=0)

Reply = TypeVar("Reply", bound=AnyReply)
Taken = TypeVar("Taken")


class PoolClient:
    """Thread-safe. Construction starts a background thread and returns at once, whether or not there is a server.

    ``device``: "cpu:0", or a GPU's UUID: where this process's KV tensors are. ``writes``: whether it will reserve space.
    ``maps_ahead``: map this host's segments as they come up rather than at their first use (default: if it writes).
    Raises ``ConfigError`` when the runtime directory cannot be used, or for bad CURVE keys. A forked child must make its own;
    its parent's answers there as if the server were away.
    """

    def __init__(
        self, config: VCacheConfig, *, device: str, writes: bool, name: str = "", maps_ahead: bool | None = None
    ) -> None:
        self.config = config
        self.device = device
        self.writes: Final = writes
        self.runtime = RuntimeDir(config.runtime_path)
        self.host = self.runtime.host_id
        self.counters: dict[str, int] = dict.fromkeys(COUNTERS, 0)
        self.session = Session(
            b"\x01" + secrets.token_bytes(15),
            host=self.host,
            max_named=min(MAX_OUTSTANDING, config.server.max_message_bytes // RESERVATION_WIRE_BYTES),
        )
        self._count_lock = threading.Lock()
        self._pid = os.getpid()
        self._closed = False
        self._granted_all = False
        remote = RemoteSegments(config, self.count) if config.transfer.remote != "none" else None
        self.mappings = Mappings(self.runtime, host=self.host, device=device, settings=config.transfer, remote=remote)
        # Before the first hello: a donor that does not find the file takes the client for dead.
        self._alive: HeldFile | None = self.runtime.hold_client_lock(self.session.id) if writes else None
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        try:
            socket = dealer(self._context, config)
            #: For donors: their traffic goes through it.
            self.background = Background(
                self._context,
                config,
                self.session,
                Member(self.host, (name or f"{device} pid {self._pid}")[:MAX_LABEL_CHARS], device, writes),
                mappings=self.mappings,
                runtime=self.runtime,
                maps_ahead=writes if maps_ahead is None else maps_ahead,
                count=self.count,
            )
        except BaseException:
            self._context.destroy(linger=0)
            self._give_up_lock()
            raise
        self._calls = Calls(
            socket, self.session, self.background, timeout_s=config.client.call_timeout, count=self.count
        )
        self.background.before_heartbeats = self._calls.flush
        is_shared = bool(config.server.shared_index)
        self._shared = Unasked(self.runtime, self.session, self._calls, count=self.count) if is_shared else None

    # --- state ----------------------------------------------------------------------------------------------------

    @property
    def available(self) -> bool:
        """Whether a session is open and the server answers."""
        return self.background.available.is_set() and self.session.term != 0 and not self._is_over

    def wait_available(self, timeout_s: float) -> bool:
        """Waits for it, at most this long."""
        return self.background.available.wait(timeout_s) and self.available

    @property
    def term(self) -> int:
        """The server's, or 0 while there is no session."""
        return self.session.term

    def count(self, name: str, amount: int = 1) -> None:
        """Adds to one of ``COUNTERS``."""
        with self._count_lock:
            self.counters[name] += amount

    # --- reading --------------------------------------------------------------------------------------------------

    def lookup(self, keys: bytes, lease_s: float = 0, *, waits: bool = True) -> Hits:
        """The leading run of ``keys`` (16 bytes each, joined) that is present; leased for ``lease_s`` if positive.

        The lease, if any, is the caller's to ``release``. No hits when the server is unavailable.

        Where the server is on this host, and no lease is wanted or it is not waited for (``waits``), the run is read from
        shared memory: the same answer, up to what is on its way to the server. Then only what is leased counts as used. Between
        such an answer and the lease asked for behind it a chunk can still be evicted, which whoever loads it finds out.
        """
        _check_keys(keys)
        unasked = self._unasked() if not (lease_s and waits) else None
        found = unasked.lookup(keys, lease_s) if unasked is not None else None
        if found is not None:
            return found
        self.count("server_lookups")
        return (
            self.ask(Hits, lambda id_, session, term: protocol.Lookup(id_, session, term, keys, lease_s), self._leased)
            or _NO_HITS
        )

    def peek(self, keys: bytes) -> int | None:
        """The length of the leading run as ``lookup`` says it without a lease; ``None`` where that would be a round trip."""
        _check_keys(keys)
        unasked = self._unasked()
        found = unasked.lookup(keys, 0) if unasked is not None else None
        return found.hits if found is not None else None

    def acquire(self, keys: bytes, rank: int) -> Acquired | None:
        """The leading run, leased for ``client.lease``, with a placement of ``rank``'s shard for each chunk of it.

        The lease is the caller's to ``release``. ``None`` when the server is unavailable.

        Where the server is on this host, the first rank's placements are read from shared memory, and the lease is asked for
        behind that, without waiting: at once for a long read, with its release for a short one. What is evicted before the
        server reads of it does not validate: it is a miss.
        """
        _check_keys(keys)
        lease_s = self.config.client.lease
        unasked = self._unasked() if not rank else None
        found = unasked.acquire(keys, lease_s) if unasked is not None else None
        if found is not None:
            return found
        return self.ask(
            Placements,
            lambda id_, session, term: protocol.Acquire(id_, session, term, keys, rank, lease_s),
            self.session.acquired,
        )

    def release(self, lease: int, invalid: Sequence[int] = ()) -> None:
        """Ends a lease; ``invalid``: generations of placements whose record did not validate. Never waits.

        Ending a lease that the server granted is not urgent: it goes with the next message or heartbeat, at once only when something did
        not validate. A lease that was asked for and not waited for ends at once: the server may hear of the use by this alone.
        """
        if lease and self.session.released(lease):
            verdict = list(invalid)
            self._tell(
                OneWay(
                    lambda id_, session, term: protocol.Release(id_, session, term, abs(lease), verdict, lease < 0),
                    is_seen=bool(verdict),  # what did not validate is dropped
                    can_wait=lease > 0 and not verdict,
                )
            )

    # --- writing --------------------------------------------------------------------------------------------------

    def reserve(
        self,
        keys: bytes,
        *,
        parent: bytes,
        rank: int,
        ranks: int,
        nbytes: int,
        tokens: int,
        tenant: int,
        ttl_s: int = 0,
        pin_s: float = 0.0,
        into: int = 0,
        into_tier: Tier | None = None,
        chained: bool = True,
    ) -> Granted | None:
        """Space for one rank's shards of a run of chunks, whose first has ``parent`` before it (empty: none).

        ``chained`` false: they are no run; what each has before it is ``parent``.

        ``into``, ``into_tier``: for copies of what the pool has elsewhere, in the segment of this number, or of this tier and
        host; see ``protocol.Reserve``.

        Every grant is the caller's to ``commit`` or ``abort``, and is outstanding until then. Keys beyond what a hello could
        name as outstanding are declined. ``None`` when the server is unavailable.
        """
        _check_keys(keys)
        if self._alive is None:
            raise ValueError("writes = False: a client that reserves must be made with writes=True")
        count = len(keys) // KEY_BYTES
        if self.session.room <= 0:
            self.count("calls_skipped")
            return None
        sent: list[protocol.Reserve] = []

        def make(id_: int, session: bytes, term: int) -> protocol.Reserve:
            # Here, under the calls' lock: no other thread's grants can come between the count of room and the reply.
            asked = keys[: KEY_BYTES * max(1, self.session.room)]
            of_run = (parent, rank, ranks, nbytes, tokens, tenant, ttl_s, pin_s)
            sent.append(protocol.Reserve(id_, session, term, asked, *of_run, into, into_tier, chained))
            return sent[0]

        return self.ask(Grants, make, lambda reply: self.session.granted(sent[0], reply, count))

    def commit(self, generations: Sequence[int]) -> None:
        """Tells the server that these records are committed in memory. Never waits; without a session it is told later.

        To be called as soon as they are: from then on the server finds them in memory, not among what this client holds.
        """
        if generations:
            self.session.committed(generations)
            told = list(generations)
            self._tell(
                OneWay(
                    lambda id_, session, term: protocol.Commit(id_, session, term, told),
                    told,
                    is_commit=True,
                    is_seen=True,
                )
            )

    def abort(self, generations: Sequence[int]) -> None:
        """Gives grants back. Only once their writer touches record and extent no more. Never waits."""
        if generations:
            given = list(generations)
            self._tell(OneWay(lambda id_, session, term: protocol.Abort(id_, session, term, given), given))

    def demoted(self, number: int, done: Sequence[int], failed: Sequence[int]) -> None:
        """Tells the server what became of its orders to demote, behind the commits of this thread. Never waits."""
        lists = list(done), list(failed)
        self._tell(OneWay(lambda id_, session, term: protocol.Demoted(id_, session, term, number, *lists)))

    def pulled(self, number: int, done: Sequence[int], failed: Sequence[int]) -> None:
        """As ``demoted``, of its orders to pull into segment ``number``."""
        lists = list(done), list(failed)
        self._tell(OneWay(lambda id_, session, term: protocol.Pulled(id_, session, term, number, *lists)))

    # --- the rest -------------------------------------------------------------------------------------------------

    def touch(self, keys: bytes) -> None:
        """Counts as a use for eviction. Never waits."""
        _check_keys(keys)
        self._tell(OneWay(lambda id_, session, term: protocol.Touch(id_, session, term, keys)))

    def pin(self, keys: bytes, pin_s: float) -> int:
        """Keeps present chunks from eviction; how many."""
        _check_keys(keys)
        return self._count_of(lambda id_, session, term: protocol.Pin(id_, session, term, keys, pin_s))

    def unpin(self, keys: bytes) -> int:
        """Ends pins; how many."""
        _check_keys(keys)
        return self._count_of(lambda id_, session, term: protocol.Unpin(id_, session, term, keys))

    def remove(self, keys: bytes) -> int | None:
        """Removes chunks; how many. Returns once they are gone from memory, too; ``None`` when that is not said in time.

        Writes of them that are under way, this client's among them, are not found, and are waited for.
        """
        _check_keys(keys)
        return self._removed(lambda id_, session, term: protocol.Remove(id_, session, term, keys))

    def clear(self, tenant: int | None = None) -> int | None:
        """Removes every chunk of a tenant, or of all; how many. Returns as ``remove`` does."""
        return self._removed(lambda id_, session, term: protocol.Clear(id_, session, term, tenant or 0, tenant is None))

    def settle(self, timeout_s: float) -> bool:
        """A round trip behind every commit made so far: whether the server has read them all, within ``timeout_s``.

        It then knows what they are about, and any other client finds it, unless the server was restarted meanwhile.
        """
        deadline = time.monotonic() + timeout_s
        for _ in range(_SETTLE_TRIES):
            self.commit(self.session.untold())  # what the calls' socket had no room for; said twice it does no harm
            if self.ask(Done, _ask_nothing, lambda reply: reply) is not None:
                return True
            if self._is_over or not self.wait_available(max(0.0, deadline - time.monotonic())):
                return False
        return False

    def stats(self) -> ServerStats | None:
        """The server's state."""
        return self.ask(ServerStats, protocol.Stats, lambda reply: reply)

    def use_segment(self, info: SegmentInfo) -> Use | None:
        """A segment, mapped until the answer is released; ``None`` when this process cannot map it."""
        return self.mappings.use(info)

    def close(self, timeout_s: float = _STOP_TIMEOUT_S) -> None:
        """Ends the session, unmaps what is not in use. Donors are to be closed before. Harmless when called twice.

        While writes are under way the session is not said to be over; it is, to donors, when the last of them is.
        """
        with self._count_lock:
            if self._is_over:  # a forked child owns neither the sockets nor the thread
                return
            self._closed = True
        if self._shared is not None:
            self._shared.close()
        self._calls.close()
        self._granted_all = True
        is_stopped = self.background.stop(timeout_s)
        self.mappings.close()
        if is_stopped:
            self._context.term()
        self._end_if_done()

    # --- calls ----------------------------------------------------------------------------------------------------

    @property
    def _is_over(self) -> bool:
        return self._closed or os.getpid() != self._pid

    def _unasked(self) -> Unasked | None:
        return self._shared if self.available else None

    def _leased(self, reply: Hits) -> Hits | None:
        return reply if self.session.leased(reply.term, reply.lease) else None

    def ask(self, expected: type[Reply], make: MakeRequest, take: Callable[[Reply], Taken | None]) -> Taken | None:
        """One round trip: what ``take`` makes of the reply, or ``None``. For this, and for parts of the pool with requests of their own."""
        if not self.available:
            self.count("calls_skipped")
            return None
        return self._calls.call(expected, make, take)

    def _count_of(self, make: MakeRequest) -> int:
        return self.ask(Done, make, lambda reply: reply.count) or 0

    def _removed(self, make: MakeRequest) -> int | None:
        if not self.available:
            self.count("calls_skipped")
            return None
        timeout_s = self.background.liveness_s + _REMOVAL_EXTRA_S
        return self._calls.call_deferred(Done, make, lambda reply: reply.count, timeout_s=timeout_s)

    def _tell(self, message: OneWay) -> None:
        if os.getpid() == self._pid:
            self._calls.tell(message)
            self._end_if_done()

    def _end_if_done(self) -> None:
        """After ``close``: once no writer is at work, and none can begin, donors may take this client for dead."""
        if self._granted_all and not self.session.is_writing:
            self._give_up_lock()

    def _give_up_lock(self) -> None:
        if self._alive is not None:
            with self._count_lock:  # two threads must not close one descriptor
                self._alive.unlink()
                self._alive.close()


def _ask_nothing(id_: int, session: bytes, term: int) -> protocol.Unpin:
    """A request that changes nothing: no chunk has this key."""
    return protocol.Unpin(id_, session, term, bytes(KEY_BYTES))


def _check_keys(keys: bytes) -> None:
    if not keys or len(keys) % KEY_BYTES or len(keys) > KEY_BYTES * MAX_KEYS_PER_CALL:
        raise ValueError(
            f"keys: {len(keys)} bytes; 1 to {MAX_KEYS_PER_CALL} keys of {KEY_BYTES} bytes each, joined, are needed"
        )
