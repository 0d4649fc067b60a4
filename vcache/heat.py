"""How often chunks were hit, as far as this process sees: what was hit long ago is forgotten first."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Final

from vcache.keys import ChunkKey

#: Chunks remembered: some 10 MB.
REMEMBERED: Final = 65_536


class Heat:
    """Counts hits of the chunks hit last. Thread-safe."""

    def __init__(self, remembered: int = REMEMBERED) -> None:
        self._remembered = remembered
        self._lock = threading.Lock()
        self._hits: OrderedDict[ChunkKey, int] = OrderedDict()

    def hit(self, keys: Sequence[ChunkKey]) -> list[int]:
        """Counts one hit of each; how many each has had by now."""
        counts = []
        with self._lock:
            for key in keys:
                count = self._hits.pop(key, 0) + 1
                self._hits[key] = count
                counts.append(count)
            while len(self._hits) > self._remembered:
                self._hits.popitem(last=False)
        return counts
