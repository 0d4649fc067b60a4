"""What the workers of a chaos run tell each other: which chunks were removed, and how much was done. Survives their deaths.

A file that all of them map. Each word or byte has one writer, so nobody needs a lock.
"""

from __future__ import annotations

import mmap
from enum import IntEnum
from pathlib import Path

VERSIONS = 8192  # of a slot; each is stored at most once, by the slot's only writer
CHUNKS = 4  # of a run, at most
SLOTS = 3  # of each thread


class Count(IntEnum):
    """What a thread has done so far."""

    STORED = 0  # chunks
    VERIFIED = 1  # chunks read of which every byte was compared
    REMOVED = 2  # chunks whose removal was acknowledged
    MISSED = 3  # chunks asked for that were not there, or not valid any more
    UNWRITTEN = 4  # chunks that were not granted, or given up


class Board:
    """The shared table of ``threads`` writing threads."""

    def __init__(self, path: Path, threads: int) -> None:
        self.threads = threads
        self.slots = threads * SLOTS
        self._versions_at = 8 * len(Count) * threads
        self._removed_at = self._versions_at + 8 * self.slots
        nbytes = self._removed_at + self.slots * VERSIONS * CHUNKS
        with path.open("a+b") as file:
            file.truncate(nbytes)
            self._map = mmap.mmap(file.fileno(), nbytes)
        self._words = memoryview(self._map)[: self._removed_at].cast("Q")

    def add(self, thread: int, what: Count, amount: int) -> None:
        self._words[thread * len(Count) + what] += amount

    def total(self, what: Count) -> int:
        return sum(self._words[thread * len(Count) + what] for thread in range(self.threads))

    def version(self, slot: int) -> int:
        """The last version begun; 0 = none."""
        return self._words[self._versions_at // 8 + slot]

    def next_version(self, slot: int) -> int:
        """A version that nobody has ever stored. Only for the slot's writer."""
        version = self.version(slot) + 1
        assert version < VERSIONS, "the run is too long for its board"
        self._words[self._versions_at // 8 + slot] = version
        return version

    def mark_removed(self, slot: int, version: int, chunk: int) -> None:
        self._map[self._at(slot, version, chunk)] = 1

    def is_removed(self, slot: int, version: int, chunk: int) -> bool:
        return bool(self._map[self._at(slot, version, chunk)])

    def _at(self, slot: int, version: int, chunk: int) -> int:
        return self._removed_at + (slot * VERSIONS + version) * CHUNKS + chunk
