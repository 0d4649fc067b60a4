"""How bytes move: between the engine's planes and payloads in a segment.

The payload of a chunk is, for each plane in order, its blocks in order, without gaps. One call moves any number of chunks.
"""

from __future__ import annotations

from functools import partial

import torch

from vcache.paged_kv import PagedKV
from vcache.transfer import cpu, staged
from vcache.transfer.checks import Int64Array, check_gather, check_scatter
from vcache.transfer.events import recorded, settled
from vcache.transfer.ways import Way, way_to

__all__ = ["gather", "recorded", "scatter", "settled"]


def gather(kv: PagedKV, block_ids: Int64Array, segment: torch.Tensor, offsets: Int64Array, *, threads: int = 0) -> None:
    """Copy blocks into payloads.

    ``block_ids`` is int64 ``[chunks, blocks_per_chunk]``, ``offsets`` int64 ``[chunks]``: where each payload begins in
    ``segment``, the whole segment as a uint8 tensor. Between planes on a CPU and any memory the bytes are there when it returns,
    copied by at most ``threads`` threads. Of planes on a GPU the copy is only enqueued on its current stream (to or from host memory that is not
    pinned, CUDA waits for it all the same): ``recorded`` and ``settled`` are what to wait for, before the segment's bytes, or
    its extents, are used for anything else. Raises ValueError that names the argument,
    before anything is written: block ids out of range, payloads beyond the segment or sharing bytes. What a GPU raises, such as
    ``torch.OutOfMemoryError``, may come after some were written.
    """
    direct = _gather_by(kv, threads)
    if segment.device.type == kv.device.type:
        direct(kv, block_ids, segment, offsets)
    else:
        staged.gather(kv, check_gather(kv, block_ids, segment, offsets), segment, direct)


def scatter(
    kv: PagedKV, block_ids: Int64Array, segment: torch.Tensor, offsets: Int64Array, *, threads: int = 0
) -> None:
    """Copy payloads into blocks; arguments and completion as in ``gather``. A block id that comes twice is a ValueError.

    From a peer GPU by whichever way ``ways.attach`` settled for this tensor; by a kernel where there is no room for a buffer.
    """
    direct = _scatter_by(kv, threads)
    is_one_kind = segment.device.type == kv.device.type
    if is_one_kind and (kv.device.type == "cpu" or way_to(segment) is Way.KERNEL):
        direct(kv, block_ids, segment, offsets)
        return
    copy = check_scatter(kv, block_ids, segment, offsets)
    try:
        staged.scatter(kv, copy, segment, direct)
    except torch.OutOfMemoryError:  # of the buffer: nothing has been enqueued yet
        if not is_one_kind:
            raise
        direct(kv, block_ids, segment, offsets)


def _gather_by(kv: PagedKV, threads: int) -> staged.Direct:
    if kv.device.type != "cuda":
        return partial(cpu.gather, threads=threads)
    from vcache.transfer import cuda  # needs triton, which a host has no use for

    return cuda.gather


def _scatter_by(kv: PagedKV, threads: int) -> staged.Direct:
    if kv.device.type != "cuda":
        return partial(cpu.scatter, threads=threads)
    from vcache.transfer import cuda

    return cuda.scatter
