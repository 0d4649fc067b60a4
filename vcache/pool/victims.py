"""The records that a donor is to demote, or to pull: what they say, and which of them can be reserved together."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from vcache.keys import ChunkKey
from vcache.pool.records import CODEC, EXPIRES, GENERATION, LAYOUT, NBYTES, OFFSET, TENANT, info_of, key_words
from vcache.pool.writing import PendingWrite, begin_write
from vcache.protocol import DemoteItem, Tier

if TYPE_CHECKING:
    from vcache.memory.base import WordArray
    from vcache.pool.client import PoolClient
    from vcache.pool.segment import Segment

_CODEC_MASK = 0xFFFF_FFFF


@dataclass(frozen=True, slots=True)
class Victim:
    """One committed record, and why it was read."""

    item: DemoteItem
    key: ChunkKey
    parent: bytes
    rank: int
    ranks: int
    tokens: int
    tenant: int
    offset: int
    nbytes: int
    expires_s: int
    layout: int

    @property
    def generation(self) -> int:
        return self.item.generation

    @property
    def of_run(self) -> tuple[int, ...]:
        """What the records of one reservation have in common."""
        return (self.rank, self.ranks, self.tokens, self.tenant, self.nbytes, self.expires_s, self.layout)


def victims_of(segment: Segment, items: Sequence[DemoteItem]) -> list[Victim]:
    """Those of ``items`` whose records are still what the server knows of them."""
    found = []
    for item in items:
        rows, whole = segment.directory.rows(item.record, 1)
        row = rows[0]
        if whole[0] and int(row[GENERATION]) == item.generation and is_plain(row):
            found.append(victim_of(item, row))
    return found


def is_plain(row: WordArray) -> bool:
    """Whether the payload is one that can be copied as it is."""
    return not int(row[CODEC]) & _CODEC_MASK


def victim_of(item: DemoteItem, row: WordArray) -> Victim:
    """What a whole committed row says."""
    info = info_of(item.record, row)
    return Victim(
        item=item,
        key=ChunkKey(info.key),
        parent=info.parent,
        rank=info.rank,
        ranks=info.ranks,
        tokens=info.tokens,
        tenant=int(row[TENANT]),
        offset=int(row[OFFSET]),
        nbytes=int(row[NBYTES]),
        expires_s=int(row[EXPIRES]),
        layout=int(row[LAYOUT]),
    )


def begin_copies(
    client: PoolClient, run: Sequence[Victim], *, into: int = 0, into_tier: Tier | None = None
) -> PendingWrite:
    """Reserves space for copies of one of the ``runs_of`` victims, and marks their records; as ``begin_write``."""
    first = run[0]
    return begin_write(
        client,
        [victim.key for victim in run],
        parent=first.parent,
        rank=first.rank,
        ranks=first.ranks,
        nbytes=first.nbytes,
        tokens=first.tokens,
        tenant=first.tenant,
        ttl_s=max(1, first.expires_s - int(time.time())) if first.expires_s else 0,
        layout=first.layout,
        into=into,
        into_tier=into_tier,
    )


def still_valid(segment: Segment, victims: Sequence[Victim]) -> npt.NDArray[np.bool_]:
    """Which records still are. To be asked after a copy: those payloads were theirs, every byte."""
    if not victims:
        return np.zeros(0, dtype=np.bool_)
    return segment.matches(
        np.array([victim.item.record for victim in victims], dtype=np.int64),
        np.array([victim.generation for victim in victims], dtype=np.uint64),
        key_words(b"".join(victim.key for victim in victims)),
    )


def runs_of(victims: Sequence[Victim]) -> Iterator[list[Victim]]:
    """The victims in runs, each but the first of a run the child of the one before: one reservation takes a run."""
    child_of = {(victim.parent, victim.of_run): victim for victim in victims if victim.parent}
    known = {(victim.key, victim.of_run) for victim in victims}
    left = {victim.generation for victim in victims}
    heads = [victim for victim in victims if (victim.parent, victim.of_run) not in known]
    for head in [*heads, *victims]:  # the rest: siblings, and circles that only a lying record could make
        run = []
        at: Victim | None = head
        while at is not None and at.generation in left:
            left.discard(at.generation)
            run.append(at)
            at = child_of.get((at.key, at.of_run))
        if run:
            yield run
