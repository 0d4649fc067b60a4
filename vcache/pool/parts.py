"""What of a run's placements lies in one segment each: copies and records are a segment's, and batched by it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from vcache.memory.base import WordArray
from vcache.pool.mappings import Use
from vcache.pool.segment import Segment
from vcache.pool.session import PlacementArray

Int64Array = npt.NDArray[np.int64]


class Part(NamedTuple):
    """One segment's: indices of the run's chunks that lie in it, and their placements' columns."""

    number: int
    segment: Segment
    chunks: Int64Array
    records: Int64Array
    generations: WordArray
    offsets: Int64Array


def parted(placements: PlacementArray, uses: Iterable[tuple[int, Use]], *, in_one: bool) -> list[Part]:
    """By segment number, those that have any of the placements. ``in_one``: all lie in the only one that is used."""
    parts = []
    for number, use in uses:
        chunks = np.arange(len(placements)) if in_one else np.flatnonzero(placements["segment"] == number)
        if chunks.size:
            rows = placements if in_one else placements[chunks]
            records, offsets = rows["record"].astype(np.int64), rows["offset"].astype(np.int64)
            parts.append(Part(number, use.segment, chunks, records, rows["generation"], offsets))
    return parts
