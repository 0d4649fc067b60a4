"""One part of a run moved up: from the store into the pool, or within the pool into VRAM of the reader's own device.

Each is a write as any other: reserve, copy, commit; and a read as any other, whose verdict comes before the commit. So nothing
is promised that is not there, and a part that fails leaves things as they were. Not here: what is worth moving, and when.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from vcache.keys import ChunkKey
from vcache.pool.read_back import copy_payload
from vcache.pool.reading import PendingRead, begin_read
from vcache.pool.writing import PendingWrite, begin_write
from vcache.protocol import Outcome, SegmentInfo, Tier
from vcache.store.base import Shard

if TYPE_CHECKING:
    import torch

    from vcache.keys import ModelSpec
    from vcache.pool.client import PlacementArray, PoolClient
    from vcache.pool.segment import Segment
    from vcache.store.guard import GuardedStore

Int64Array = npt.NDArray[np.int64]

#: Chunks moved together, at most.
CHUNKS_PER_PART: Final = 32
#: Of staging memory, what a part takes at most (but at least one payload): most is for readers.
STAGING_SHARE: Final = 8
#: How long a part waits for readers to leave some of it.
STAGING_PATIENCE_S: Final = 1.0
#: Within the pool, bytes copied together, so that closing never waits for long.
BYTES_PER_PART: Final = 256 << 20


class Run(NamedTuple):
    """Consecutive chunks of a prompt, with what is needed to write one rank's shards of them."""

    keys: Sequence[ChunkKey]
    parent: ChunkKey | None  # the key before the first
    tenant: int
    nbytes: int  # of each payload
    layout: int  # ``PagedKV.payload_layout``

    def beyond(self, count: int) -> Run:
        """Without the first ``count`` chunks."""
        before = self.keys[:count]
        return self._replace(keys=self.keys[count:], parent=before[-1] if before else self.parent)

    def first(self, count: int) -> Run:
        return self._replace(keys=self.keys[:count])


class Moved(NamedTuple):
    """What became of a part, in chunks; they add up to it. Where ``stuck``, going on would lead to nothing."""

    moved: int = 0
    present: int = 0  # there already, or on their way there
    no_space: int = 0  # or nobody to ask for it
    lost: int = 0  # the source did not deliver

    @property
    def stuck(self) -> bool:
        return self.no_space > 0 or self.lost > 0


