"""One client's session with the metadata server: its term, the segments it was told of, and what it still holds.

What a client says it holds is *evidence*: a restarted server gives those extents to nobody, and takes back what is not
named. So grants are taken, and told, under one lock: between the end of a term and the hello that opens the next, no grant
of the old term is accepted, whenever its reply comes in.

What is committed in memory is not held any more: a restarted server learns of it from its donor, whose last scan begins after
the last hello.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import numpy.typing as npt
from msgspec.structs import replace

from vcache.memory.base import IPC, is_host
from vcache.protocol import (
    KEY_BYTES,
    Allocate,
    Assign,
    Grants,
    Outcome,
    Placements,
    Reservation,
    Reserve,
    SegmentInfo,
    Welcome,
)

PLACEMENT_DTYPE: Final = np.dtype(
    [("segment", "<u4"), ("record", "<u4"), ("generation", "<u8"), ("offset", "<u8"), ("nbytes", "<u8")]
)
PlacementArray = npt.NDArray[np.void]
#: The server grants a session no more than this, and a hello names no more.
MAX_OUTSTANDING: Final = 4096
#: A reservation in a hello takes less than this on the wire.
RESERVATION_WIRE_BYTES: Final = 192


@dataclass(frozen=True, slots=True)
class Acquired:
    """A leased run. ``infos`` tells the segments that ``placements`` (``PLACEMENT_DTYPE``) number, whatever the term is later.

    A number that is not in it cannot be mapped.
    """

    lease: int
    placements: PlacementArray
    infos: dict[int, SegmentInfo]


@dataclass(frozen=True, slots=True)
class Granted:
    """An ``Outcome`` byte per key, a placement for each granted one, in order; ``infos`` as in ``Acquired``."""

    outcomes: bytes
    placements: PlacementArray
    infos: dict[int, SegmentInfo]


@dataclass(slots=True)
class _Held:
    """What this client has been granted and not given back. ``untold``: committed in memory, the server does not know."""

    outstanding: dict[int, Reservation] = field(default_factory=dict)
    untold: set[int] = field(default_factory=set)
    leases: set[int] = field(default_factory=set)  # ids as the server said them, or less than nothing: names of our own
    seen: int = 0


class Session:
    """Thread-safe; never waits. ``term`` is 0 while there is no session."""

    def __init__(self, session_id: bytes, *, host: bytes, max_named: int = MAX_OUTSTANDING) -> None:
        self.id = session_id
        self._host = host
        self._max_named = max_named
        self.term = 0
        #: The file of the server's index, which is there if the server is on this host.
        self.index = ""
        #: Counts hellos answered, so that an error about an earlier session ends no later one.
        self.epoch = 0
        self._lock = threading.Lock()
        self._last_term = 0
        self._infos: dict[int, SegmentInfo] = {}
        self._held = _Held()

    # --- the session comes and goes -------------------------------------------------------------------------------

    def end(self, epoch: int) -> bool:
        """The server knows the session of this epoch no more; false when a later one is open already."""
        with self._lock:
            if not self.term or epoch != self.epoch:
                return False
            self.term = 0
            self._infos = {}
            self._held.leases.clear()
            return True

    def outstanding(self) -> list[Reservation]:
        """What is not committed in memory yet, for a hello. To be asked while there is no session: then nothing is added."""
        with self._lock:
            assert not self.term, "a hello renews a session that has ended"
            held = self._held
            return [said for generation, said in held.outstanding.items() if generation not in held.untold]

    def open(self, welcome: Welcome) -> None:
        """The server's answer to the hello."""
        with self._lock:
            if welcome.term != self._last_term:
                self._held.seen = 0
            self._last_term = welcome.term
            self._infos = {info.number: info for info in welcome.segments}
            self.epoch += 1
            self.index = welcome.index
            self.term = welcome.term

    # --- segments -------------------------------------------------------------------------------------------------

    def info(self, number: int) -> SegmentInfo | None:
        return self._infos.get(number)

    def infos(self) -> list[SegmentInfo]:
        with self._lock:
            return list(self._infos.values())

    def learn(self, term: int, infos: Sequence[SegmentInfo]) -> None:
        with self._lock:
            if term == self.term:
                self._learn(infos)

    def forget(self, number: int) -> SegmentInfo | None:
        with self._lock:
            return self._infos.pop(number, None)

    # --- leases ---------------------------------------------------------------------------------------------------

    def leased(self, term: int, lease: int) -> bool:
        """Whether the lease is of the present term; one of another term is none."""
        if not lease:
            return term == self.term != 0
        with self._lock:
            if not term or term != self.term:
                return False
            self._held.leases.add(lease)
            return True

    def acquired(self, reply: Placements) -> Acquired | None:
        """``None`` when the reply is of another term."""
        with self._lock:
            if not reply.term or reply.term != self.term:
                return None
            if reply.lease:
                self._held.leases.add(reply.lease)
            self._learn(reply.segments)
            placements = np.frombuffer(reply.placements, dtype=PLACEMENT_DTYPE)
            return Acquired(reply.lease, placements, self._named(placements))

    def found(self, term: int, placements: bytes, name: int) -> Acquired | None:
        """A run that was read in shared memory, under a lease that is asked for by a name of our own (0: none, of an empty run).

        Such a lease is told from one that the server has granted by its sign: names of our own are answered below zero.

        ``None`` when the term has changed, a segment is not known here, or its memory goes with its donor (CUDA IPC): that donor
        frees it once the leases it knows of have ended, so the server must have granted one first.
        """
        rows = np.frombuffer(placements, dtype=PLACEMENT_DTYPE)
        with self._lock:
            if term != self.term:
                return None
            infos = self._named(rows)
            are_known = all(number in infos for number in rows["segment"].tolist())
            if not are_known or not all(map(self._outlives_its_donor, infos.values())):
                return None
            if name:
                self._held.leases.add(-name)
            return Acquired(-name, rows, infos)

    def leased_as(self, name: int) -> int:
        """What to call a lease that is asked for under a name of our own."""
        with self._lock:
            self._held.leases.add(-name)
        return -name

    def released(self, lease: int) -> bool:
        """Whether it was held in this term, and so is to be given back."""
        with self._lock:
            if lease not in self._held.leases:
                return False
            self._held.leases.discard(lease)
            return True

    # --- grants and evidence --------------------------------------------------------------------------------------

    def granted(self, request: Reserve, reply: Grants, keys: int) -> Granted | None:
        """Takes the grants: they are outstanding from here on. ``None`` when the reply is of another term.

        Of ``keys`` keys, those that the request did not ask for are declined.
        """
        placements = np.frombuffer(reply.placements, dtype=PLACEMENT_DTYPE)
        with self._lock:
            self._saw(reply.term, placements)
            if not reply.term or reply.term != self.term:
                return None
            self._learn(reply.segments)
            infos = self._named(placements)
            at = [index for index, outcome in enumerate(reply.outcomes) if outcome == Outcome.GRANTED]
            for index, row in zip(at, placements.tolist(), strict=True):
                number, record, generation, offset, nbytes = row
                if number not in infos:
                    continue  # nobody can write there: its caller gives it back
                start = index * KEY_BYTES
                self._held.outstanding[generation] = Reservation(
                    segment_id=infos[number].segment_id,
                    incarnation=infos[number].incarnation,
                    record=record,
                    generation=generation,
                    key=request.keys[start : start + KEY_BYTES],
                    parent=request.keys[start - KEY_BYTES : start] if index and request.chained else request.parent,
                    rank=request.rank,
                    ranks=request.ranks,
                    tenant=request.tenant,
                    offset=offset,
                    nbytes=nbytes,
                    tokens=request.tokens,
                    ttl_s=request.ttl_s,
                )
            outcomes = reply.outcomes.ljust(keys, bytes([Outcome.DECLINED]))
            return Granted(outcomes, placements, infos)

    def allocated(self, request: Allocate, reply: Grants) -> Granted | None:
        """As ``granted``, of space that has no keys yet."""
        placements = np.frombuffer(reply.placements, dtype=PLACEMENT_DTYPE)
        with self._lock:
            self._saw(reply.term, placements)
            if not reply.term or reply.term != self.term:
                return None
            self._learn(reply.segments)
            infos = self._named(placements)
            for number, record, generation, offset, nbytes in placements.tolist():
                if number in infos:
                    self._held.outstanding[generation] = Reservation(
                        segment_id=infos[number].segment_id,
                        incarnation=infos[number].incarnation,
                        record=record,
                        generation=generation,
                        key=bytes(KEY_BYTES),
                        parent=b"",
                        rank=0,
                        ranks=1,
                        tenant=request.tenant,
                        offset=offset,
                        nbytes=nbytes,
                        tokens=0,
                        ttl_s=0,
                    )
            return Granted(reply.outcomes, placements, infos)

    def assigned(self, request: Assign, reply: Grants) -> bytes | None:
        """An ``Outcome`` byte for each; a hello names those granted by their keys from here on."""
        with self._lock:
            if not reply.term or reply.term != self.term:
                return None
            parent = request.parent
            for at, (generation, outcome) in enumerate(zip(request.generations, reply.outcomes, strict=True)):
                key = request.keys[at * KEY_BYTES : (at + 1) * KEY_BYTES]
                if outcome == Outcome.GRANTED:
                    held = self._held.outstanding[generation]
                    self._held.outstanding[generation] = replace(held, key=key, parent=parent)
                parent = key
            return reply.outcomes

    def unwanted(self, reply: Grants) -> list[int]:
        """A reply that nobody waits for any more: nothing of it was touched. What to abort of it at once."""
        placements = np.frombuffer(reply.placements, dtype=PLACEMENT_DTYPE)
        with self._lock:
            self._saw(reply.term, placements)
            return placements["generation"].tolist() if reply.term == self.term else []

    @property
    def room(self) -> int:
        """How many more grants a hello could name."""
        return self._max_named - len(self._held.outstanding)

    def committed(self, generations: Iterable[int]) -> None:
        """Their records are committed in memory. A hello does not name them any more; heartbeats do until the server is told."""
        with self._lock:
            self._held.untold.update(self._held.outstanding.keys() & set(generations))

    def settled(self, generations: Iterable[int]) -> None:
        """Their writer has stopped, and the server was told so or will miss them among what is outstanding."""
        with self._lock:
            for generation in generations:
                self._held.outstanding.pop(generation, None)
                self._held.untold.discard(generation)

    def untold(self) -> list[int]:
        """Generations committed in memory that the server is still to be told of."""
        with self._lock:
            return list(self._held.untold)

    def evidence(self) -> tuple[int, list[int]]:
        """(highest generation seen in this term, generations outstanding), for a heartbeat."""
        with self._lock:
            return self._held.seen, list(self._held.outstanding)

    @property
    def is_writing(self) -> bool:
        """Whether a writer may still be at work."""
        with self._lock:
            return not self._held.outstanding.keys() <= self._held.untold

    def _outlives_its_donor(self, info: SegmentInfo) -> bool:
        """Whether a mapping of this segment can be read whatever its donor does, and the segment is mapped, being this host's."""
        return info.host == self._host and (is_host(info.device) or not info.handle.startswith(IPC))

    def _saw(self, term: int, placements: PlacementArray) -> None:
        if term == self._last_term and len(placements):
            self._held.seen = max(self._held.seen, int(placements["generation"].max()))

    def _learn(self, infos: Sequence[SegmentInfo]) -> None:
        for info in infos:
            self._infos[info.number] = info

    def _named(self, placements: PlacementArray) -> dict[int, SegmentInfo]:
        numbers = set(placements["segment"].tolist())
        return {number: info for number in numbers if (info := self._infos.get(number)) is not None}
