"""Reads payloads back that this process has written to the pool, later and without the server: for the store below.

No lease keeps them in place meanwhile: the validation after the copy says which of them were still there. So a shard can be
read back before the other ranks' shards are there, and whether or not the server answers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from vcache.keys import ChunkKey
from vcache.memory.copying import aside_on
from vcache.pool.records import key_words
from vcache.protocol import SegmentInfo

if TYPE_CHECKING:
    import torch

    from vcache.pool.client import PlacementArray, PoolClient


class Written(NamedTuple):
    """Committed shards, and what is needed to find them again."""

    keys: Sequence[ChunkKey]
    placements: PlacementArray  # one for each key
    infos: Mapping[int, SegmentInfo]  # of the segments that the placements name


def read_back(
    client: PoolClient, written: Written, positions: Sequence[int], buffers: Sequence[torch.Tensor]
) -> list[bool]:
    """Copies ``written``'s payloads at ``positions`` into ``buffers`` (host memory, of their sizes); which are valid."""
    chosen = np.asarray(positions, dtype=np.int64)
    rows = written.placements[chosen]
    keys = key_words(b"".join(written.keys[position] for position in positions))
    valid = np.zeros(len(rows), dtype=np.bool_)
    for number, info in written.infos.items():
        mine = np.flatnonzero(rows["segment"] == number)
        use = client.use_segment(info) if mine.size else None
        if use is None:
            continue
        try:
            with aside_on(use.segment.tensor.device):
                for index in mine.tolist():
                    start, buffer = int(rows["offset"][index]), buffers[index]
                    copy_payload(use.segment.tensor[start : start + buffer.nbytes], buffer)
                valid[mine] = use.segment.matches(
                    rows["record"][mine].astype(np.int64), rows["generation"][mine], keys[mine]
                )
        finally:
            use.release()
    return valid.tolist()


def copy_payload(source: torch.Tensor, target: torch.Tensor) -> None:
    """Copies uint8 of one size. From and to host memory it is done on return; between GPUs it is enqueued."""
    if source.device.type == target.device.type == "cpu":
        np.copyto(target.numpy(), source.numpy())  # torch would bring threads of its own
    else:
        target.copy_(source)
