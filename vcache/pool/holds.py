"""Records of this process's own segment that it reads in place: they are not retired while somebody looks at their bytes.

Space is free only when its donor has retired the record in memory. So a process that is the donor itself needs no copy and no clock
to read safely: it takes a hold, then validates the record, and from there on the bytes are that entry's until the hold ends. Who
only maps a segment cannot do this, and copies. A removal waits for holds as it waits for the retirement.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import TYPE_CHECKING

from vcache.protocol import RetireItem

if TYPE_CHECKING:
    from vcache.pool.segment import Segment


class Holds:
    """Of one segment. Thread-safe; never waits."""

    def __init__(self, segment: Segment) -> None:
        self._segment = segment
        self._lock = threading.Lock()
        self._held: dict[int, int] = {}  # record -> how often
        self._is_open = True

    def __len__(self) -> int:
        """Records that are held."""
        return len(self._held)

    def take(self, record: int) -> bool:
        """Holds a record, whatever is in it: validate it afterwards. False while the segment is between two incarnations."""
        with self._lock:
            if self._is_open:
                self._held[record] = self._held.get(record, 0) + 1
            return self._is_open

    def release(self, record: int) -> None:
        """Ends one hold."""
        with self._lock:
            left = self._held[record] - 1
            if left:
                self._held[record] = left
            else:
                del self._held[record]

    # --- the donor's ----------------------------------------------------------------------------------------------

    def retire(self, items: Iterable[RetireItem]) -> list[RetireItem]:
        """Retires the records that nobody holds; which. The server repeats its order for the others."""
        with self._lock:
            free = [item for item in items if item.record not in self._held]
            for item in free:
                self._segment.retire(item.record, item.generation)
        return free

    def close(self) -> bool:
        """No new holds until ``open``; whether there are none, so that every record may be retired."""
        with self._lock:
            self._is_open = False
            return not self._held

    def open(self) -> None:
        with self._lock:
            self._is_open = True
