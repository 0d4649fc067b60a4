"""Pins: chunks kept from eviction until a deadline, whatever else happens to them.

One pin per chunk: pinning again moves its deadline, never to an earlier one. A pin belongs to the chunk, not to the session:
it outlives the one that asked for it, so its number is bounded for the server as a whole.
"""

from __future__ import annotations

from typing import Final

from vram_metadata_server.deadlines import Deadlines
from vram_metadata_server.index import Entry

MAX_PINS: Final = 1 << 20


class PinTable:
    """All pins, by key."""

    def __init__(self) -> None:
        self._by_key: dict[bytes, tuple[float, Entry]] = {}
        self._deadlines: Deadlines[bytes] = Deadlines(self._deadline)

    def __len__(self) -> int:
        return len(self._by_key)

    def pin(self, entry: Entry, deadline: float) -> bool:
        """Whether the entry is pinned now (not when the server holds too many pins)."""
        known = self._by_key.get(entry.key)
        if known is not None and known[1] is not entry:  # the chunk was removed and is back
            self._drop(entry.key)
            known = None
        if known is None:
            if len(self._by_key) >= MAX_PINS:
                return False
            entry.holds += 1
        elif known[0] >= deadline:
            return True
        self._by_key[entry.key] = (deadline, entry)
        self._deadlines.push(deadline, entry.key)
        return True

    def unpin(self, key: bytes) -> bool:
        """Whether there was a pin."""
        if key not in self._by_key:
            return False
        self._drop(key)
        return True

    def expire(self, now: float) -> int:
        """Ends the pins whose deadline has passed."""
        ended = 0
        for key in self._deadlines.due(now):
            self._drop(key)
            ended += 1
        return ended

    def _deadline(self, key: bytes) -> float | None:
        known = self._by_key.get(key)
        return None if known is None else known[0]

    def _drop(self, key: bytes) -> None:
        _, entry = self._by_key.pop(key)
        entry.holds -= 1

    def held(self) -> list[Entry]:
        """The entries that pins hold."""
        return [entry for _, entry in self._by_key.values()]

    def check_integrity(self, now: float) -> None:
        """Raises ``AssertionError`` unless every pin has a deadline and none has outlived it."""
        for key, (deadline, entry) in self._by_key.items():
            assert deadline > now, "a pin outlived its deadline"
            assert entry.key == key and self._deadlines.covers(key, deadline)
