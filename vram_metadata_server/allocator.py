"""Which bytes of a segment are free: best fit, neighbours merged, in the server's memory only.

Free extents are kept by start, by end and by size. There are few distinct sizes (k of them need k²/2 units of space), so
finding the best fit is a bisection over a short list. Mooncake's and jemalloc's size bins were the other choice; best fit
keeps the utilisation at the first eviction higher for the few payload sizes a pool sees.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable
from typing import Final

ALIGNMENT: Final = 4096


class OverlapError(Exception):
    """Two extents that should both be in use share bytes."""


def round_up(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


class ExtentAllocator:
    """The free space between ``begin`` and ``end`` of one segment. Sizes are rounded up to ``ALIGNMENT``."""

    def __init__(self, begin: int, end: int) -> None:
        self.begin = round_up(begin)
        self.end = end // ALIGNMENT * ALIGNMENT
        self.total_bytes = max(0, self.end - self.begin)
        self.free_bytes = 0
        self._size_at: dict[int, int] = {}  # start of a free extent -> its size
        self._start_of: dict[int, int] = {}  # its end -> its start
        self._starts: dict[int, set[int]] = {}  # size -> starts of the free extents of that size
        self._sizes: list[int] = []  # the distinct sizes, ascending
        if self.total_bytes:
            self._add(self.begin, self.total_bytes)

    @classmethod
    def around(cls, begin: int, end: int, used: Iterable[tuple[int, int]]) -> ExtentAllocator:
        """An allocator in which the extents ``used`` (offset, nbytes) are taken. Raises ``OverlapError``."""
        allocator = cls(begin, end)
        for start in list(allocator._size_at):
            allocator._take(start)
        at = allocator.begin
        for offset, nbytes in sorted(used):
            if offset < at or offset + nbytes > allocator.end:
                raise OverlapError(f"the extent at {offset} of {nbytes} bytes overlaps another or leaves the segment")
            if offset > at:
                allocator._add(at, offset - at)
            at = offset + round_up(nbytes)
        if at < allocator.end:
            allocator._add(at, allocator.end - at)
        return allocator

    @property
    def largest_free_bytes(self) -> int:
        return self._sizes[-1] if self._sizes else 0

    def allocate(self, nbytes: int) -> int | None:
        """The offset of a free extent, now taken; None when no free extent is large enough."""
        wanted = round_up(nbytes)
        at = bisect_left(self._sizes, wanted)
        if at == len(self._sizes):
            return None
        size = self._sizes[at]
        starts = self._starts[size]
        start = starts.pop()  # any of them: equal holes are equally good
        if not starts:
            del self._starts[size], self._sizes[at]
        del self._size_at[start]
        self.free_bytes -= wanted
        if size == wanted:
            del self._start_of[start + size]
        else:  # the rest ends where the hole did
            self._list(start + wanted, size - wanted)
        return start

    def free(self, offset: int, nbytes: int) -> None:
        """Gives back what ``allocate`` (or ``around``) took, merging it with free neighbours."""
        size = round_up(nbytes)
        below = self._start_of.get(offset)
        if below is not None:
            size += self._take(below)
            offset = below
        if offset + size in self._size_at:
            size += self._take(offset + size)
        self._add(offset, size)

    def free_extents(self) -> list[tuple[int, int]]:
        """All free extents (offset, size), by offset."""
        return sorted(self._size_at.items())

    def check_integrity(self) -> None:
        """Raises ``AssertionError`` unless the three views of the free space agree and no neighbours are unmerged."""
        extents = self.free_extents()
        assert sum(size for _, size in extents) == self.free_bytes
        assert {start + size: start for start, size in extents} == self._start_of
        assert sorted(self._starts) == self._sizes
        assert {(start, size) for size, starts in self._starts.items() for start in starts} == set(extents)
        at = self.begin - 1
        for start, size in extents:
            assert start > at, "free extents touch or overlap"
            assert size > 0 and start % ALIGNMENT == 0 and size % ALIGNMENT == 0
            at = start + size
        assert at <= self.end

    def _add(self, start: int, size: int) -> None:
        self.free_bytes += size
        self._list(start, size)

    def _list(self, start: int, size: int) -> None:
        self._size_at[start] = size
        self._start_of[start + size] = start
        starts = self._starts.get(size)
        if starts is None:
            self._starts[size] = {start}
            insort(self._sizes, size)
        else:
            starts.add(start)

    def _take(self, start: int) -> int:
        size = self._size_at.pop(start)
        self.free_bytes -= size
        del self._start_of[start + size]
        starts = self._starts[size]
        starts.remove(start)
        if not starts:
            del self._starts[size]
            del self._sizes[bisect_left(self._sizes, size)]
        return size
