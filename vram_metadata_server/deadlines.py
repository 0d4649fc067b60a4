"""Names in the order of their deadlines: one heap, lazily cleaned, that cannot be made to grow.

A deadline that was moved or called off stays in the heap until it comes due or the heap is swept: ``current`` says which
items still count. vLLM's reapers stopped at the head of a queue that was not in order (vLLM #58222, #50789); a heap is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from heapq import heapify, heappop, heappush
from typing import Any, Final, Generic, Protocol, TypeVar

_SLACK: Final = 1024


class Comparable(Protocol):
    def __lt__(self, other: Any, /) -> bool: ...


Name = TypeVar("Name", bound=Comparable)


class Deadlines(Generic[Name]):
    """``current(name)`` answers the deadline that counts for a name, or None when there is none any more."""

    def __init__(self, current: Callable[[Name], float | None]) -> None:
        self._current = current
        self._heap: list[tuple[float, Name]] = []
        self._sweep_at = _SLACK

    def push(self, deadline: float, name: Name) -> None:
        heappush(self._heap, (deadline, name))
        if len(self._heap) > self._sweep_at:
            self._heap = [item for item in set(self._heap) if self._current(item[1]) == item[0]]
            heapify(self._heap)
            self._sweep_at = 2 * len(self._heap) + _SLACK

    def due(self, now: float) -> Iterator[Name]:
        """The names whose deadline is ``now`` or earlier, each taken off; the caller ends them before it goes on."""
        while self._heap and self._heap[0][0] <= now:
            deadline, name = heappop(self._heap)
            if self._current(name) == deadline:
                yield name

    def covers(self, name: Name, deadline: float) -> bool:
        """Whether the deadline is in the heap (slow; for integrity checks)."""
        return (deadline, name) in self._heap


class Expiries:
    """A deadline per key, for keys that have one: chunks with a time to live, chunks that are not complete."""

    def __init__(self) -> None:
        self._deadline_of: dict[bytes, float] = {}
        self._deadlines: Deadlines[bytes] = Deadlines(self._deadline_of.get)

    def __len__(self) -> int:
        return len(self._deadline_of)

    def __contains__(self, key: bytes) -> bool:
        return key in self._deadline_of

    def set(self, key: bytes, deadline: float) -> None:
        self._deadline_of[key] = deadline
        self._deadlines.push(deadline, key)

    def drop(self, key: bytes) -> None:
        self._deadline_of.pop(key, None)

    def due(self, now: float) -> Iterator[bytes]:
        """Keys whose deadline has passed, each forgotten."""
        for key in self._deadlines.due(now):
            del self._deadline_of[key]
            yield key
