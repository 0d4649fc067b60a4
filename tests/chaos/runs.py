"""The runs of chunks that chaos workers store and read: everything about one follows from its name, every byte included."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tests.chaos.board import CHUNKS
from vcache.keys import ChunkKey

#: Some smaller than the alignment of extents, some not a multiple of anything.
SIZES = (1000, 5000, 12288, 40001, 90000)
CONTENDED = 10  # runs that every worker stores
_FACTOR = np.uint64(0xFF51AFD7ED558CCD)


@dataclass(frozen=True)
class Run:
    """Chunks of one prompt. ``slot`` -1: one that every worker may store, again and again."""

    slot: int
    version: int

    @property
    def length(self) -> int:
        return 1 + self._digest()[0] % CHUNKS

    @property
    def nbytes(self) -> int:
        return SIZES[self._digest()[1] % len(SIZES)]

    @property
    def ranks(self) -> int:
        return 1 + self._digest()[2] % 2

    @property
    def keys(self) -> list[ChunkKey]:
        return [ChunkKey(self._digest(b"%d" % chunk)) for chunk in range(self.length)]

    def _digest(self, what: bytes = b"") -> bytes:
        return hashlib.blake2b(b"%d %d " % (self.slot, self.version) + what, digest_size=16).digest()


def payload(key: bytes, rank: int, nbytes: int) -> npt.NDArray[np.uint8]:
    """The bytes of a shard: each 8 of them differ with key, rank and position."""
    seed = int.from_bytes(hashlib.blake2b(key + bytes([rank]), digest_size=8).digest(), "little")
    words = (np.arange(-(-nbytes // 8), dtype=np.uint64) ^ np.uint64(seed)) * _FACTOR
    return (words ^ (words >> np.uint64(32))).view(np.uint8)[:nbytes]
