"""Copies between planes and payloads in host memory, by a few threads that hold the GIL only between large operations.

One numpy operation moves a chunk's blocks in all planes of a field: in C a memcpy per block, with the GIL released. Neighbouring
blocks are one memcpy. docs/benchmarks/notes.md has the figures, and those of the ways not taken; torch's own threads, for one,
wait for each other within every operation, which costs most of the speed as soon as something else keeps a core busy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from vcache.paged_kv import Field, PagedKV
from vcache.transfer.checks import CheckedCopy, Int64Array, check_gather, check_scatter
from vcache.transfer.threads import default_threads, run_pieces

Bytes = npt.NDArray[np.uint8]

#: A second thread is worth waking for this much: it takes about 30 us, in which the first copies 256 KiB.
MIN_PIECE_BYTES = 512 << 10
#: Pieces per thread, so that threads of unequal luck end at about the same time.
PIECES_PER_THREAD = 2


class _Piece(NamedTuple):
    """Blocks ``first`` to ``last`` of one chunk."""

    chunk: int
    first: int
    last: int


class _Move(NamedTuple):
    """One operation: ``planes[:, blocks]`` and ``payload`` are the same bytes, ``[planes, blocks, block_bytes]``."""

    planes: Bytes
    blocks: slice | Int64Array
    payload: Bytes


def gather(kv: PagedKV, block_ids: Int64Array, segment: torch.Tensor, offsets: Int64Array, *, threads: int = 0) -> None:
    """Copy the blocks of each chunk into its payload; done when it returns. See ``vcache.transfer.gather``."""
    copy = check_gather(kv, block_ids, segment, offsets)
    memory: Bytes = segment.numpy()

    def work(piece: _Piece) -> None:
        for field in kv.fields:
            whole = piece.last - piece.first == copy.block_ids.shape[1]
            # take() would first make a contiguous copy of all planes, or of the payload.
            can_take = whole and field.view.is_contiguous()
            for planes, blocks, payload in _moves(field, copy, memory, piece, any_order=can_take):
                if isinstance(blocks, slice):
                    payload[...] = planes[:, blocks]
                else:
                    np.take(planes, blocks, axis=1, out=payload, mode="clip")  # "raise" would go through a buffer

    _in_pieces(work, copy, threads)


def scatter(
    kv: PagedKV, block_ids: Int64Array, segment: torch.Tensor, offsets: Int64Array, *, threads: int = 0
) -> None:
    """Copy each payload into the blocks of its chunk; done when it returns. See ``vcache.transfer.scatter``."""
    copy = check_scatter(kv, block_ids, segment, offsets)
    memory: Bytes = segment.numpy()

    def work(piece: _Piece) -> None:
        for field in kv.fields:
            for planes, blocks, payload in _moves(field, copy, memory, piece, any_order=True):
                planes[:, blocks] = payload

    _in_pieces(work, copy, threads)


def _in_pieces(work: Callable[[_Piece], None], copy: CheckedCopy, threads: int) -> None:
    chunks, per_chunk = copy.block_ids.shape
    if copy.nbytes == 0:
        return
    threads = threads or default_threads()
    wanted = -(-threads * PIECES_PER_THREAD // chunks) if threads > 1 else 1
    parts = max(1, min(wanted, per_chunk, copy.payload_bytes // MIN_PIECE_BYTES))
    bounds = [per_chunk * part // parts for part in range(parts + 1)]
    pieces = [_Piece(chunk, *ends) for chunk in range(chunks) for ends in pairwise(bounds)]
    run_pieces(work, pieces, max(1, min(threads, copy.nbytes // MIN_PIECE_BYTES)))


def _moves(field: Field, copy: CheckedCopy, memory: Bytes, piece: _Piece, *, any_order: bool) -> Iterator[_Move]:
    """The operations that move one piece in one field: one per run of neighbours, or one for all if that takes many."""
    planes: Bytes = field.view.numpy()
    count, _, block_bytes = planes.shape
    per_chunk = copy.block_ids.shape[1]
    start = int(copy.offsets[piece.chunk]) + field.bytes_before * per_chunk
    chunk = memory[start : start + count * per_chunk * block_bytes].reshape(count, per_chunk, block_bytes)
    payload: Bytes = chunk[:, piece.first : piece.last]
    ids = copy.block_ids[piece.chunk, piece.first : piece.last]
    breaks = (np.flatnonzero(np.diff(ids) != 1) + 1).tolist()
    if any_order and len(breaks) >= len(ids) // 2:
        yield _Move(planes, ids, payload)
        return
    for first, last in pairwise([0, *breaks, len(ids)]):
        block = int(ids[first])
        yield _Move(planes, slice(block, block + last - first), payload[:, first:last])
