"""LMCache's locks and pins as leases of the pool: one lease for a batch of keys, ended when the last of them is let go."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vcache.keys import ChunkKey


@dataclass(slots=True, eq=False)  # each is one of its own
class _Lease:
    id: int
    keys: Sequence[ChunkKey]
    held: int  # keys not let go yet
    deadline: float


class HeldKeys:
    """Which keys are locked, how often, by which leases. Thread-safe.

    A lease that ran out is forgotten: the server has ended it, and a key that nobody lets go does not stay here.
    """

    def __init__(self, release: Callable[[int], None], *, clock: Callable[[], float] = time.monotonic) -> None:
        self._release = release
        self._clock = clock
        self._lock = threading.Lock()
        self._by_key: dict[ChunkKey, deque[_Lease]] = {}
        self._oldest: deque[_Lease] = deque()

    def __len__(self) -> int:
        """Keys that are held."""
        with self._lock:
            self._forget_ended()
            return len(self._by_key)

    def hold(self, keys: Sequence[ChunkKey], lease: int, lease_s: float) -> None:
        """Each of ``keys`` is held once more, by this lease (0: the server gave none)."""
        if not lease or not keys:
            return
        with self._lock:
            self._forget_ended()
            entry = _Lease(lease, keys, len(keys), self._clock() + lease_s)
            self._oldest.append(entry)
            for key in keys:
                self._by_key.setdefault(key, deque()).append(entry)

    def let_go(self, keys: Sequence[ChunkKey]) -> int:
        """Each of ``keys`` is held once less; how many were held."""
        ended = []
        found = 0
        with self._lock:
            for key in keys:
                leases = self._by_key.get(key)
                if leases is None:
                    continue
                found += 1
                lease = leases.popleft()
                if not leases:
                    del self._by_key[key]
                lease.held -= 1
                if not lease.held:
                    ended.append(lease.id)
        for lease_id in ended:
            self._release(lease_id)
        return found

    def let_go_all(self) -> None:
        """Ends every lease."""
        with self._lock:
            ended = [lease.id for lease in self._oldest if lease.held]
            self._by_key.clear()
            self._oldest.clear()
        for lease_id in ended:
            self._release(lease_id)

    def _forget_ended(self) -> None:
        now = self._clock()
        while self._oldest and (not self._oldest[0].held or self._oldest[0].deadline < now):
            lease = self._oldest.popleft()
            for key in lease.keys if lease.held else ():
                leases = self._by_key.get(key)
                if leases is not None and lease in leases:
                    leases.remove(lease)
                    if not leases:
                        del self._by_key[key]
