"""Extents of this process's own segment that are filled before it is known which chunk is in them.

For engines that ask for memory first and say later what they put there. An extent is the caller's from ``take`` until he stores it
or gives it back; nobody else finds or touches it. Storing it copies nothing: the server gives it its key, the record is marked and
committed. Spare extents are kept at hand, so that most takes ask nobody.
"""

from __future__ import annotations

import threading
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Final, NamedTuple

import numpy as np

from vcache import protocol
from vcache.keys import ChunkKey
from vcache.memory.base import WordArray
from vcache.pool.client import PoolClient
from vcache.pool.donor import Donor
from vcache.pool.records import RECORD_WORDS, RunFields, key_words, pack
from vcache.protocol import KEY_BYTES, MAX_ITEMS_PER_PAGE, Grants, Outcome

#: So many extents of a size are asked for at once, and kept at hand; or as many as were last stored at once.
AT_ONCE: Final = 32
#: No more than this fraction of the segment lies idle at hand.
_SPARE_FRACTION: Final = 1 / 8


class Extent(NamedTuple):
    """Space in the segment that this process may fill."""

    generation: int
    record: int
    offset: int
    nbytes: int
    incarnation: int


class Filled(NamedTuple):
    """An extent with a chunk in it. ``layout``: the record's layout word; ``tokens``: how many the chunk has."""

    extent: Extent
    key: ChunkKey
    layout: int
    tokens: int


