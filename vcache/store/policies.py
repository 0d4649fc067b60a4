"""What is written to the store and what is brought back from it into the pool: pure decisions.

Each takes the setting and what happened, and answers yes or no. ``HitCounts`` remembers the one thing they need to know.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import Final, Literal

from vcache.keys import ChunkKey

WritePolicy = Literal["all", "hot", "evicted", "none"]
PromotePolicy = Literal["never", "first_hit", "nth_hit"]

#: Keys whose hits are remembered, 150 bytes each; the one not hit for longest is forgotten first.
REMEMBERED_KEYS: Final = 1 << 16


def writes_on_store(policy: WritePolicy) -> bool:
    """A chunk was written to the pool: is it written to the store too?"""
    return policy == "all"


def writes_on_hit(policy: WritePolicy, hits: int, hot_hits: int) -> bool:
    """A chunk of the pool was hit for the ``hits``-th time. Once only: at exactly the n-th."""
    return policy == "hot" and hits == hot_hits


def writes_on_eviction(policy: WritePolicy) -> bool:
    """The pool is about to drop a chunk. Under ``all`` the store was offered it before."""
    return policy == "evicted"


def promotes(policy: PromotePolicy, hits: int, promote_hits: int) -> bool:
    """A chunk of the store was hit for the ``hits``-th time: does it enter the pool? From the n-th on, since it may not fit."""
    return policy == "first_hit" or (policy == "nth_hit" and hits >= promote_hits)


class HitCounts:
    """Counts hits by key, for the most recently hit keys. Thread-safe."""

    def __init__(self, limit: int = REMEMBERED_KEYS) -> None:
        self._limit = limit
        self._lock = threading.Lock()
        self._hits: OrderedDict[ChunkKey, int] = OrderedDict()

    def hit(self, key: ChunkKey) -> int:
        """Counts a hit: how many there were, this one included."""
        with self._lock:
            hits = self._hits.pop(key, 0) + 1
            self._hits[key] = hits
            if len(self._hits) > self._limit:
                self._hits.popitem(last=False)
            return hits
