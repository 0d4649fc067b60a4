"""Where in its own segment this process has last seen a chunk: a guess that the record confirms, instead of a round trip.

The donor's memory is the truth about its segment: a record that is held and then says key and generation is that chunk, whatever the
server knows by now. What was evicted or removed is retired there, and is not found.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from vcache.keys import ChunkKey
from vcache.pool.donor import Donor
from vcache.pool.records import key_words


class OwnRecord(NamedTuple):
    """A committed record of the own segment, as it was seen."""

    record: int
    generation: int
    offset: int
    nbytes: int
    layout: int


class OwnRecords:
    """Thread-safe. Remembers no more chunks than the segment has records."""

    def __init__(self, donor: Donor) -> None:
        self._donor = donor
        self._lock = threading.Lock()
        self._seen: dict[ChunkKey, OwnRecord] = {}

    def saw(self, chunks: Iterable[tuple[ChunkKey, OwnRecord]]) -> None:
        """These were stored or read just now."""
        with self._lock:
            for key, found in chunks:
                self._seen.pop(key, None)
                self._seen[key] = found
            while len(self._seen) > self._donor.segment.records:
                del self._seen[next(iter(self._seen))]

    def hold(self, keys: Sequence[ChunkKey]) -> list[OwnRecord] | None:
        """All of these chunks, each with a hold on its record that the caller ends; ``None`` when one is not where it was seen."""
        try:
            found = [self._seen[key] for key in keys]
        except KeyError:
            return None
        holds, segment = self._donor.holds, self._donor.segment
        held = [one for one in found if holds.take(one.record)]
        if len(held) == len(found):
            records = np.array([one.record for one in found], dtype=np.int64)
            generations = np.array([one.generation for one in found], dtype=np.uint64)
            valid = segment.matches(records, generations, key_words(b"".join(keys)))
            if valid.all():
                return found
            with self._lock:
                for at in np.flatnonzero(~valid).tolist():
                    self._seen.pop(keys[at], None)
        for one in held:
            holds.release(one.record)
        return None
