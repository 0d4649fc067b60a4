"""Payloads of other hosts' segments on their way into staging memory, batch by batch, each with the records read after it.

Two batches are under way at once, so that the network is busy while the last batch is copied to where it belongs. A donor
that does not deliver ends it all: what would follow is of no use to a run of chunks that ends there.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
import numpy.typing as npt

from vcache.pool.records import RECORD_BYTES
from vcache.remote.reader import Outcome, Reading
from vcache.remote.wire import Fetch, Stretch

if TYPE_CHECKING:
    from vcache.memory.base import WordArray
    from vcache.pool.session import PlacementArray
    from vcache.remote.segments import RemoteSegment, RemoteSegments
    from vcache.store.staging import Block

Int64Array = npt.NDArray[np.int64]
#: The deadline is for so many bytes, or for one payload that is larger.
BATCH_BYTES: Final = 32 << 20
BATCHES_AT_ONCE: Final = 2


@dataclass(frozen=True, slots=True)
class Batch:
    """Chunks, by their indices in the run; where each payload begins in staging memory; their records ``[n, 16]``."""

    chunks: Int64Array
    offsets: Int64Array
    rows: WordArray


@dataclass(slots=True)
class _UnderWay:
    segment: RemoteSegment
    chunks: Int64Array
    blocks: list[Block]
    reading: Reading


class Fetching:
    """One run's chunks that lie on other hosts. Iterate over ``batches`` once; not thread-safe."""

    def __init__(
        self, segments: RemoteSegments, placements: PlacementArray, sources: Mapping[int, RemoteSegment]
    ) -> None:
        """``sources``: the segments on other hosts that ``placements`` (of the run) name."""
        self._segments = segments
        self._placements = placements
        self._todo = deque(_grouped(placements, sources))
        self._under_way: deque[_UnderWay] = deque()

    def batches(self) -> Iterator[Batch]:
        """In order, until a donor does not deliver. A batch's memory is valid until the next one is asked for."""
        ready_at = time.monotonic()
        try:
            while self._begin_more(patience_s=self._segments.timeout_s) or self._under_way:
                done = self._under_way[0]
                outcome = done.reading.outcome(max(0.0, ready_at + self._segments.timeout_s - time.monotonic()))
                ready_at = time.monotonic()
                self._under_way.popleft()
                try:
                    if outcome is not Outcome.READ:
                        if outcome is Outcome.FAILED:
                            self._segments.failed(done.segment)
                        return
                    self._segments.delivered(done.segment)
                    self._begin_more(patience_s=0.0)  # with what this batch leaves; the rest when its memory is free
                    yield _batch(done)
                    ready_at = max(ready_at, time.monotonic())
                finally:
                    for block in done.blocks:
                        block.release()
        finally:
            for left in self._under_way:  # what is still read keeps its memory by itself
                left.reading.outcome(0.0)
                for block in left.blocks:
                    block.release()

    def _begin_more(self, *, patience_s: float) -> bool:
        """Begins what can be begun, waiting so long for memory where nothing else is under way; whether anything was."""
        begun = False
        while self._todo and len(self._under_way) < BATCHES_AT_ONCE:
            segment, chunks = self._todo[0]
            sizes = self._placements["nbytes"][chunks].tolist()
            staging = self._segments.reader.staging
            is_hopeless = sizes[0] >= staging.nbytes  # however long one waits
            blocks = staging.take(sizes, wait_s=0.0 if self._under_way or is_hopeless else patience_s)
            if not blocks:
                if patience_s and not self._under_way:
                    self._segments.count("remote_no_staging", 1)
                return begun
            reading = self._segments.reader.begin(self._ask(segment, chunks[: len(blocks)], blocks), blocks)
            if reading is None:
                for block in blocks:
                    block.release()
                self._todo.clear()
                return begun
            self._todo.popleft()
            if len(blocks) < len(chunks):
                self._todo.appendleft((segment, chunks[len(blocks) :]))
            self._under_way.append(_UnderWay(segment, chunks[: len(blocks)], blocks, reading))
            begun = True
        return begun

    def _ask(self, segment: RemoteSegment, chunks: Int64Array, blocks: list[Block]) -> Fetch:
        rows = self._placements[chunks]
        payloads = zip(rows["offset"].tolist(), rows["record"].tolist(), blocks, strict=True)
        first, then = [], []
        for offset, record, block in payloads:
            first.append(Stretch(offset, block.payload_offset, block.nbytes))
            then.append(Stretch(segment.record_offset(record, RECORD_BYTES), block.offset, RECORD_BYTES))
        return Fetch(segment.where.peer, segment.where.address, first, then, blocks=len(blocks))


def _grouped(
    placements: PlacementArray, sources: Mapping[int, RemoteSegment]
) -> Iterator[tuple[RemoteSegment, Int64Array]]:
    """The run's remote chunks in stretches of ``BATCH_BYTES``, each divided by segment."""
    chunks = np.flatnonzero(np.isin(placements["segment"], list(sources)))
    sizes = placements["nbytes"][chunks].astype(np.int64)
    stretches = (np.cumsum(sizes) - sizes) // BATCH_BYTES
    for stretch in np.unique(stretches).tolist():
        here = chunks[stretches == stretch]
        numbers = placements["segment"][here]
        for number in dict.fromkeys(numbers.tolist()):
            yield sources[number], here[numbers == number]


def _batch(done: _UnderWay) -> Batch:
    rows = np.stack([block.page.numpy()[:RECORD_BYTES].view(np.uint64) for block in done.blocks])
    offsets = np.array([block.payload_offset for block in done.blocks], dtype=np.int64)
    return Batch(done.chunks, offsets, rows)