class MovesUp:
    """One rank's moves. Thread-safe; owns nothing."""

    def __init__(self, client: PoolClient, store: GuardedStore | None, model: ModelSpec, rank: int) -> None:
        self._client = client
        self._store = store
        self._model = model
        self._rank = rank

    def are_near(self, placements: PlacementArray) -> bool:
        """Whether all of the placements lie in VRAM of this host."""
        return all(map(self._is_near, set(placements["segment"].tolist())))

    def own_vram(self) -> list[SegmentInfo]:
        """The segments of tier vram on this process's own device."""
        client = self._client
        here = (Tier.VRAM, client.host, client.device)
        return [info for info in client.session.infos() if (info.tier, info.host, info.device) == here]

    def stretches_from_afar(self, placements: PlacementArray) -> list[tuple[int, int]]:
        """(start, end) of the placements that lie elsewhere than in VRAM of this host, as stretches of neighbours."""
        numbers, which = np.unique(placements["segment"], return_inverse=True)
        is_far = np.array([not self._is_near(number) for number in numbers.tolist()])
        edges = np.flatnonzero(np.diff(np.concatenate(([False], is_far[which], [False])).astype(np.int8)))
        return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))

    def _is_near(self, number: int) -> bool:
        info = self._client.session.info(number)
        return info is not None and (info.tier, info.host) == (Tier.VRAM, self._client.host)

    def chunks_from_store(self, run: Run) -> int:
        """How many of ``run``'s chunks ``from_store`` should be given at once."""
        room = self._store.staging.nbytes // STAGING_SHARE if self._store is not None else 0
        return max(1, min(CHUNKS_PER_PART, room // run.nbytes))

    def chunks_to_vram(self, run: Run) -> int:
        """The same of ``to_vram``."""
        return max(1, min(CHUNKS_PER_PART, BYTES_PER_PART // run.nbytes))

    def from_store(self, run: Run) -> Moved:
        """Brings into the pool what the store has of ``run`` and the pool has not."""
        store = self._store
        if store is None or not store.available:
            return Moved(lost=len(run.keys))
        there = store.contains([Shard(key, self._rank) for key in run.keys])
        held = run.first(there.index(False) if False in there else len(there))
        write = self._reserved(held, into=0)  # nothing more: what is reserved here nobody else may store meanwhile
        granted = len(write.granted)
        try:
            shards = [Shard(run.keys[at], self._rank, self._model.ranks, run.layout) for at in write.granted.tolist()]
            with store.load(shards, [run.nbytes] * granted, patience_s=STAGING_PATIENCE_S) as loaded:
                write.drop(np.arange(granted) >= loaded.run)

                def copy_in(segment: Segment, chunks: Int64Array, offsets: Int64Array) -> None:
                    for chunk, offset in zip(chunks.tolist(), offsets.tolist(), strict=True):
                        copy_payload(loaded.buffer(chunk), segment.tensor[offset : offset + run.nbytes])

                write.copy_with(copy_in)
                moved = write.complete()  # the buffers are to stay until the copies have ended
        finally:
            write.abort()
        return _moved(write, run, asked=len(held.keys), granted=granted, moved=moved)

    def to_vram(self, run: Run) -> Moved:
        """Copies what the pool has of ``run``, wherever that is, into VRAM of this process's device."""
        target = max(self.own_vram(), key=lambda info: info.nbytes, default=None)
        if target is None:
            return Moved(no_space=len(run.keys))
        read = begin_read(self._client, run.keys, self._rank)
        try:
            hits = read.cut(run.nbytes, run.layout)
            write = self._reserved(run.first(hits), into=target.number)
            granted = len(write.granted)
            try:
                if granted:
                    _copy(read, write, run.nbytes)
                    write.drop(write.granted >= read.complete())  # the verdict on what was read, before the commit
                moved = write.complete()
            finally:
                write.abort()
        finally:
            read.complete()
        return _moved(write, run, asked=hits, granted=granted, moved=moved)

    def _reserved(self, run: Run, *, into: int) -> PendingWrite:
        return begin_write(
            self._client,
            run.keys,
            parent=run.parent or b"",
            rank=self._rank,
            ranks=self._model.ranks,
            nbytes=run.nbytes,
            tokens=self._model.chunk_size,
            tenant=run.tenant,
            layout=run.layout,
            into=into,
        )


def _copy(read: PendingRead, write: PendingWrite, nbytes: int) -> None:
    """Copies what ``write`` was granted from where ``read`` has it, and waits for that."""

    def from_one(source: torch.Tensor, chunks: Int64Array, offsets: Int64Array) -> None:
        where = dict(zip(chunks.tolist(), offsets.tolist(), strict=True))

        def to_one(target: Segment, granted: Int64Array, starts: Int64Array) -> None:
            for chunk, start in zip(write.granted[granted].tolist(), starts.tolist(), strict=True):
                if chunk in where:
                    begin = where[chunk]
                    copy_payload(source[begin : begin + nbytes], target.tensor[start : start + nbytes])

        write.copy_with(to_one)

    read.copy_with(lambda source, chunks, offsets: from_one(source.tensor, chunks, offsets), layout=write.layout)
    for segment in (*read.segments, *write.segments):
        segment.fence()


def _moved(write: PendingWrite, run: Run, *, asked: int, granted: int, moved: int) -> Moved:
    """Of ``run``, so many leading chunks were ``asked`` for; the others were not where they were to be read."""
    present = write.outcomes.count(Outcome.EXISTS)
    gone = len(run.keys) - asked
    return Moved(moved, present, no_space=asked - present - granted, lost=gone + granted - moved)
