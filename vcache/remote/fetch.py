"""Payloads of other hosts' segments on their way into staging memory, batch by batch, each with the records read after it.

A donor that does not deliver ends it all: what would follow is of no use to a run of chunks that ends there. One batch at a time:
two at once could hide the copy to the blocks (a sixth of the time over loopback), where there are cores to spare for that.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
import numpy.typing as npt

from vcache.pool.records import RECORD_BYTES
from vcache.remote.reader import Outcome
from vcache.remote.wire import Fetch, Stretch

if TYPE_CHECKING:
    from vcache.memory.base import WordArray
    from vcache.pool.session import PlacementArray
    from vcache.remote.segments import RemoteSegment, RemoteSegments
    from vcache.store.staging import Block

Int64Array = npt.NDArray[np.int64]
#: The deadline is for so many bytes, or for one payload that is larger.
BATCH_BYTES: Final = 32 << 20


@dataclass(frozen=True, slots=True)
class Batch:
    """Chunks, by their indices in the run; where each payload begins in staging memory; their records ``[n, 16]``."""

    chunks: Int64Array
    offsets: Int64Array
    rows: WordArray


def fetched(
    segments: RemoteSegments, placements: PlacementArray, sources: Mapping[int, RemoteSegment]
) -> Generator[Batch, None, None]:
    """Those chunks of a run that lie in ``sources``, in about their order, until a donor does not deliver.

    A batch's memory is valid until the next one is asked for.
    """
    staging = segments.reader.staging
    todo = deque(_grouped(placements, sources))
    while todo:
        segment, chunks = todo.popleft()
        sizes = placements["nbytes"][chunks].tolist()
        is_hopeless = sizes[0] >= staging.nbytes  # however long one waits
        blocks = staging.take(sizes, wait_s=0.0 if is_hopeless else segments.timeout_s)
        if not blocks:
            segments.count("remote_no_staging", 1)
            return
        try:
            if len(blocks) < len(chunks):
                todo.appendleft((segment, chunks[len(blocks) :]))
                chunks = chunks[: len(blocks)]
            if not _read(segments, segment, placements[chunks], blocks):
                return
            yield _batch(chunks, blocks)
        finally:
            for block in blocks:
                block.release()


def _read(segments: RemoteSegments, segment: RemoteSegment, rows: PlacementArray, blocks: list[Block]) -> bool:
    """Payloads into the blocks, then records into their pages: whether all of it came in time."""
    first, then = [], []
    for offset, record, block in zip(rows["offset"].tolist(), rows["record"].tolist(), blocks, strict=True):
        first.append(Stretch(offset, block.payload_offset, block.nbytes))
        then.append(Stretch(segment.record_offset(record, RECORD_BYTES), block.offset, RECORD_BYTES))
    ask = Fetch(segment.where.peer, segment.where.address, first, then, blocks=len(blocks))
    reading = segments.reader.begin(ask, blocks)
    if reading is None:
        return False
    outcome = reading.outcome(segments.timeout_s)
    if outcome is Outcome.READ:
        segments.delivered(segment)
    elif outcome is Outcome.FAILED:
        segments.failed(segment)
    return outcome is Outcome.READ


def _grouped(
    placements: PlacementArray, sources: Mapping[int, RemoteSegment]
) -> Iterator[tuple[RemoteSegment, Int64Array]]:
    """The run's chunks on other hosts in stretches of ``BATCH_BYTES``, each divided by segment."""
    chunks = np.flatnonzero(np.isin(placements["segment"], list(sources)))
    sizes = placements["nbytes"][chunks].astype(np.int64)
    stretches = (np.cumsum(sizes) - sizes) // BATCH_BYTES
    for stretch in np.unique(stretches).tolist():
        here = chunks[stretches == stretch]
        numbers = placements["segment"][here]
        for number in dict.fromkeys(numbers.tolist()):
            yield sources[number], here[numbers == number]


def _batch(chunks: Int64Array, blocks: list[Block]) -> Batch:
    rows = np.stack([block.page.numpy()[:RECORD_BYTES].view(np.uint64) for block in blocks])
    return Batch(chunks, np.array([block.payload_offset for block in blocks], dtype=np.int64), rows)
