"""How bytes move: between the engine's planes and payloads in a segment.

The payload of a chunk is, for each plane in order, its blocks in order, without gaps. One call moves any number of chunks.
"""

from __future__ import annotations

import torch

from vcache.paged_kv import PagedKV
from vcache.transfer import cpu
from vcache.transfer.checks import Int64Array

__all__ = ["gather", "scatter"]


def gather(kv: PagedKV, block_ids: Int64Array, segment: torch.Tensor, offsets: Int64Array, *, threads: int = 0) -> None:
    """Copy blocks into payloads.

    ``block_ids`` is int64 ``[chunks, blocks_per_chunk]``, ``offsets`` int64 ``[chunks]``: where each payload begins in
    ``segment``, the whole segment as a uint8 tensor. On a CPU the bytes are there when it returns, copied by at most
    ``threads`` threads; on a GPU the copy is only enqueued on the current stream. Raises ValueError that names the argument,
    before anything is written: block ids out of range, payloads beyond the segment or sharing bytes.
    """
    if kv.device.type == "cuda":
        from vcache.transfer import cuda  # needs triton, which a host has no use for

        cuda.gather(kv, block_ids, segment, offsets)
    else:
        cpu.gather(kv, block_ids, segment, offsets, threads=threads)


def scatter(
    kv: PagedKV, block_ids: Int64Array, segment: torch.Tensor, offsets: Int64Array, *, threads: int = 0
) -> None:
    """Copy payloads into blocks; arguments and completion as in ``gather``. A block id that comes twice is a ValueError."""
    if kv.device.type == "cuda":
        from vcache.transfer import cuda  # needs triton, which a host has no use for

        cuda.scatter(kv, block_ids, segment, offsets)
    else:
        cpu.scatter(kv, block_ids, segment, offsets, threads=threads)
