"""Copies between planes and payloads in host memory, by a few threads that do not hold the GIL while they copy.

One call of a small function in C (``copy_blocks.c``) moves a chunk's blocks in all planes of a field, with non-temporal stores.
docs/benchmarks/notes.md has the figures, and those of the ways not taken; torch's own threads, for one, wait for each other
within every operation, which costs most of the speed as soon as something else keeps a core busy.
"""

from __future__ import annotations

import ctypes
from itertools import pairwise
from typing import Final, NamedTuple

import torch

from vcache.native import native_library
from vcache.paged_kv import PagedKV
from vcache.transfer.checks import CheckedCopy, Int64Array, check_gather, check_one_kind, check_scatter
from vcache.transfer.threads import default_threads, run_pieces

#: A second thread is worth waking for this much: it takes about 30 us, in which the first copies 256 KiB.
MIN_PIECE_BYTES = 512 << 10
#: Pieces per thread, so that threads of unequal luck end at about the same time.
PIECES_PER_THREAD = 2

_LIBRARY: Final = "vcache.transfer._copy_blocks"


class _Piece(NamedTuple):
    """Blocks ``first`` to ``last`` of one chunk."""

    chunk: int
    first: int
    last: int


def gather(kv: PagedKV, block_ids: Int64Array, segment: torch.Tensor, offsets: Int64Array, *, threads: int = 0) -> None:
    """Copy the blocks of each chunk into its payload; done when it returns. See ``vcache.transfer.gather``."""
    _copy(kv, check_gather(kv, block_ids, segment, offsets), segment, to_payload=True, threads=threads)


def scatter(
    kv: PagedKV, block_ids: Int64Array, segment: torch.Tensor, offsets: Int64Array, *, threads: int = 0
) -> None:
    """Copy each payload into the blocks of its chunk; done when it returns. See ``vcache.transfer.scatter``."""
    _copy(kv, check_scatter(kv, block_ids, segment, offsets), segment, to_payload=False, threads=threads)


def _copy(kv: PagedKV, copy: CheckedCopy, segment: torch.Tensor, *, to_payload: bool, threads: int) -> None:
    check_one_kind(kv, segment)
    if copy.nbytes == 0:
        return
    chunks, per_chunk = copy.block_ids.shape
    memory = segment.data_ptr()
    ids = copy.block_ids.ctypes.data

    def work(piece: _Piece) -> None:
        payload = memory + int(copy.offsets[piece.chunk])
        first_id = ids + (piece.chunk * per_chunk + piece.first) * copy.block_ids.itemsize
        for field in kv.fields:
            planes, _, block_bytes = field.view.shape
            plane_stride, block_stride, _ = field.view.stride()  # of bytes: the view is uint8
            _copy_blocks(
                field.view.data_ptr(),
                plane_stride,
                planes,
                block_stride,
                block_bytes,
                first_id,
                piece.last - piece.first,
                payload + field.bytes_before * per_chunk + piece.first * block_bytes,
                per_chunk * block_bytes,
                to_payload,
            )

    threads = threads or default_threads()
    wanted = -(-threads * PIECES_PER_THREAD // chunks) if threads > 1 else 1
    parts = max(1, min(wanted, per_chunk, copy.payload_bytes // MIN_PIECE_BYTES))
    bounds = [per_chunk * part // parts for part in range(parts + 1)]
    pieces = [_Piece(chunk, *ends) for chunk in range(chunks) for ends in pairwise(bounds)]
    run_pieces(work, pieces, max(1, min(threads, copy.nbytes // MIN_PIECE_BYTES)))


def _load() -> ctypes._NamedFuncPointer:
    function = native_library(_LIBRARY).vcache_copy_blocks
    number, address = ctypes.c_int64, ctypes.c_void_p
    function.argtypes = [address, *[number] * 4, address, number, address, number, ctypes.c_int]
    function.restype = None
    return function


_copy_blocks = _load()
