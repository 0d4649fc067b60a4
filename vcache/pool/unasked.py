"""What a client knows without asking: the server's index in shared memory, with the lease, if any, asked for behind the answer.

``None`` where it cannot say: the server is asked then, whose answer is the definition. What is evicted before the server reads of
such a lease does not validate, and is a miss.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from vcache import protocol
from vcache.pool.calls import Calls, OneWay
from vcache.pool.index_reader import IndexReader
from vcache.pool.runtime_dir import RuntimeDir
from vcache.pool.session import Acquired, Session
from vcache.protocol import KEY_BYTES, Hits

#: A read of less is over before the server has heard of its lease, which then only says that the chunks were used.
_LEASED_AT_ONCE_BYTES: Final = 64 << 20


class Unasked:
    """Thread-safe. To be used while a session is open. ``close`` when the client closes."""

    def __init__(self, runtime: RuntimeDir, session: Session, calls: Calls, *, count: Callable[[str], None]) -> None:
        self._index = IndexReader(runtime)
        self._session = session
        self._calls = calls
        self._count = count

    def lookup(self, keys: bytes, lease_s: float) -> Hits | None:
        """The leading run, leased for ``lease_s`` if positive."""
        if not self._calls.is_seen:
            return None
        session = self._session
        term = session.term
        hits = self._index.run(session.index, term, keys)
        if hits is None:
            return None
        self._count("index_lookups")
        lease = 0
        if hits and lease_s:
            name = self._calls.name()
            self._ask_lease(name, keys[: KEY_BYTES * hits], lease_s, is_read=False, can_wait=False)
            lease = session.leased_as(name)
        return Hits(0, term, hits, lease)

    def acquire(self, keys: bytes, lease_s: float) -> Acquired | None:
        """The leading run with the first rank's placements, leased: at once for a long read, with its release for a short one."""
        if not self._calls.is_seen:
            return None
        session = self._session
        term = session.term
        placements = self._index.find(session.index, term, keys)
        if placements is None:
            return None
        name = self._calls.name() if placements else 0
        acquired = session.found(term, placements, name)
        if acquired is not None:
            self._count("index_acquires")
            if name:
                hits = len(acquired.placements)
                is_long = hits * int(acquired.placements["nbytes"][0]) >= _LEASED_AT_ONCE_BYTES
                self._ask_lease(name, keys[: KEY_BYTES * hits], lease_s, is_read=True, can_wait=not is_long)
        return acquired

    def close(self) -> None:
        """From now on it cannot say."""
        self._index.close()

    def _ask_lease(self, name: int, keys: bytes, lease_s: float, *, is_read: bool, can_wait: bool) -> None:
        def make(id_: int, session: bytes, term: int) -> protocol.LeaseRun:
            return protocol.LeaseRun(id_, session, term, keys, lease_s, is_read)

        self._calls.tell(OneWay(make, can_wait=can_wait, id=name))
