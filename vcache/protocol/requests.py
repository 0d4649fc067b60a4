"""What clients and donors send to the metadata server."""

from __future__ import annotations

from typing import Annotated, Final

import msgspec

from vcache.protocol.fields import (
    MAX_ITEMS_PER_PAGE,
    U32,
    U63,
    Announced,
    Generations,
    HostId,
    KeyBlob,
    Label,
    Numbers,
    ParentKey,
    Rank,
    Ranks,
    RecordInfo,
    Request,
    Reservation,
    RetireItem,
    Seconds,
    SegmentId,
    Sessions,
    Tier,
)


class Hello(Request, tag=1):
    """Opens or renews a session. ``outstanding``: every reservation whose record is not committed in memory yet, of any term.

    What is committed but was not told (or told to a server that is gone) is left out: the donor's scan finds it. Were it
    claimed, and had it been found, evicted and retired under an earlier term, its commit would bring back what is not there.

    Under an unchanged term the server knows them already, and absence from the list settles nothing (a grant may be on its
    way); only a heartbeat's ``seen`` does.
    """

    version: U32
    host: HostId
    name: Label
    device: Label
    writes: bool
    outstanding: Annotated[list[Reservation], msgspec.Meta(max_length=MAX_ITEMS_PER_PAGE)]


class Heartbeat(Request, tag=2):
    """Keeps the session alive and carries evidence, level-triggered.

    ``seen`` is the highest generation the client was ever granted in this term, used or not; every reservation of this
    session up to it, and every one it said in its hello, that is not in ``outstanding`` is settled: its writer has stopped
    touching the extent. A commit may still be on its way by the other socket, so a live one is kept until its deadline.
    """

    attached: Numbers  # segments this client has mapped (told again of all others as they come up)
    seen: U63
    outstanding: Generations
    dead: Sessions  # sessions this donor has proven dead (it could take their flock)


class Goodbye(Request, tag=3):
    """Ends a session cleanly: nothing of it is outstanding any more."""


class RegisterSegment(Request, tag=4):
    """Gives a segment to the pool. ``attached``: live writers of this host that may hold grants in this memory.

    Answered with the same number when sent again with the same incarnation. Each time, the donor scans its directory only
    after the answer, and hands over what it finds: what a writer did before it said hello under this term, unknown to the
    server, is seen by a scan that begins after that hello. A donor that was dropped while it lived (it is told
    ``UNKNOWN_SESSION``, or finds that it went without a heartbeat for ``liveness_s``) first retires all committed records and
    takes the next incarnation: some of them may have been removed.
    """

    segment_id: SegmentId
    incarnation: U63
    tier: Tier
    device: Label
    nbytes: U63
    data_offset: U63
    records: U32
    handle: Annotated[bytes, msgspec.Meta(max_length=1024)]
    label: Label
    attached: Sessions
    remote: Announced = b""  # said again with another value, readers are told of the new one
    spills: bool = False  # whether its donor writes to the store what it is ordered to
    pulls: bool = False  # whether its donor copies from other hosts what it is ordered to


class Handover(Request, tag=5):
    """A page of a registered segment's records; ``last`` ends it. A fresh segment sends one empty last page.

    Answered with ``Done`` (records taken); a page sent twice is harmless.
    """

    number: U32
    items: Annotated[list[RecordInfo], msgspec.Meta(max_length=MAX_ITEMS_PER_PAGE)]
    last: bool


class Retired(Request, tag=6):
    """A donor retired these records in memory: records and extents are free."""

    number: U32
    items: Annotated[list[RetireItem], msgspec.Meta(max_length=MAX_ITEMS_PER_PAGE)]


class DrainSegment(Request, tag=7):
    """The donor wants its segment back: no new grants or leases in it; answered when its last lease ended."""

    number: U32


class Lookup(Request, tag=8):
    """Length of the leading run of chunks present with all ranks' shards; with ``lease_s`` > 0 that run is leased."""

    keys: KeyBlob
    lease_s: Seconds


class Locate(Request, tag=24):
    """Which of these chunks are present with all ranks' shards, wherever; with ``lease_s`` > 0 those are leased."""

    keys: KeyBlob
    lease_s: Seconds


class LeaseRun(Request, tag=25):
    """Leases the leading run of these chunks that is present (one-way). The lease has this request's id for a name.

    ``is_read``: the first rank's shards, which the reader knows from shared memory, are being read; a release may say what of it
    did not validate.
    """

    keys: KeyBlob
    lease_s: Seconds
    is_read: bool = False


class Acquire(Request, tag=9):
    """The leading run as in ``Lookup``, leased, with one placement of ``rank``'s shard for each chunk of it."""

    keys: KeyBlob
    rank: Rank
    lease_s: Seconds


class Release(Request, tag=10):
    """Ends a lease (one-way). ``invalid``: generations whose record did not validate: those of them that the lease covers, and that
    are still placed there, are dropped.

    ``lease``: as the server said it; or, with ``is_named``, the id of the ``LeaseRun`` that asked for it.
    """

    lease: U63
    invalid: Generations
    is_named: bool = False


