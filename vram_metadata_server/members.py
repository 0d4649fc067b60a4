"""Who is there: sessions, the hosts they run on, and which of them have been silent too long.

Any message is a sign of life. A session past the liveness deadline is *silent*: it is answered ``UNKNOWN_SESSION`` until it
says hello again. It stays known while it has reservations in registered segments: they wait for evidence, and only a
session that said hello in this term lets a gate open.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from vcache.protocol import Hello
from vram_metadata_server.deadlines import Deadlines

MAX_SESSIONS: Final = 65_536
SEGMENTS_PER_SESSION: Final = 256


class Session:
    """One client process's membership in this term."""

    __slots__ = (
        "check_at",
        "device",
        "heard",
        "host",
        "id",
        "is_silent",
        "name",
        "news_version",
        "route",
        "segments",
        "told",
        "told_version",
        "writes",
    )

    def __init__(self, hello: Hello, route: bytes, now: float) -> None:
        self.id = hello.session
        self.segments: set[int] = set()  # numbers of those it donates
        self.check_at = 0.0
        self.renew(hello, route, now)

    def renew(self, hello: Hello, route: bytes, now: float) -> None:
        self.host = hello.host
        self.device = hello.device
        self.name = hello.name
        self.writes = hello.writes
        self.route = route  # where orders are pushed: the socket of its last heartbeat
        self.heard = now
        self.is_silent = False
        self.told: set[int] = set()  # numbers of the segments it was told of
        self.told_version = -1  # of the set of segments: equal means it was told of all
        self.news_version = -1  # the same, of what heartbeats have told


class Members:
    """All sessions of the term that are not forgotten."""

    def __init__(self, liveness_s: float) -> None:
        self._liveness_s = liveness_s
        self._sessions: dict[bytes, Session] = {}
        self._checks: Deadlines[bytes] = Deadlines(self._check_at)
        #: Silent sessions with unsettled reservations, by host: donors there are asked to prove them dead.
        self._suspects: dict[bytes, set[bytes]] = {}

    def __len__(self) -> int:
        return sum(not session.is_silent for session in self._sessions.values())

    def __iter__(self) -> Iterator[Session]:
        return iter(self._sessions.values())

    @property
    def is_full(self) -> bool:
        return len(self._sessions) >= MAX_SESSIONS

    def get(self, session: bytes) -> Session | None:
        """The session, silent or not."""
        return self._sessions.get(session)

    def admit(self, hello: Hello, route: bytes, now: float) -> Session:
        """The session that says this hello, new or renewed."""
        session = self._sessions.get(hello.session)
        if session is None:
            session = self._sessions[hello.session] = Session(hello, route, now)
            self._schedule(session)
            return session
        if session.is_silent:
            self._clear_suspicion(session)
        session.renew(hello, route, now)
        self._schedule(session)
        return session

    def silent(self, now: float) -> Iterator[Session]:
        """Sessions not heard of for longer than the liveness deadline, each once, now marked silent."""
        for name in self._checks.due(now):
            session = self._sessions[name]
            if session.heard + self._liveness_s > now:
                self._schedule(session)
                continue
            session.is_silent = True
            yield session

    def _schedule(self, session: Session) -> None:
        session.check_at = session.heard + self._liveness_s
        self._checks.push(session.check_at, session.id)

    def _check_at(self, name: bytes) -> float | None:
        session = self._sessions.get(name)
        return None if session is None or session.is_silent else session.check_at

    def suspect(self, session: Session) -> None:
        """The silent session has reservations that wait for evidence."""
        self._suspects.setdefault(session.host, set()).add(session.id)

    def suspects(self, host: bytes) -> set[bytes]:
        return self._suspects.get(host, set())

    def suspected(self) -> list[Session]:
        """All suspects."""
        return [self._sessions[name] for names in self._suspects.values() for name in names] if self._suspects else []

    def forget(self, session: Session) -> None:
        """It said goodbye, is proven dead, or is silent and nothing of it is left."""
        self._clear_suspicion(session)
        del self._sessions[session.id]

    def _clear_suspicion(self, session: Session) -> None:
        suspects = self._suspects.get(session.host)
        if suspects is not None:
            suspects.discard(session.id)
            if not suspects:
                del self._suspects[session.host]