class OwnSpace:
    """Thread-safe. Never raises because something is unavailable. ``close`` it before its donor."""

    def __init__(self, client: PoolClient, donor: Donor, *, tenant: int) -> None:
        self._client = client
        self._donor = donor
        self._tenant = tenant
        self._lock = threading.Lock()
        self._spare: defaultdict[int, list[Extent]] = defaultdict(list)  # by size
        self._most_spare_bytes = int(donor.segment.nbytes * _SPARE_FRACTION)
        self._spare_bytes = 0
        self._closed = False

    def take(self, nbytes: int) -> Extent | None:
        """An extent of so many bytes; ``None`` when the segment has none free now."""
        return self._take_spare(nbytes) or (self._take_spare(nbytes) if self.restock(nbytes) else None)

    def restock(self, nbytes: int, count: int = AT_ONCE) -> bool:
        """Has so many extents of this size at hand, if they are to be had; whether there are any. One round trip, or none."""
        with self._lock:
            found = len(self._spare[nbytes])
            if self._closed:
                return False
        wanted = max(1, min(count, MAX_ITEMS_PER_PAGE, self._most_spare_bytes // nbytes)) - found
        if wanted <= 0:
            return True
        number, incarnation = self._donor.number, self._donor.segment.incarnation
        if not number or self._client.session.room < wanted:
            return bool(found)
        sent: list[protocol.Allocate] = []

        def make(id_: int, session: bytes, term: int) -> protocol.Allocate:
            sent.append(protocol.Allocate(id_, session, term, number, wanted, nbytes, self._tenant))
            return sent[0]

        granted = self._client.ask(Grants, make, lambda reply: self._client.session.allocated(sent[0], reply))
        if granted is None:
            return bool(found)
        rows = granted.placements.tolist()
        self._keep(
            [Extent(generation, record, offset, size, incarnation) for _, record, generation, offset, size in rows]
        )
        return bool(found or rows)

    def give_back(self, extents: Sequence[Extent]) -> None:
        """Their caller touches them no more. Nothing was stored in them."""
        self._keep(extents)

    def give_up(self, extents: Sequence[Extent]) -> None:
        """As ``give_back``, when they were to be stored and are not: the server may have given them keys already."""
        self._client.abort([extent.generation for extent in extents])

    def store(self, filled: Sequence[Filled], parent: bytes = b"") -> list[Outcome]:
        """Makes them chunks of the pool: consecutive ones of a prompt, the first with ``parent`` before it. One round trip.

        Whoever filled them has called the segment's ``fence`` in the thread that did. What is ``GRANTED`` is committed, in memory,
        too, and its extent the pool's; the others are the caller's to ``give_up``.
        """
        if not filled:
            return []
        generations = [one.extent.generation for one in filled]
        keys = b"".join([one.key for one in filled])
        sent: list[protocol.Assign] = []

        def make(id_: int, session: bytes, term: int) -> protocol.Assign:
            sent.append(protocol.Assign(id_, session, term, generations, keys, parent))
            return sent[0]

        said = self._client.ask(Grants, make, lambda reply: self._client.session.assigned(sent[0], reply))
        if said is None:
            return [Outcome.DECLINED] * len(filled)
        outcomes = [Outcome(outcome) for outcome in said]
        declined = [generations[at] for at, outcome in enumerate(outcomes) if outcome is Outcome.DECLINED]
        if declined:  # they were granted before somebody cleared the pool, and so was what is at hand and older
            self._client.abort([extent.generation for extent in self._drop_spare(max(declined))])
        committed: list[int] = []
        rows = self._rows(filled, keys, parent)
        segment = self._donor.segment
        granted = [at for at, outcome in enumerate(outcomes) if outcome is Outcome.GRANTED]
        records = [filled[at].extent.record for at in granted]
        segment.mark(records, rows[granted])  # one that is not free cannot be committed either
        for at, is_committed in zip(granted, segment.commit(records, [generations[at] for at in granted]), strict=True):
            if is_committed:
                committed.append(generations[at])
            else:
                outcomes[at] = Outcome.DECLINED
        self._client.commit(committed)
        return outcomes

    def renew(self) -> None:
        """Has other extents at hand, as many: after a clear none that was granted before is given a key."""
        dropped = self._drop_spare()
        self._client.abort([extent.generation for extent in dropped])
        for nbytes, count in Counter(extent.nbytes for extent in dropped).items():
            self.restock(nbytes, count)

    def close(self) -> None:
        """Gives back what is at hand. Extents that are taken still come back when they are stored or given back."""
        with self._lock:
            self._closed = True
        self._client.abort([extent.generation for extent in self._drop_spare()])

    def _drop_spare(self, up_to: int | None = None) -> list[Extent]:
        """What was at hand, of generations no higher than this."""
        dropped: list[Extent] = []
        with self._lock:
            for extents in self._spare.values():
                dropped += [extent for extent in extents if up_to is None or extent.generation <= up_to]
                extents[:] = [extent for extent in extents if up_to is not None and extent.generation > up_to]
            self._spare_bytes -= sum(extent.nbytes for extent in dropped)
        return dropped

    def _take_spare(self, nbytes: int) -> Extent | None:
        incarnation = self._donor.segment.incarnation
        stale: list[int] = []
        found: Extent | None = None
        with self._lock:
            spare = self._spare[nbytes]
            while spare and found is None:
                extent = spare.pop()
                self._spare_bytes -= nbytes
                if extent.incarnation == incarnation:
                    found = extent
                else:  # nothing can be committed there any more
                    stale.append(extent.generation)
        self._client.abort(stale)
        return found

    def _keep(self, extents: Iterable[Extent]) -> None:
        surplus: list[int] = []
        with self._lock:
            for extent in extents:
                is_wanted = (
                    self._spare_bytes + extent.nbytes <= self._most_spare_bytes or not self._spare[extent.nbytes]
                )
                if self._closed or not is_wanted:
                    surplus.append(extent.generation)
                else:
                    self._spare[extent.nbytes].append(extent)
                    self._spare_bytes += extent.nbytes
        self._client.abort(surplus)

    def _rows(self, filled: Sequence[Filled], keys: bytes, parent: bytes) -> WordArray:
        """Their records, ``[n, 16]``."""
        words = key_words(keys)
        parents = key_words((parent or bytes(KEY_BYTES)) + keys[:-KEY_BYTES])
        extents = [one.extent for one in filled]
        offsets, nbytes, generations = (
            np.array(column, dtype=np.uint64)
            for column in zip(*((e.offset, e.nbytes, e.generation) for e in extents), strict=True)
        )
        rows = np.empty((len(filled), RECORD_WORDS), dtype=np.uint64)
        start = 0
        for (tokens, layout), of_form in groupby(filled, lambda one: (one.tokens, one.layout)):
            run = slice(start, start + len(list(of_form)))
            rows[run] = pack(
                RunFields(self._tenant, rank=0, ranks=1, tokens=tokens, layout=layout),
                keys=words[run],
                parents=parents[run],
                offsets=offsets[run],
                nbytes=nbytes[run],
                generations=generations[run],
            )
            start = run.stop
        return rows