class Reserve(Request, tag=11):
    """Space for one rank's shards of a run of chunks; ``parent`` is the key before the first (empty at a prompt's start).

    With neither ``into`` nor ``into_tier`` a shard that the pool has anywhere ``EXISTS``, and the server chooses a segment of
    the writer's host. With one of them (or both: both hold) the space is for a **copy**: it is in the segment of number
    ``into``, or in a segment of the writer's host whose tier is ``into_tier``. A shard that is there already, or being written
    there, ``EXISTS``; one that the pool has elsewhere is ``GRANTED`` or has ``NO_SPACE``; one that the pool has nowhere is
    ``DECLINED``, as is a segment that is not the writer's host's, not serving, or too small.

    The commit adds a placement to the shard. Whoever copies commits only what the source's record still proves *after* the
    copy. Removing the chunk meanwhile ends the reservation, and is answered only when the copy, too, is gone from memory.
    """

    keys: KeyBlob
    parent: ParentKey
    rank: Rank
    ranks: Ranks
    nbytes: U63  # of each payload
    tokens: U32  # of each chunk
    tenant: U63
    ttl_s: U32  # 0 = until evicted
    pin_s: Seconds
    into: U32 = 0  # a segment's number; 0 = not said
    into_tier: Tier | None = None
    chained: bool = True  # false: no run, each has ``parent`` before it, or nothing


class Allocate(Request, tag=22):
    """Space in a segment of one's own for ``count`` payloads whose keys are not known yet; ``Assign`` gives them keys.

    Answered with ``Grants``: an outcome for each, ``GRANTED``, ``NO_SPACE`` or ``DECLINED``. No key is taken and no deadline runs;
    record and extent come back as any reservation's do, by ``Abort`` or other evidence that the writer has stopped.
    """

    number: U32
    count: Annotated[int, msgspec.Meta(ge=1, le=MAX_ITEMS_PER_PAGE)]
    nbytes: U63  # of each payload
    tenant: U63


class Assign(Request, tag=23):
    """What is in these allocations: a run of chunks of one rank, whose first has ``parent`` before it, as in ``Reserve``.

    Answered with ``Grants`` without placements. ``GRANTED``: it is a reservation under that key from now on, with its deadline, and
    its writer marks the record, commits it in memory and says so. ``EXISTS``: the pool has that chunk, or somebody writes it;
    ``DECLINED``: the allocation is not there, or of an earlier incarnation. Both stay allocated as they were.
    """

    generations: Generations
    keys: KeyBlob  # one for each
    parent: ParentKey


class Commit(Request, tag=12):
    """These records are committed in memory (one-way). Also the evidence that their writer has stopped."""

    generations: Generations


class Abort(Request, tag=13):
    """These reservations are given up, their writer has stopped touching them (one-way)."""

    generations: Generations


class Touch(Request, tag=14):
    """Counts as a use for eviction (one-way)."""

    keys: KeyBlob


class Pin(Request, tag=15):
    """Keeps present chunks from eviction for ``pin_s`` seconds; answers how many."""

    keys: KeyBlob
    pin_s: Seconds


class Unpin(Request, tag=16):
    """Ends pins before their time; answers how many."""

    keys: KeyBlob


class Remove(Request, tag=17):
    """Removes chunks; answered once every record is retired in memory (or its donor is dead): removed means gone."""

    keys: KeyBlob


class Clear(Request, tag=18):
    """Removes every chunk of ``tenant`` (all chunks when ``everything``); answered as ``Remove`` is."""

    tenant: U63
    everything: bool


class Stats(Request, tag=19):
    """Asks for the server's state. Needs no session: ``session`` and ``term`` may be zeros."""


class Demoted(Request, tag=20):
    """A donor carried out an order to demote (one-way, by the socket of its commits: a copy's ``Commit`` comes before it).

    ``done``: generations whose payload lies below now; the server retires their records, in its own time. ``failed``: those it
    could not demote, or that were no longer there. It goes on trying what is in neither for as long as it is ordered to.
    """

    number: U32
    done: Generations
    failed: Generations


class Pulled(Request, tag=21):
    """A donor carried out an order to pull into its segment ``number`` (one-way, as ``Demoted`` is).

    ``done``: generations, of the sources, whose copy is committed in the segment; ``failed``: those that were no longer there,
    or for which it has no room. What is in neither was not delivered: it is ordered again with each heartbeat, up to a
    deadline.
    """

    number: U32
    done: Generations
    failed: Generations


AnyRequest = (
    Hello
    | Heartbeat
    | Goodbye
    | RegisterSegment
    | Handover
    | Retired
    | DrainSegment
    | Lookup
    | Locate
    | LeaseRun
    | Acquire
    | Release
    | Reserve
    | Commit
    | Abort
    | Touch
    | Pin
    | Unpin
    | Remove
    | Clear
    | Stats
    | Demoted
    | Pulled
    | Allocate
    | Assign
)

#: Requests that never get a reply, not even an error.
ONE_WAY: Final = (LeaseRun, Release, Commit, Abort, Touch, Demoted, Pulled)
