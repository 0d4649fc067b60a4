"""The states of the protocol's model: what every process knows, and which rules are in force."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

FREE = 0


@dataclass(frozen=True)
class Variant:
    """How large the world is, how often what goes wrong may go wrong, and which rules hold (all, by default)."""

    keys: tuple[str, ...] = ("A", "B")  # one writer each
    copied: tuple[str, ...] = ()  # one copier each: it copies that chunk within the pool, as demotion and promotion do
    pulled: tuple[str, ...] = ()  # one puller each: it reads that chunk before it reserves space for a copy of it
    late: tuple[str, ...] = ()  # one writer each, of the donor's process: it fills its extent before that has a key
    reads_in_place: bool = False  # the reader is the donor's process
    records: int = 2
    cells: int = 1
    evictions: int = 1
    removals: int = 0
    restarts: int = 1
    kills: int = 1
    silences: int = 0  # how often the donor is dropped because it was silent, though it lives
    # The rules. Each is False in some test that shows what it is for.
    extents_return_on_evidence: bool = True  # rule 4; otherwise when the deadline has passed
    gate_waits_for_writers: bool = True  # rule 5; otherwise only for the last page of the handover
    scans_after_hellos: bool = True  # a handover that began before the last hello is repeated before the gate opens
    retires_before_reuse: bool = True  # rule 3; otherwise an evicted extent may be granted at once
    answers_removals_late: bool = True  # "removed means gone"; otherwise answered before memory says so
    validates_after_copy: bool = True  # rule 2
    heartbeats_say_seen: bool = True  # otherwise absence settles also a grant that is still on its way
    claims_only_unfinished: bool = True  # a hello leaves out what is committed in memory; otherwise claims that, too
    copies_check_their_source: bool = True  # after the copy; otherwise what was copied is committed as it is
    removals_call_off_writes: bool = True  # otherwise a write under way of what is removed is committed as any other
    removals_wait_for_gates: bool = True  # otherwise for the last page of the handover only
    holds_keep_records: bool = True  # what the donor's process reads in place is not retired; otherwise it is
    retires_on_return: bool = True  # a donor dropped for silence retires all and takes a new incarnation; otherwise not


class Record(NamedTuple):
    generation: int  # 0 = free, odd = a writer at work, even = committed
    key: str
    cell: int


class Writer(NamedTuple):
    """``at``: idle, asked (grant on its way), granted, marked, (copied,) written, committed, sent (commit on its way), done.

    A late writer is granted, filled, naming (its key on its way), named, marked, committed, and so on.
    A puller is idle, ordered (to pull its source), staged (has the payload), proven (the record said that it is the chunk's), and then asked, and so on.
    """

    at: str
    key: str
    term: int  # of its last hello
    generation: int = 0
    record: int = -1
    cell: int = -1
    incarnation: int = 0
    is_alive: bool = True
    is_copier: bool = False
    source: Placement | None = None  # what a copier copies
    is_puller: bool = False  # a copier that reads first
    staged: str = ""  # what a puller has read
    is_late: bool = False

    @property
    def is_outstanding(self) -> bool:
        return self.at in ("granted", "filled", "naming", "named", "marked", "copied", "written", "committed")

    @property
    def claimed_key(self) -> str:
        """What a hello says of it: nothing as long as it has no key."""
        return "" if self.is_late and self.at in ("idle", "asked", "granted", "filled") else self.key

    @property
    def may_touch(self) -> bool:
        at_work = ("asked", "granted", "filled", "naming", "named", "marked", "copied", "written")
        return self.is_alive and self.at in at_work


class Reservation(NamedTuple):
    generation: int
    writer: int
    key: str
    record: int
    cell: int
    incarnation: int
    is_live: bool
    is_stopped: bool = False
    is_copy: bool = False


class Placement(NamedTuple):
    key: str
    record: int
    generation: int
    cell: int


class Retire(NamedTuple):
    record: int
    generation: int
    cell: int
    key: str


class Donor(NamedTuple):
    term: int  # of its registration
    incarnation: int = 1
    was_dropped: bool = False  # silent for too long: it knows, by its own clock or because the server says so
    pages: tuple[tuple[int, Record], ...] | None = None  # scanned, not yet handed over
    done: frozenset[Retire] = frozenset()  # retired in memory, not yet told


class Removal(NamedTuple):
    key: str
    waits: frozenset[int]  # generations that have to be gone from memory first
    awaits_gate: bool  # as long as that is closed, a writer or the handover may bring more of them
    gone: frozenset[int]  # every generation of the key that was granted before: what the answer promises


class Server(NamedTuple):
    term: int = 1
    next_generation: int = 2
    entries: frozenset[Placement] = frozenset()
    reservations: frozenset[Reservation] = frozenset()
    retiring: frozenset[Retire] = frozenset()
    incarnation: int = 0  # of the registered segment; 0 = none is
    is_settled: bool = False  # at the registration every attached writer had said hello
    is_handed_over: bool = False
    is_open: bool = False
    waiting: frozenset[int] = frozenset()  # attached writers without a hello in this term
    retired: frozenset[int] = frozenset()  # generations retired since the registration, while the gate is closed
    known: frozenset[int] = frozenset()  # writers that said hello in this term
    removal: Removal | None = None  # under way
    removed_below: tuple[str, int] | None = None  # what a later handover or claim may not bring back


class Reader(NamedTuple):
    at: str = "idle"  # idle, acquired, (checked,) copied, served; in place: idle, acquired, held, reading, served
    placement: Placement | None = None
    copied: str = ""


class State(NamedTuple):
    records: tuple[Record, ...]
    cells: tuple[str, ...]
    writers: tuple[Writer, ...]
    donor: Donor
    server: Server
    reader: Reader
    evictions: int
    removals: int
    restarts: int
    kills: int
    silences: int
    gone: frozenset[int] = frozenset()  # generations whose removal was answered


Steps = Iterator[tuple[str, State]]
