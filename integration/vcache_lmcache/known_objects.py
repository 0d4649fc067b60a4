"""What an L2 adapter remembers of the objects it stored: the pool keeps digests of keys, LMCache wants to list keys and sizes."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterable, Mapping
from typing import Final

from lmcache.v1.distributed.api import KeyEntry, ObjectKey

#: Beyond it, what was stored first is forgotten; it stays in the pool.
MAX_KNOWN: Final = 1 << 20


class KnownObjects:
    """Keys with their sizes in bytes, in the order in which they were stored. Thread-safe."""

    def __init__(self, *, limit: int = MAX_KNOWN) -> None:
        self._limit = limit
        self._lock = threading.Lock()
        self._numbers = itertools.count(1)
        self._objects: dict[ObjectKey, tuple[int, int]] = {}  # its number, its size

    def __len__(self) -> int:
        return len(self._objects)

    def add(self, sizes: Mapping[ObjectKey, int]) -> dict[ObjectKey, int]:
        """Remembers these; what was forgotten to make room, or replaced."""
        with self._lock:
            forgotten = self._take(sizes)
            for key, nbytes in sizes.items():
                self._objects[key] = next(self._numbers), nbytes
            excess = len(self._objects) - self._limit
            return forgotten | self._take(list(itertools.islice(self._objects, max(0, excess))))

    def forget(self, keys: Iterable[ObjectKey]) -> dict[ObjectKey, int]:
        """Those of ``keys`` that were known."""
        with self._lock:
            return self._take(keys)

    def page(self, model_name: str | None, count: int, after: int) -> tuple[list[KeyEntry], int]:
        """At most ``count`` objects of a model (None: any) stored after number ``after``; and the last one's number, if more follow."""
        with self._lock:
            found = [
                (number, KeyEntry(key.to_encoded_object_key(), nbytes))
                for key, (number, nbytes) in self._objects.items()
                if number > after and model_name in (None, key.model_name)
            ]
        page = found[:count]
        return [entry for _, entry in page], page[-1][0] if len(found) > count else 0

    def _take(self, keys: Iterable[ObjectKey]) -> dict[ObjectKey, int]:
        return {key: self._objects.pop(key)[1] for key in keys if key in self._objects}
